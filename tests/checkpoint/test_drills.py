"""The long proofs about checkpoints, part of `make drills`; their figures go to benchmarks/results.

Ranks are forked from this process, which has imported everything: a restart costs seconds, not a minute.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.checkpoint import folders, lineage
from megagpt.checkpoint.folders import folder_at
from megagpt.config import Checkpoint, Parallel, Train
from megagpt.files import write_whole
from megagpt.parallel import ranks
from tests.heal.test_runs import final_weights
from tests.test_train import fit, losses, records, run_of

pytestmark = pytest.mark.slow

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "drills_checkpoint.json"
KILLS, STEPS = 20, 80
LAYOUTS = {
    "2x2x2, ZeRO 1": Parallel(data=2, pipeline=2, tensor=2, zero_stage=1),
    "4x1x1, ZeRO 3": Parallel(data=4, zero_stage=3),
}


def record(name: str, figures: dict[str, Any]) -> None:
    """Put the figures of one drill into the file of results, beside those of the others."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    about = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": "pytest -m slow tests/checkpoint/test_drills.py",
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
    }
    write_whole(RESULTS, json.dumps({**known, name: {**figures, **about}}, indent=1) + "\n")


@dataclasses.dataclass(frozen=True)
class Kill:
    """Who dies in an attempt, and when."""

    rank: int
    background: bool
    """Whether the attempt saves in the background."""
    during: str
    """"steps": some time after `count` steps, wherever the rank then is; "a save": in its write of file `count`."""
    count: int
    delay: float


def kill_of(seed: str, world: int) -> Kill:
    rng = random.Random(seed)
    during = rng.choice(("steps", "a save"))
    return Kill(rng.randrange(world), rng.random() < 0.5, during, rng.randrange(1, 5), rng.uniform(0, 0.5))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def planted(kill: Kill) -> Any:
    """Make the rank of `kill` die as it says."""

    def plant() -> None:
        from megagpt.report.journal import Journal

        if ranks.rank() != kill.rank:
            return
        left = [kill.count]
        told, write = Journal.step, folders._LocalFolder.write

        def step(self: Journal, *arguments: Any, **values: Any) -> None:
            told(self, *arguments, **values)
            left[0] -= 1
            if not left[0]:
                threading.Timer(kill.delay, die).start()

        def torn(chunks: Iterable[Any]) -> Iterable[Any]:
            left[0] -= 1
            for chunk in chunks:
                yield chunk if left[0] else chunk[: len(chunk) // 2]
                if not left[0]:
                    die()

        if kill.during == "steps":
            Journal.step = step  # type: ignore[method-assign]
        else:
            folders._LocalFolder.write = lambda self, name, chunks: write(self, name, torn(chunks))  # type: ignore[method-assign]

    return plant


def newest_step(out: Path) -> int:
    return next((commit.step for commit in lineage.commits(folder_at(out / "checkpoints"))), 0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_after_random_kills_of_any_rank_losses_and_weights_are_those_of_an_undisturbed_run(corpora, tmp_path, name):
    parallel = LAYOUTS[name]
    train = Train(
        tokens=STEPS * 8 * 32, global_batch=8, micro_batch=2, precision="fp32", eval_every=0, eval_sequences=4
    )
    run = run_of(corpora, parallel=parallel, train=train, checkpoint=Checkpoint(every=3))
    began = time.monotonic()
    assert fit(run, tmp_path / "straight") == 0
    kills: list[dict[str, Any]] = []
    out, restarted = tmp_path / "killed", 0
    while len(kills) < KILLS:
        kill = kill_of(f"{name} {len(kills)}", parallel.world_size())
        saving = dataclasses.replace(run.checkpoint, asynchronous=kill.background)
        assert fit(dataclasses.replace(run, checkpoint=saving), out, before=planted(kill)) == 128 + signal.SIGKILL
        told = records(out, "events")
        begun = [event["step"] for event in told if event["event"] in ("started", "resumed")]
        assert len(begun) == len(kills) + 1
        assert begun[-1] == restarted, "the attempt did not go on from the newest commit"
        reached = max((step for step, *_ in losses(out)), default=0)
        restarted = newest_step(out)
        committed = max((event["step"] for event in told if event["event"] == "checkpoint"), default=0)
        assert restarted >= committed
        kills.append({**dataclasses.asdict(kill), "seed": f"{name} {len(kills)}", "at": reached, "commit": restarted})
    assert fit(run, out) == 0
    assert losses(out) == losses(tmp_path / "straight")
    assert [step for step, *_ in losses(out)] == list(range(1, STEPS + 1))
    assert final_weights(out) == final_weights(tmp_path / "straight")
    record(
        f"kills, {name}",
        {
            "kills": len(kills),
            "in_a_save": sum(kill["during"] == "a save" for kill in kills),
            "with_background_saves": sum(kill["background"] for kill in kills),
            "steps": STEPS,
            "steps_repeated": sum(kill["at"] - kill["commit"] for kill in kills),
            "losses_and_weights_bitwise_equal": True,
            "seconds": round(time.monotonic() - began),
            "each": kills,
        },
    )
