"""What is launched, and where: frozen dataclasses, written as `<out>/launch/launch.json` beside the run.

`megagpt launch` makes a `Launch`, the renderers turn it into text, and `supervise.py` reads it back on the batch node.
Hence the standard library alone: nothing here may need what only a container has.

Environment values travel in this file, never on a command line: commas, quotes, spaces and newlines arrive as they
are. Secrets are here by name only; their values are inherited from whoever submits.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megagpt.settings import build

FORMAT = 1
Kind = Literal["slurm", "torchrun", "hostfile", "kubernetes", "local"]
SECRETS = (
    "WANDB_API_KEY",
    "HF_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "GOOGLE_APPLICATION_CREDENTIALS",
)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One cluster as its users know it: a TOML file, ~/.config/megagpt/clusters/NAME.toml or a path."""

    partition: str = ""
    """Empty: the cluster's default. So are account, qos, reservation and constraint."""
    account: str = ""
    qos: str = ""
    reservation: str = ""
    constraint: str = ""
    time: str = ""
    """Time limit, as SLURM writes it: 24:00:00 or 2-00:00:00. Empty: the partition's."""
    gpus_per_node: int = 0
    """What --gpus-per-node is where it is not given; 0: it must be."""
    gpu_type: str = ""
    """The gres type, where a cluster has several: h100."""
    gpu_memory_gib: int = 80
    """Of one GPU: what a layout is chosen by, where the user chose none."""
    cpus_per_task: int = 0
    """CPUs of one rank; 0: what the cluster gives."""
    numa: Literal["auto", "none"] = "auto"
    """auto: keep each rank on its own cores and their memory."""
    exclusive: bool = True
    """Take whole nodes."""
    spares: int = 0
    """Nodes more than the layout needs, to go on without a bad one."""
    container: Literal["none", "pyxis", "apptainer"] = "none"
    """How ranks enter their container image."""
    image: str = ""
    mounts: tuple[str, ...] = ()
    """Folders that a container sees, as HOST or HOST:INSIDE; the run's own are added."""
    modules: tuple[str, ...] = ()
    """What `module load` loads in the batch script."""
    python: str = ""
    """The interpreter that has megagpt, inside the container where there is one. Empty: the one that submits."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of every rank; any value at all."""
    secrets: tuple[str, ...] = SECRETS
    """Variables that ranks inherit from whoever submits, and that are never written anywhere."""
    network_interface: str = ""
    """Of the ranks' rendezvous and of NCCL's and gloo's sockets: ib0. Empty: they choose."""
    ports: tuple[int, int] = (20_000, 29_999)
    """The range that the rendezvous picks a random port from."""
    shared: tuple[str, ...] = ()
    """Folders that all nodes see. Empty: judged by the type of the file system."""
    signal_seconds: int = 300
    """How long before the time limit a run is told to save and stop."""
    sbatch: tuple[str, ...] = ()
    """More options for #SBATCH, whole: --mail-type=FAIL."""
    namespace: str = "default"
    """Kubernetes only, as are the two below."""
    queue: str = ""
    """Kueue's local queue. Empty: none."""
    claim: str = ""
    """The persistent volume claim that holds the run and its corpora."""
    claim_path: str = "/workspace"
    """Where the claim is mounted."""


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How often a run is started again, by cause; a settled cause (a user's mistake, a divergence) never is."""

    inside: int = 8
    """Restarts inside one allocation, all causes together."""
    requeues: int = 20
    """Times that the job goes back to the queue."""
    without_progress: int = 3
    """Attempts in a row without a new checkpoint, after which the failure counts as settled."""
    back_off_seconds: float = 5.0
    """Pause before the first restart of a transient cause; it doubles each time, up to five minutes."""
    chain: int = 0
    """Jobs submitted at once, each waiting for the one before, for clusters that do not requeue."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One run on one cluster."""

    kind: Kind
    name: str
    """Of the job."""
    out: str
    """Folder of the run, absolute."""
    folder: str
    """Where every rank starts: relative corpus folders are meant from here."""
    command: tuple[str, ...]
    """One rank: the interpreter and its arguments. The same on every rank; RANK and the like tell them apart."""
    nodes: int
    gpus_per_node: int
    """Ranks on each node, a GPU each."""
    devices: bool = True
    """Whether ranks need GPUs; without, they are CPU processes (gloo)."""
    cluster: Cluster = Cluster()
    cluster_name: str = "default"
    """Whose node ledger counts."""
    retries: Retries = Retries()
    hosts: tuple[str, ...] = ()
    """hostfile only: the nodes, in the order of their ranks, and then the spares."""
    source: str = ""
    """Folder that holds the package that submitted: the supervisor's and, without a container, the ranks'."""

    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    def nodes_with_spares(self) -> int:
        return self.nodes + self.cluster.spares

    def launch_folder(self) -> Path:
        """Holds launch.json, the script and the settings, as last submitted."""
        return Path(self.out, "launch")

    def attempt_folder(self, attempt: int) -> Path:
        """What one attempt (from 1, over all jobs) leaves: outcome files (megagpt/outcome.py) and logs."""
        return Path(self.out, "attempts", f"{attempt:04d}")

    def log(self, attempt: int, rank: int) -> Path:
        """What rank `rank` printed, both streams together."""
        return self.attempt_folder(attempt) / "logs" / f"rank-{rank}.log"

    def environment(self) -> dict[str, str]:
        """What every rank finds in its environment beside what it inherits."""
        found = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        if self.source and self.cluster.container == "none" and self.kind != "kubernetes":
            found["PYTHONPATH"] = self.source
        if self.cluster.network_interface:
            found["NCCL_SOCKET_IFNAME"] = found["GLOO_SOCKET_IFNAME"] = self.cluster.network_interface
        return {**found, **self.cluster.environment}


def to_json(launch: Launch) -> str:
    """The launch as JSON that `from_json` reads back equal."""
    return json.dumps({"format": FORMAT, **dataclasses.asdict(launch)}, indent=2) + "\n"


def from_json(text: str) -> Launch:
    """The launch of `to_json`. Raises ValueError for another format, an unknown key or a value of another type."""
    values = json.loads(text)
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise ValueError(f"not a launch of format {FORMAT}.")
    return build(Launch, values)


def read_launch(path: Path) -> Launch:
    """The launch in the file `path`. Raises ValueError if it holds none."""
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def interpreter(cluster: Cluster, kind: Kind) -> str:
    """The Python that ranks run with."""
    if cluster.python:
        return cluster.python
    inside = cluster.container != "none" or kind == "kubernetes"
    return "python3" if inside else os.path.abspath(sys.executable)  # noqa: PTH100 - a venv's link must stay one
