"""One rehearsed run: submitted to a cluster, followed by what it leaves on disk, and measured."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megagpt import outcome
from megagpt.config import Run, to_toml
from megagpt.launch.slurm import batch_script
from megagpt.launch.spec import Launch, to_json
from megagpt.outcome import Outcome

LOOK_SECONDS = 0.05
STATE_SECONDS = 2.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY")


class Slurm(Protocol):
    """What a rehearsal needs of a cluster."""

    def run(self, *command: str, check: bool = True) -> str:
        """What a command of SLURM's prints."""
        ...

    def outside(self, path: Path) -> Path:
        """What a path on the nodes is called for this process."""
        ...

    def signal_ranks(self, job: str, node: str, number: int) -> int:
        """Send a signal to the ranks of `job` on the node; how many there were."""
        ...

    def recover(self) -> None:
        """Have all nodes in service again, whatever a scene did to them."""
        ...

    @property
    def patience_seconds(self) -> float:
        """How long a rehearsal waits for what must come, the queue included."""
        ...


@dataclass
class Rehearsal:
    """A run that was submitted."""

    slurm: Slurm
    launch: Launch
    jobs: list[str] = field(default_factory=list)

    @property
    def out(self) -> Path:
        """The run's folder, as this process calls it."""
        return self.slurm.outside(Path(self.launch.out))

    def steps(self) -> list[dict[str, Any]]:
        """The records of the steps, without a torn last line."""
        path = self.out / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def done(self) -> int:
        """How many steps are done: each has one line, once."""
        path = self.out / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def losses(self) -> list[tuple[int, float, float]]:
        return [(record["step"], record["loss"], record["grad_norm"]) for record in self.steps()]

    def attempts(self) -> list[Path]:
        return sorted(self.out.glob("attempts/[0-9]*"))

    def start(self, attempt: Path) -> dict[str, Any]:
        """What the supervisor wrote down as the attempt began."""
        return json.loads((attempt / "start.json").read_text())

    def outcomes(self) -> list[Outcome]:
        found = (outcome.read(attempt / "outcome.json") for attempt in self.attempts())
        return [ended for ended in found if ended is not None]

    def nodes(self) -> list[str]:
        """Where the ranks of the newest attempt that has started any are, or were, in the order of ranks."""
        return max(self.out.glob("attempts/[0-9]*/nodes")).read_text().split()

    def state(self) -> str:
        text = self.slurm.run("scontrol", "--oneliner", "show", "job", self.jobs[-1])
        return dict(part.split("=", 1) for part in text.split() if "=" in part).get("JobState", "")

    def wait(self, until: Callable[[], Any], what: str) -> float:
        """Wait until something is so; the moment it was. Raises TimeoutError if it never is."""
        began = asked = time.monotonic()
        while not until():
            if time.monotonic() - asked > STATE_SECONDS:
                asked = time.monotonic()
                if self.state() in ENDED and not until():
                    raise TimeoutError(f"the job has ended, and {what} did not come")
            if asked - began > self.slurm.patience_seconds:
                raise TimeoutError(f"{what} did not come in {self.slurm.patience_seconds:.0f} s")
            time.sleep(LOOK_SECONDS)
        return time.time()

    def wait_for_step(self, step: int) -> float:
        return self.wait(lambda: self.done() >= step, f"step {step}")

    def finish(self) -> str:
        """Wait for the end of the run, in whichever job it ends; the last job's state."""
        until = time.monotonic() + self.slurm.patience_seconds
        while time.monotonic() < until:
            newest = self.slurm.run("squeue", "--noheader", "--format=%i", f"--name={self.launch.name}")
            self.jobs += [job for job in newest.split() if job not in self.jobs]
            if not newest and self.state() in ENDED:
                return self.state()
            time.sleep(STATE_SECONDS / 4)
        raise TimeoutError(f"the run did not end in {self.slurm.patience_seconds:.0f} s")


def submit(slurm: Slurm, launch: Launch, run: Run) -> Rehearsal:
    """Write the launch and submit it."""
    folder = slurm.outside(launch.launch_folder())
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text(to_toml(run))
    (folder / "launch.json").write_text(to_json(launch))
    (folder / "job.sh").write_text(batch_script(launch, layout="as in the preset"))
    found = Rehearsal(slurm, launch)
    found.jobs.append(slurm.run("sbatch", "--parsable", str(launch.launch_folder() / "job.sh")).split(";")[0])
    return found


def launch_of(run: Run, out: Path, *, base: Launch) -> Launch:
    """The launch of one scene in its own folder."""
    settings = out / "launch" / "run.toml"
    words = (base.command[0], "-m", "megagpt.cli", "train", str(settings), "--out", str(out))
    world = run.parallel.world_size()
    nodes = min(2, world)
    return dataclasses.replace(
        base,
        name=f"drill-{out.name}-{os.getpid()}",
        out=str(out),
        command=words,
        nodes=nodes,
        gpus_per_node=world // nodes,
    )
