"""Ranks compare the tables of tiles that they read."""

import pytest
import torch
import torch.distributed as dist

from megagpt.errors import UserError
from megagpt.kernels import tuning
from megagpt.parallel import ranks
from tests.kernels.helpers import DEVICE
from tests.ranks import on_ranks

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="gloo ranks on a CPU")


def test_ranks_with_equal_tables_agree_and_another_table_on_one_rank_is_refused_by_its_number(tmp_path, monkeypatch):
    def compare() -> list[str]:
        rank = ranks.rank()
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=rank, world_size=3)
        tuning.check_ranks_agree(torch.device("cpu"))
        if rank == 1:
            monkeypatch.setattr(tuning, "digest", lambda _: "ab" * 32)
        with pytest.raises(UserError) as refused:
            tuning.check_ranks_agree(torch.device("cpu"))
        dist.destroy_process_group()
        return str(refused.value).splitlines()

    found = on_ranks(compare, 3, tmp_path)
    same = tuning.digest(torch.device("cpu"))[:8]
    for rank in (0, 2):
        assert f"rank {rank} reads the kernel table sm90 with hash {same}, but rank 1 reads another" in found[rank][0]
    assert "rank 1 reads the kernel table sm90 with hash abababab, but rank 0 reads another" in found[1][0]
