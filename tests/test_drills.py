"""The long proofs, `make drills`: real commands in processes of their own, killed at random."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SIZES = (
    "--model.vocabulary 512 --model.layers 2 --model.width 64 --model.heads 4 --model.context 64 --model.dropout 0.1"
)
COMMAND = [sys.executable, "-m", "megagpt.cli", "train", "quickstart", *SIZES.split(), "--train.steps", "60"]
KILLS = 5


def command(corpora: dict[str, Path], out: Path, *words: str) -> list[str]:
    mixture = [str(corpora["prose"]), "1", str(corpora["code"]), "2"]
    return [*COMMAND, "--out", str(out), "--data.mixture", *mixture, "--checkpoint.every", "7", *words]


def losses(out: Path) -> list[tuple[int, float, float]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"], record["grad_norm"]) for record in map(json.loads, lines)]


@pytest.mark.parametrize("stage", range(4))
def test_a_run_killed_at_random_moments_gives_the_losses_of_an_uninterrupted_one(corpora, tmp_path, stage):
    words = ("--parallel.data", "2", "--parallel.zero_stage", str(stage))
    subprocess.run(command(corpora, tmp_path / "straight", *words), check=True)
    rng = random.Random(stage)
    killed = 0
    while killed < KILLS:
        run = subprocess.Popen(command(corpora, tmp_path / "killed", *words), start_new_session=True)
        try:
            run.wait(rng.uniform(3, 8))
            break  # it was faster than the kill
        except subprocess.TimeoutExpired:
            os.kill(run.pid, signal.SIGKILL)  # the parent alone: its ranks must end with it
            run.wait()
            killed += 1
    subprocess.run(command(corpora, tmp_path / "killed", *words), check=True)
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert [step for step, *_ in losses(tmp_path / "killed")] == list(range(1, 61))


def test_torchruns_ranks_train_as_our_own_do(corpora, tmp_path):
    ours = command(corpora, tmp_path / "ours", "--parallel.data", "2")
    subprocess.run(ours, check=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    theirs = command(corpora, tmp_path / "theirs", "--parallel.data", "2")
    subprocess.run([*launcher, *theirs[1:]], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert losses(tmp_path / "theirs") == losses(tmp_path / "ours")
