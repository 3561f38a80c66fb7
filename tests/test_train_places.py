"""Places that cannot take a run: one clear error each, before a rank starts."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from megagpt import cli
from megagpt.parallel import ranks

_NEW_MOUNTS, _RECURSIVE, _PRIVATE, _READ_ONLY = 0x20000, 1 << 14, 1 << 18, 1


def mounted(place: Path, *, read_only: bool) -> bool:
    """Put a file system of 1 MiB at a place, for this process alone; whether that was allowed."""
    system = ctypes.CDLL(None, use_errno=True)
    if system.unshare(_NEW_MOUNTS) or system.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None):
        return False
    flags = _READ_ONLY if read_only else 0
    return not system.mount(b"tmpfs", str(place).encode(), b"tmpfs", flags, b"size=1m")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("run read-only", "cannot be written: [Errno 30] Read-only file system"),
        ("checkpoints read-only", "place cannot be written: [Errno 30] Read-only file system"),
        ("checkpoints full", "a checkpoint needs 0.01 GiB in"),
    ],
)
def test_a_place_that_cannot_take_the_run_is_refused_before_a_rank_starts(corpora, tmp_path, capfd, what, said):
    place = tmp_path / "place"
    place.mkdir()
    mixture = [str(corpora["prose"]), "1"]
    sizes = ["--model.vocabulary", "512", "--model.layers", "2", "--model.width", "128", "--model.heads", "2"]
    where = ["--out", str(place / "run")] if what.startswith("run") else ["--out", str(tmp_path / "run")]
    where += [] if what.startswith("run") else ["--checkpoint.folder", str(place)]

    def work() -> None:
        if not mounted(place, read_only="read-only" in what):
            raise SystemExit(77)
        raise SystemExit(cli.main(["train", "quickstart", *sizes, "--data.mixture", *mixture, *where]))

    status = ranks.run_local(work, 1)
    if status == 77:
        pytest.skip("this sandbox allows no mounts")
    assert status == 2
    told = capfd.readouterr().err
    assert said in told
    assert "Traceback" not in told
    assert not list((tmp_path / "run").glob("attempts"))
