"""What healing and guards cost: the same run with and without them, in alternating rounds of one process tree.

    off      no watchdog thread, no judgement, no comparison of ranks, no guard
    on       the defaults, with spikes watched as well: what looks at every step
    guard    check_agreement alone, timed by itself: what happens every train.guard_every steps
    parts    each thing that "on" adds, timed by itself: their sum is known better than a small difference of two large
             numbers

Every round trains the same steps of a small model on 2 ranks, in an order that turns. A step counts twice: by the wall
clock, the median, which asks for a quiet machine; and by the processor time of the first rank with all its threads,
the mean, which a busy machine disturbs less.
    python benchmarks/healing.py [--rounds 8] [--write]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megagpt.config import Checkpoint, Data, Heal, Model, Optim, Parallel, Report, Run, Train
from megagpt.data.build import Recipe, build
from megagpt.parallel import ranks

RESULTS = Path(__file__).parent / "results" / "healing.json"
STEPS = 50
MODEL = Model(layers=4, width=256, heads=4, vocabulary=512, context=256)


def run_of(corpus: Path, heal: Heal) -> Run:
    train = Train(tokens=STEPS * 4 * 256, global_batch=4, micro_batch=2, precision="fp32", eval_every=0, guard_every=0)
    return Run(
        model=MODEL,
        data=Data(mixture={str(corpus): 1}),
        train=train,
        parallel=Parallel(data=2),
        optim=Optim(lr=1e-3),
        checkpoint=Checkpoint(every=0),
        report=Report(every=10),
        heal=heal,
    )


def trained(run: Run, out: Path, *, healing: bool) -> tuple[float, float]:
    """Seconds of a step, without the first ten: by the wall clock, the median, and of the processor, the mean."""

    def work() -> None:
        from megagpt import train

        if not healing:
            train.watched = unwatched  # type: ignore[assignment]
            train.Healer.examine = lambda *_: None  # type: ignore[method-assign,assignment]
            train.Healer.compare_ranks = lambda *_: None  # type: ignore[method-assign,assignment]
        moments: list[tuple[float, float]] = []
        told = train.Journal.step

        def timed(self: Any, *arguments: Any, **values: Any) -> None:
            told(self, *arguments, **values)
            moments.append((time.perf_counter(), time.process_time()))

        train.Journal.step = timed  # type: ignore[method-assign]
        with (out / "log").open("w") as log, contextlib.redirect_stdout(log):
            train.fit(run, out)
        if ranks.rank() == 0:
            (out / "moments").write_text(json.dumps(moments))

    out.mkdir(parents=True)
    if ranks.run_local(work, 2):
        sys.exit("a rank died")
    moments = json.loads((out / "moments").read_text())[10:]
    walls = [after - before for (before, _), (after, _) in itertools.pairwise(moments)]
    return statistics.median(walls), (moments[-1][1] - moments[0][1]) / len(walls)


@contextlib.contextmanager
def unwatched(*_: Any) -> Any:
    yield argparse.Namespace(ending="")


def parts_of(run: Run, folder: Path) -> dict[str, float]:
    """Median seconds, on the first of 2 ranks, of each thing that healing and guards do."""

    def work() -> None:
        from megagpt.heal.clock import Clock
        from megagpt.heal.health import Health
        from megagpt.heal.stragglers import OwnTimes
        from megagpt.heal.watchdog import Watchdog
        from megagpt.mesh import mesh_of
        from megagpt.parallel.engine import Engine, Step

        ranks.join(world=2)
        mesh = mesh_of(run.parallel, ranks.rank())
        engine, clock, times = Engine(run, mesh), Clock(time.time()), OwnTimes()
        losses = [3.0 + 0.001 * (number % 7) for number in range(run.heal.spike_window)]
        health = Health(run.heal, {"losses": losses}, fp16=False)
        values = {"grad_norm": 1.0, "tokens": 1, "skipped": False, "seen_by": None, "loss_scale": 1.0}
        done = Step(loss=3.001, next_loss_scale=1.0, **values)
        watchdog = Watchdog(run.heal, clock, folder, rank=mesh.rank, world=2, tell=lambda *_: None)
        found = {
            "judge": _median(lambda: health.judge(done, 200)),
            "enter": _median(lambda: clock.enter("step", 1)),
            "own_time": _median(engine.forward_seconds),
            "beat": _median(lambda: watchdog._beat("")),
            "compare": _median(lambda: times.compare(mesh, 1.3)),
            "guard": _median(lambda: engine.check_agreement([]), 50),
        }
        if mesh.rank == 0:
            (folder / "parts").write_text(json.dumps(found))

    if ranks.run_local(work, 2):
        sys.exit("a rank died")
    return json.loads((folder / "parts").read_text())


def _median(call: Callable[[], Any], times: int = 300) -> float:
    found = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def corpus_in(folder: Path) -> Path:
    raw = folder / "text.jsonl"
    words = [f"word{number * number % 97}" for number in range(400)]
    raw.write_text("".join(json.dumps({"text": " ".join(words[at % 50 :])}) + "\n" for at in range(800)))
    build(
        [str(raw)],
        folder / "corpus",
        tokenizer=None,
        recipe=Recipe(heldout=0.05, tasks=1, vocabulary=512),
        processes=1,
    )
    return folder / "corpus"


def measure(rounds: int) -> dict[str, Any]:
    heal = Heal(spike_score=1e9)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = run_of(corpus_in(folder), heal)
        found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for number in range(rounds):
            for healing in (True, False) if number % 2 else (False, True):
                found[healing].append(trained(run, folder / f"{number}-{healing}", healing=healing))
        parts = parts_of(run, folder)
    pairs = list(zip(found[True], found[False], strict=True))
    walls = sorted(on[0] / off[0] - 1 for on, off in pairs)
    processor = sorted(on[1] / off[1] - 1 for on, off in pairs)
    step, every = statistics.median(wall for wall, _ in found[False]), Train().guard_every
    a_step = parts["judge"] + 3 * parts["enter"] + parts["own_time"] + parts["compare"] / run.report.every
    return {
        "step_seconds": step,
        "overhead_by_wall_clock": statistics.median(walls),
        "overhead_by_wall_clock_by_round": walls,
        "overhead_by_processor_time": statistics.median(processor),
        "overhead_by_processor_time_by_round": processor,
        "parts_seconds": parts,
        "overhead_of_the_parts": a_step / step + parts["beat"] / 1.0 + parts["guard"] / every / step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    import torch

    result = {
        "what": "median training step of 2 ranks with and without healing, alternating",
        "model": dataclasses.asdict(MODEL),
        "rounds": options.rounds,
        **measure(options.rounds),
        "load_average": os.getloadavg()[0],
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": "python benchmarks/healing.py " + " ".join(sys.argv[1:]),
    }
    print(json.dumps(result, indent=1))
    if options.write:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
