"""What healing and guards cost: one run in which they are switched off and on again every few steps.

    on       the defaults, with spikes watched as well: watchdog, judgement of every step, comparison of ranks
    off      none of them
    parts    each thing that "on" adds, and the guard of train.guard_every, timed by itself: their sum is known better
             than a small difference of two large numbers

Blocks of steps alternate (on, off, off, on, ...), so each is compared with its neighbour of the same minute, on the
same processes and memory. A step counts twice: by the wall clock, which asks for a quiet machine; and by the processor
time of the first rank with all its threads, which a busy machine disturbs less. The interval holds the median
difference of all such pairs with 95% confidence (order statistics: no distribution is assumed).
    python benchmarks/healing.py [--steps 600] [--write]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
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
BLOCK = 5
WARM_UP = 20
MODEL = Model(layers=4, width=256, heads=4, vocabulary=512, context=256)


def run_of(corpus: Path, heal: Heal, steps: int) -> Run:
    train = Train(tokens=steps * 4 * 256, global_batch=4, micro_batch=2, precision="fp32", eval_every=0, guard_every=0)
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


def heals(step: int) -> bool:
    """Whether healing is on in a step, from 1: by blocks, on, off, off, on, and again."""
    return (max(0, step - 1 - WARM_UP) // BLOCK + 1) // 2 % 2 == 0


def trained(run: Run, out: Path) -> list[tuple[float, float]]:
    """The ends of all steps: by the wall clock, and in the first rank's processor time."""

    def work() -> None:
        from megagpt import train
        from megagpt.heal.watchdog import Watchdog

        reached, moments = [0], []
        told = train.Journal.step

        def timed(self: Any, *arguments: Any, **values: Any) -> None:
            told(self, *arguments, **values)
            reached[0] = values["step"]
            moments.append((time.perf_counter(), time.process_time()))

        def switched(kind: Any, name: str) -> None:
            real = getattr(kind, name)
            setattr(kind, name, lambda *words, **more: real(*words, **more) if heals(reached[0] + 1) else None)

        train.Journal.step = timed  # type: ignore[method-assign]
        for kind, name in ((train.Healer, "examine"), (train.Healer, "compare_ranks"), (Watchdog, "_beat")):
            switched(kind, name)
        with (out / "log").open("w") as log, contextlib.redirect_stdout(log):
            train.fit(run, out)
        if ranks.rank() == 0:
            (out / "moments").write_text(json.dumps(moments))

    out.mkdir(parents=True)
    if ranks.run_local(work, 2):
        sys.exit("a rank died")
    return json.loads((out / "moments").read_text())


def differences(moments: list[tuple[float, float]], clock: int) -> dict[str, Any]:
    """What healing adds to a step, as a share of it: the median over neighbouring blocks, and where it lies."""
    times = [after[clock] - before[clock] for before, after in itertools.pairwise(moments)]  # of step 2, 3, ...
    starts = range(WARM_UP - 1, len(times) - BLOCK + 1, BLOCK)
    blocks = [(heals(start + 2), statistics.mean(times[start : start + BLOCK])) for start in starts]
    pairs = [dict(pair) for pair in zip(blocks[::2], blocks[1::2], strict=False)]
    shares = sorted(pair[True] / pair[False] - 1 for pair in pairs)
    reach = round(0.98 * math.sqrt(len(shares)))  # 1.96 standard deviations of a binomial of 1/2
    middle = len(shares) // 2
    return {
        "median": statistics.median(shares),
        "interval_95": [shares[max(0, middle - reach)], shares[min(len(shares) - 1, middle + reach)]],
        "pairs": len(shares),
        "step_seconds_without": statistics.median(time for on, time in blocks if not on),
    }


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


def measure(steps: int) -> dict[str, Any]:
    heal = Heal(spike_score=1e9)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = run_of(corpus_in(folder), heal, steps)
        moments = trained(run, folder / "run")
        parts = parts_of(run, folder)
    wall, every = differences(moments, 0), Train().guard_every
    step = wall["step_seconds_without"]
    a_step = parts["judge"] + 3 * parts["enter"] + parts["own_time"] + parts["compare"] / run.report.every
    return {
        "overhead_by_wall_clock": wall,
        "overhead_by_processor_time": differences(moments, 1),
        "parts_seconds": parts,
        "overhead_of_the_parts": a_step / step + parts["beat"] / 1.0 + parts["guard"] / every / step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    import torch

    result = {
        "what": "training steps of 2 ranks with and without healing, in alternating blocks of one run",
        "model": dataclasses.asdict(MODEL),
        "steps": options.steps,
        **measure(options.steps),
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
