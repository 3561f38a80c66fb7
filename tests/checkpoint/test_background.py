"""Saving in the background: one at a time, agreed by all ranks, and never of a state that has moved on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

import pytest
import torch

from megagpt.checkpoint import lineage
from megagpt.checkpoint.background import BackgroundSave, HostCopy
from megagpt.checkpoint.folders import folder_at
from megagpt.checkpoint.interval import best_interval
from megagpt.checkpoint.load import newest_valid
from megagpt.errors import UserError
from megagpt.heal.goodput import expected_share
from megagpt.parallel import ranks
from megagpt.parallel.state import Slice
from tests.checkpoint.test_faults import holds
from tests.checkpoint.tiny import header, state
from tests.ranks import on_ranks


class _Held(HostCopy):
    """Copies only when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def take(self, owned: Sequence[Slice]) -> list[Slice]:
        assert self.go.wait(60)
        return super().take(owned)


def test_an_update_waits_for_the_copy_and_what_it_changes_does_not_reach_the_checkpoint(tmp_path):
    parts, copy = state(10), _Held()
    root = folder_at(tmp_path)
    folder = lineage.commit_folder(root, lineage.begin(root, None), 10)
    work = BackgroundSave(folder, parts, copy, header=header(10), rank=0, ranks=1)

    def change() -> None:
        work.copied.wait()
        for part in parts:
            part.weight.fill_(torch.nan)

    update = threading.Thread(target=change)
    update.start()
    update.join(0.1)
    assert update.is_alive()
    copy.go.set()
    update.join()
    work.finish()
    assert holds(newest_valid(root)[0], 10)


def test_a_second_copy_takes_no_more_memory(tmp_path):
    copy = HostCopy()
    first = copy.take(state(1))
    again = copy.take(state(2))
    assert copy.bytes() == 3 * 4 * (18 + 5)
    assert [part.weight.data_ptr() for part in first] == [part.weight.data_ptr() for part in again]


def test_the_commit_waits_for_the_slowest_rank_and_a_failure_reaches_every_rank(tmp_path):
    def work() -> list[str]:
        ranks.join(world=2)
        rank = ranks.rank()
        mine = [state(10)[rank]]
        go = threading.Event()
        root = folder_at(tmp_path / "root")
        generation = lineage.begin(root, None) if rank == 0 else 1
        saving = BackgroundSave(
            lineage.commit_folder(root, generation, 10),
            _Slow(mine, go, rank),
            HostCopy(),
            header=header(10),
            rank=rank,
            ranks=2,
        )
        found = [str(saving.settle()) for _ in range(3)]  # rank 1 has written nothing yet
        found.append(str((tmp_path / "root" / "gen-0001" / "step-000000010" / "manifest.json").exists()))
        go.set()
        saving.finish()
        blocked = tmp_path / f"file-{rank}"
        blocked.write_text("")
        failing = BackgroundSave(
            folder_at((blocked if rank else tmp_path) / "x"), mine, HostCopy(), header=header(20), rank=rank, ranks=2
        )
        try:
            failing.finish()
        except UserError as error:
            found.append(str(error))
        return found

    first, second = on_ranks(work, 2, tmp_path)
    assert first[:4] == second[:4] == ["False", "False", "False", "False"]
    assert holds(newest_valid(folder_at(tmp_path / "root"))[0], 10)
    assert "rank 1 failed" in first[4]
    assert "Not a directory" in second[4]


class _Slow(list):
    """Slices that rank 1 cannot look through before it is told to."""

    def __init__(self, parts: list, go: threading.Event, rank: int) -> None:
        super().__init__(parts)
        self._go, self._rank = go, rank

    def __iter__(self):
        if self._rank == 1:
            assert self._go.wait(60)
        return super().__iter__()


def test_the_interval_is_the_one_of_which_most_steps_count():
    save, mtbf = 30.0, 4 * 3600.0
    best = best_interval(save_seconds=save, mtbf_seconds=mtbf)
    assert best == pytest.approx((2 * save * mtbf) ** 0.5, rel=0.05)
    share = partial(expected_share, save=save, restart=0.0, mtbf=mtbf)
    for other in (best / 1.05, best * 1.05):
        assert share(interval=other) < share(interval=best)
    assert best_interval(save_seconds=100.0, mtbf_seconds=10.0) == 10.0
