"""A real SLURM cluster on this machine, thrown away after use: to rehearse on, and to test with.

    with cluster(nodes=4) as slurm:
        slurm.run("sbatch", "job.sh")
        slurm.crash("n2")

Needs Linux, root (or the capabilities that namespaces ask for) and Debian's slurm-wlm, munge and iproute2. Nothing on
the machine is changed, and two clusters do not meet: everything lives in namespaces of its own.

    the lab      a pid, network, mount and uts namespace: local_slurm_lab.py as first process, slurmctld, a bridge
    a node       the same again inside the lab, with its own slurmd, host name, address and pretended GPUs

The first process of the lab ends when its input does, which is when whoever made the cluster is gone, however it went;
the kernel then ends every process of the lab and takes the network away. No list of process ids can go stale.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import megagpt
from megagpt.launch.local_slurm_conf import Shape

PROGRAMS = ("slurmctld", "slurmd", "munged", "ip", "nsenter", "unshare", "sbatch")


def missing() -> str:
    """Why no cluster can be made here; empty if one can."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None and not Path("/usr/sbin", name).exists()]
    if lacking:
        return f"{', '.join(lacking)} not installed (Debian: slurm-wlm munge iproute2)"
    tried = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount", "--uts", "true"], capture_output=True)  # noqa: S607
    return "" if tried.returncode == 0 else f"no namespaces: {tried.stderr.decode().strip()}"


STANDARD = Shape()
RECOVERY_SECONDS, PATIENCE_SECONDS = 60.0, 300.0


@dataclass
class Cluster:
    """A cluster that is up. Nodes are called n1, n2, ..."""

    shape: Shape
    folder: Path
    """Its configuration and logs; removed with it."""
    _lab: subprocess.Popen[str] = field(repr=False)
    _inside: int = 0
    patience_seconds: float = PATIENCE_SECONDS
    """How long a rehearsal waits for what must come."""

    def run(self, *command: str, check: bool = True, **values: Any) -> str:
        """Run a command where SLURM's commands find this cluster, and return what it printed."""
        done = subprocess.run(self.command(*command), capture_output=True, text=True, **{"env": self.env(), **values})  # noqa: S603
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def command(self, *command: str) -> list[str]:
        """The argument list that runs a command inside the lab."""
        return ["nsenter", f"--target={self._inside}", "--mount", "--net", "--pid", "--uts", "--", *command]

    def env(self) -> dict[str, str]:
        """The environment of this process, for a command inside the lab."""
        outer = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        return {**outer, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def crash(self, node: str) -> None:
        """Power loss: the node falls silent, and all its processes end."""
        self._tell("crash", node)

    def boot(self, node: str) -> None:
        """Start a node that crashed."""
        self._tell("boot", node)

    def pull_cable(self, node: str) -> None:
        """Its processes stay, and nobody hears of them."""
        self._tell("cable", node, "down")

    def plug_in(self, node: str) -> None:
        self._tell("cable", node, "up")

    def repair(self, node: str) -> None:
        """Undo whatever was done to the node."""
        self._tell("repair", node)

    def slow_wire(self, node: str, rate: str) -> None:
        """What comes to the node comes at no more than `rate`, as tc writes it: 50mbit; empty: as fast as can be."""
        self._tell("slow", node, rate)

    def signal_ranks(self, job: str, node: str, number: int) -> int:
        """Send a signal to the ranks of `job` on the node; how many there were."""
        return int(self._tell("signal", node, job, str(int(number))))

    @property
    def disk(self) -> Path:
        """A folder that all nodes share, on a file system of its own, as it is called inside."""
        return self.folder / "disk"

    def resize_disk(self, *, full: bool) -> None:
        """Make the disk as small as what is on it, or large again."""
        self._tell("disk", "full" if full else "large")

    def outside(self, path: Path) -> Path:
        """What a path inside is called for this process."""
        return Path(f"/proc/{self._inside}/root") / path.relative_to("/")

    def recover(self) -> None:
        """Undo whatever was done to nodes, wires and disk, and wait until all nodes are back in service."""
        for number in range(1, self.shape.nodes + 1):
            self.repair(f"n{number}")
        self.resize_disk(full=False)
        self.run("scontrol", "reconfigure")  # 22.05 miscounts GPUs after a job that lost a node was requeued
        deadline, states = time.monotonic() + RECOVERY_SECONDS, list[str]()
        while time.monotonic() < deadline:
            states = self.run("sinfo", "--noheader", "--Node", "--format=%t", "--partition=urgent").split()
            if states.count("idle") == self.shape.nodes:
                return
            time.sleep(0.2)
        raise TimeoutError(f"the nodes did not come back: {states}")

    def _tell(self, *words: str) -> str:
        assert self._lab.stdin is not None
        assert self._lab.stdout is not None
        self._lab.stdin.write(json.dumps(words) + "\n")
        self._lab.stdin.flush()
        answer = self._lab.stdout.readline()
        if not answer:
            raise RuntimeError(f"the cluster has ended; its logs were in {self.folder}")
        return answer.strip()


@contextlib.contextmanager
def cluster(shape: Shape = STANDARD) -> Iterator[Cluster]:
    """Bring a cluster up, and take it down whatever happens. Raises RuntimeError if it does not come up."""
    folder = Path(tempfile.mkdtemp(prefix="megagpt-slurm-"))
    command = [sys.executable, "-m", "megagpt.launch.local_slurm_lab", str(folder), json.dumps(shape.__dict__)]
    source = os.pathsep.join([str(Path(megagpt.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    namespaces = ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc"]
    lab = subprocess.Popen(  # noqa: S603
        [*namespaces, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": source.rstrip(os.pathsep)},
    )
    try:
        found = Cluster(shape, folder, lab)
        assert lab.stdout is not None
        if lab.stdout.readline().strip() != "up":
            raise RuntimeError(_last_words(folder))
        children = Path(f"/proc/{lab.pid}/task/{lab.pid}/children").read_text().split()
        found._inside = int(children[0])
        yield found
    finally:
        with contextlib.suppress(BrokenPipeError):
            lab.communicate()
        shutil.rmtree(folder, ignore_errors=True)


def _last_words(folder: Path) -> str:
    texts = [f"{path.name}: {path.read_text()[-500:]}" for path in sorted((folder / "log").glob("*"))]
    return "the SLURM cluster did not come up.\n" + "\n".join(texts)
