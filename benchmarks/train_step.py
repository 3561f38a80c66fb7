"""Tokens a second of a training step: the same GPT-2 in megagpt, plain PyTorch, Hugging Face's Trainer and LitGPT.

6 layers, 384 wide, 6 heads, context 256, vocabulary 50,257 (GPT-2's own; the head is two thirds of the work), fp32,
AdamW, clipped to norm 1.0, 8 sequences a step on all cores. Rounds alternate between the systems, A B C D A B C D, and
each ratio is the median over rounds of megagpt's speed over the peer's in the same round: a machine that slows down
slows all of them. Peers are installed into environments of their own, once, under --cache.

    python benchmarks/train_step.py [--quick] [--rounds 9] [--out benchmarks/results/train_step.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from _environments import python_with
from _train_task import Task

HERE = Path(__file__).parent
CACHE = Path.home() / ".cache" / "megagpt" / "benchmarks"


@dataclass(frozen=True, kw_only=True)
class System:
    """One way to train the model. `requirements` None: it runs in this environment."""

    name: str
    script: str
    requirements: tuple[str, ...] | None = None
    differs: str = ""


SYSTEMS = (
    System(name="megagpt", script="_train_megagpt.py"),
    System(name="plain PyTorch", script="_train_pytorch.py"),
    System(
        name="Hugging Face Trainer",
        script="_train_transformers.py",
        requirements=("torch", "transformers", "accelerate"),
        differs="the labels are shifted inside, so 255 of 256 tokens have a target",
    ),
    System(
        name="LitGPT",
        script="_train_litgpt.py",
        requirements=("torch", "litgpt"),
        differs="rotary positions on a quarter of each head instead of learned ones; LitGPT's model in the plain loop",
    ),
)


class Worker:
    """One system's process, from its start to the end of the benchmark."""

    def __init__(self, system: System, task: Task, *, cache: Path, log: IO[str]) -> None:
        python = Path(sys.executable) if system.requirements is None else python_with(system.requirements, cache)
        self.system, self.log = system, log
        self.process = subprocess.Popen(
            [str(python), str(HERE / system.script), json.dumps(asdict(task))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(task.threads), "CUDA_VISIBLE_DEVICES": ""},
        )
        self.ready = self.hear()
        self.speeds: list[float] = []
        self.loss = float("nan")

    def hear(self) -> dict[str, Any]:
        """The next message; raises RuntimeError with the end of its log if the process has died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"{self.system.name} died:\n{self.log.read()[-2000:]}")
        return json.loads(line)

    def round(self, tokens: int) -> None:
        """Let it train for one round of `tokens` tokens."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self.hear()
        self.speeds.append(tokens / answer["seconds"])
        self.loss = answer["loss"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def measure(systems: list[System], task: Task, *, rounds: int, cache: Path) -> list[dict[str, Any]]:
    """Results of each system, the first of which the others are compared with."""
    with ExitStack() as stack:
        workers: list[Worker] = []
        for system in systems:
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            workers.append(Worker(system, task, cache=cache, log=log))
            stack.callback(workers[-1].close)
        for _ in range(rounds):
            for worker in workers:
                worker.round(task.batch * task.context * task.steps)
    first = workers[0].speeds
    return [
        {
            "system": worker.system.name,
            "tokens_per_s": round(statistics.median(worker.speeds), 1),
            "rounds": [round(speed, 1) for speed in worker.speeds],
            "megagpt_over_it": round(statistics.median(a / b for a, b in zip(first, worker.speeds, strict=True)), 3),
            "last_loss": round(worker.loss, 4),
            "differs": worker.system.differs,
            **worker.ready,
        }
        for worker in workers
    ]


def table(results: list[dict[str, Any]]) -> str:
    """The results as text."""
    lines = [f"{'':22}{'tokens/s':>10}{'slowest':>10}{'fastest':>10}{'megagpt':>10}{'parameters':>13}{'loss':>9}"]
    lines += [
        f"{one['system']:22}{one['tokens_per_s']:>10,.0f}{min(one['rounds']):>10,.0f}{max(one['rounds']):>10,.0f}"
        f"{one['megagpt_over_it']:>9.2f}x{one['parameters']:>13,}{one['last_loss']:>9.3f}"
        for one in results
    ]
    return "\n".join(lines)


def hardware() -> str:
    """The CPU's name, the cores in use, and the memory."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, no GPU"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds: does everything run?")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each system")
    parser.add_argument("--only", nargs="+", choices=[system.name for system in SYSTEMS], help="peers to run")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the peers' environments are kept")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    options = parser.parse_args()
    task = Task(threads=options.threads)
    if options.quick:
        task = replace(task, layers=2, width=64, heads=2, context=64, vocabulary=512)
    systems = [system for system in SYSTEMS[1:] if not options.only or system.name in options.only]
    rounds = 2 if options.quick else options.rounds
    results = measure([SYSTEMS[0], *systems], task, rounds=rounds, cache=options.cache)
    print(table(results))
    if options.out:
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "hardware": hardware(),
            "python": platform.python_version(),
            "task": asdict(task),
            "results": results,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
