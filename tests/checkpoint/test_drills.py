"""The long proofs about checkpoints, part of `make drills`; their figures go to benchmarks/results.

Ranks are forked from this process, which has imported everything: a restart costs seconds, not a minute.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
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
from megagpt.checkpoint.load import newest_valid, reader_of, whole_tensors
from megagpt.config import Checkpoint, Data, Parallel, Run, Train
from megagpt.data.corpus import Corpus, open_mixture
from megagpt.files import write_whole
from megagpt.mesh import mesh_of
from megagpt.parallel import ranks
from megagpt.verify.layouts import parse
from megagpt.verify.task import ROWS, rows
from tests.checkpoint.test_layouts import run_on
from tests.heal.test_runs import final_weights
from tests.ranks import on_ranks
from tests.test_train import fit, losses, records, run_of

pytestmark = pytest.mark.slow

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "drills_checkpoint.json"
KILLS, STEPS = 20, 80
LAYOUTS = {
    "2x2x2, ZeRO 1": Parallel(data=2, pipeline=2, tensor=2, zero_stage=1),
    "4x1x1, ZeRO 3": Parallel(data=4, zero_stage=3),
}


PLACES = (
    "1x1x1/z0 fp32", "2x1x1/z2 fp32", "4x1x1/z3 fp32", "8x1x1/z2 fp32", "2x1x2/z3 fp32", "1x1x4/z0 fp32",
    "1x4x2/z1 fp32", "2x2x2/z1/a2 fp32", "2x1x1/z1 bf16", "1x2x2/z1/a2 bf16", "2x1x4/z3 bf16", "2x1x1/z1 fp16",
    "4x1x1/z2 fp16",
)  # fmt: skip
"""Layouts that save, and load what each of the others has saved."""


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


class Silent:
    """A journal that tells nothing."""

    def __getattr__(self, _name: str) -> Any:
        return lambda *_, **__: None


def run_at(place: str, corpora: dict[str, Path]) -> Run:
    layout, precision = place.split()
    run = run_on(layout)
    train = dataclasses.replace(run.train, precision=precision)
    return dataclasses.replace(run, train=train, data=Data(mixture={str(corpora["prose"]): 1}))


def save_first(run: Run, corpora: list[Corpus], out: Path) -> None:
    """Train one step, and save it."""
    from megagpt.checkpoint.saver import Saver
    from megagpt.parallel.engine import Engine

    mesh = mesh_of(run.parallel, ranks.rank())
    engine, journal = Engine(run, mesh), Silent()
    share = ROWS // mesh.data
    starts = range(mesh.data_rank * share, (mesh.data_rank + 1) * share, run.train.micro_batch)
    batches = [rows(run, 0, start, run.train.micro_batch) for start in starts]
    engine.train_batch(batches if mesh.reads_data else [], lr=run.optim.lr, count=len(batches))
    saver = Saver(run, out, engine)
    progress = saver.resume(corpora, journal)  # type: ignore[arg-type]
    progress.step, progress.cursor = 1, progress.cursor.advanced(ROWS)
    saver.save(progress, journal)  # type: ignore[arg-type]


def load_all(run: Run, corpora: list[Corpus], outs: list[Path]) -> None:
    """Go on from each of these runs, and save each again as it was loaded."""
    from megagpt.checkpoint.saver import Saver
    from megagpt.parallel.engine import Engine

    engine, journal = Engine(run, mesh_of(run.parallel, ranks.rank())), Silent()
    for out in outs:
        saver = Saver(run, out, engine)
        saver.save(saver.resume(corpora, journal), journal)  # type: ignore[arg-type]


def by_size(places: Iterable[str]) -> dict[int, list[str]]:
    """Number of ranks -> the layouts that have so many."""
    found: dict[int, list[str]] = {}
    for place in places:
        found.setdefault(parse(place.split()[0]).ranks(), []).append(place)
    return found


def differs(source: Path, again: Path, *, scale: bool) -> list[str]:
    """What of a state is not bit for bit the same after it was loaded and saved again."""
    before, _ = newest_valid(folder_at(source / "checkpoints"))
    after, _ = newest_valid(folder_at(again / "checkpoints"))
    assert before is not None
    assert after is not None
    assert (before.commit.generation, after.commit.generation) == (1, 2)
    read = reader_of(after)
    found = [
        f"{kind} of {name}"
        for kind, name, value in whole_tensors(before)
        if not torch.equal(value.view(torch.int32), read(kind, name).view(torch.int32))
    ]
    counters = [manifest.header["counters"] for manifest in (before, after)]
    found += [] if counters[0]["optimizer_steps"] == counters[1]["optimizer_steps"] == 1 else ["steps of AdamW"]
    found += ["loss scale"] if scale and counters[0]["loss_scaler"] != counters[1]["loss_scaler"] else []
    found += [key for key in ("step", "cursor", "checksums") if before.header[key] != after.header[key]]
    return found


def test_what_any_layout_saves_any_other_loads_bit_for_bit(corpora, tmp_path):
    began = time.monotonic()
    runs = {place: run_at(place, corpora) for place in PLACES}
    mixture = open_mixture(runs[PLACES[0]].data.mixture, runs[PLACES[0]].data)
    outs = {place: tmp_path / place.replace("/", " ") for place in PLACES}
    for world, places in by_size(PLACES).items():

        def save(world: int = world, places: list[str] = places) -> None:
            ranks.join(world=world)
            for place in places:
                save_first(runs[place], mixture, outs[place])

        on_ranks(save, world, tmp_path)
    pairs: list[str] = []
    for world, places in by_size(PLACES).items():
        targets = {
            place: [tmp_path / "again" / place.replace("/", " ") / out.name for out in outs.values()]
            for place in places
        }
        for copies in targets.values():
            for out, copy in zip(outs.values(), copies, strict=True):
                shutil.copytree(out, copy)

        def load(world: int = world, targets: dict[str, list[Path]] = targets) -> None:
            ranks.join(world=world)
            for place, copies in targets.items():
                load_all(runs[place], mixture, copies)

        on_ranks(load, world, tmp_path)
        for place, copies in targets.items():
            for source, copy in zip(PLACES, copies, strict=True):
                both = source.endswith("fp16") and place.endswith("fp16")
                assert differs(outs[source], copy, scale=both) == [], f"{source} loaded on {place}"
                pairs.append(f"{source} -> {place}")
        shutil.rmtree(tmp_path / "again")
    assert len(set(pairs)) == len(PLACES) ** 2
    record(
        "pairs of layouts",
        {
            "layouts": PLACES,
            "ordered_pairs": len(pairs),
            "bitwise_equal": len(pairs),
            "each_load_proven_against_the_manifest": True,
            "seconds": round(time.monotonic() - began),
        },
    )
