"""What is refused before anything is submitted, with a remedy: pure functions of what SLURM and mounts say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megagpt.errors import UserError, did_you_mean
from megagpt.launch.spec import Cluster, Launch

LOCAL_FILESYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay", "vfat"})


@dataclass(frozen=True)
class Partition:
    """A line of `sinfo --noheader --format=%P|%l|%D`; `seconds` is infinite without a limit."""

    name: str
    default: bool
    seconds: float
    nodes: int


def partitions(sinfo: str) -> list[Partition]:
    """The partitions of sinfo's lines; nodes of several lines add up."""
    found: dict[str, Partition] = {}
    for line in sinfo.splitlines():
        name, limit, nodes = line.strip().split("|")
        plain = name.rstrip("*")
        before = found[plain].nodes if plain in found else 0
        found[plain] = Partition(plain, name.endswith("*"), time_seconds(limit), before + int(nodes))
    return list(found.values())


def time_seconds(text: str) -> float:
    """SLURM's times: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    Raises UserError for anything else.
    """
    if text.lower() in ("infinite", "unlimited"):
        return float("inf")
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", text):
        raise UserError(
            f"time = {text} is no time limit.", "Write hours:minutes:seconds, or days-hours: 24:00:00, 2-00."
        )
    days, _, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return int(days or 0) * 86_400 + hours * 3600 + minutes * 60 + seconds


def check_partition(launch: Launch, known: Sequence[Partition]) -> None:
    """Raises UserError for an unknown partition, a time over its limit, or more nodes than it has."""
    cluster, names = launch.cluster, [partition.name for partition in known]
    if cluster.partition and cluster.partition not in names:
        raise UserError(
            f"partition = {cluster.partition} is not one of this cluster's.{did_you_mean(cluster.partition, names)}",
            f"Partitions: {', '.join(names)}.",
        )
    chosen = next(
        (one for one in known if (one.name == cluster.partition if cluster.partition else one.default)), None
    )
    if chosen is None:
        raise UserError("this cluster has no default partition.", f"Set partition to one of {', '.join(names)}.")
    if cluster.time and time_seconds(cluster.time) > chosen.seconds:
        raise UserError(
            f"time = {cluster.time} is over partition {chosen.name}'s limit of {_written(chosen.seconds)}.",
            f'Set time = "{_written(chosen.seconds)}": the run is saved before the limit and requeued.',
        )
    if cluster.time and time_seconds(cluster.time) <= cluster.signal_seconds:
        raise UserError(
            f"time = {cluster.time} is not longer than signal_seconds = {cluster.signal_seconds}: the run would be "
            "told to stop as it starts.",
            "Raise time, or lower signal_seconds.",
        )
    if launch.nodes_with_spares() > chosen.nodes:
        raise UserError(
            f"{launch.nodes_with_spares()} nodes are more than the {chosen.nodes} of partition {chosen.name}.",
            f"Use at most --nodes {chosen.nodes - cluster.spares}"
            + (f" with {cluster.spares} spares." if cluster.spares else "."),
        )


def check_account(cluster: Cluster, *, enforced: bool, default: str) -> None:
    """`enforced`: jobs need an account; `default`: the user's own. Raises UserError if there is none."""
    if enforced and not cluster.account and not default:
        raise UserError(
            "this cluster charges every job to an account, and the profile sets none.",
            "Set account = \"NAME\"; 'sacctmgr show associations user=$USER format=account' lists yours.",
        )


def check_image(cluster: Cluster) -> None:
    """Raises UserError if the container's image is a file that is not there."""
    is_file = cluster.image.startswith(("/", "./", "../", "~")) or cluster.image.endswith((".sif", ".sqsh"))
    if cluster.container != "none" and is_file and not Path(cluster.image).is_file():
        make = (
            "enroot import docker://ADDRESS"
            if cluster.container == "pyxis"
            else "apptainer build FILE.sif docker://ADDRESS"
        )
        raise UserError(f"image = {cluster.image} is not there.", f"Make it with '{make}', or correct the profile.")


def check_shared(launch: Launch, mounts: str) -> None:
    """Raises UserError if several nodes would each have an output folder of their own; `mounts` is /proc/mounts."""
    inside = any(Path(launch.out).is_relative_to(folder) for folder in launch.cluster.shared)
    if launch.nodes_with_spares() == 1 or inside:
        return
    kind = filesystem(Path(launch.out), mounts)
    if launch.cluster.shared or kind in LOCAL_FILESYSTEMS:
        where = (
            f"is on {kind}, this machine's own disk" if kind in LOCAL_FILESYSTEMS else "is outside the shared folders"
        )
        raise UserError(
            f"the run's folder {launch.out} {where}: {launch.nodes_with_spares()} nodes would not see the same files.",
            "Choose another --out"
            + (
                f" under {' or '.join(launch.cluster.shared)}."
                if launch.cluster.shared
                else ', or add shared = ["FOLDER"] to the profile.'
            ),
        )


def filesystem(path: Path, mounts: str) -> str:
    """The type of the file system that `path` is, or will be, on."""
    best, kind = -1, ""
    for line in mounts.splitlines():
        _, point, found, *_ = line.split(" ")
        folder = point.replace("\\040", " ")
        if path.is_relative_to(folder) and len(folder) >= best:
            best, kind = len(folder), found
    return kind


def _written(seconds: float) -> str:
    if seconds == float("inf"):
        return "UNLIMITED"
    days, rest = divmod(int(seconds), 86_400)
    return (f"{days}-" if days else "") + f"{rest // 3600:02}:{rest % 3600 // 60:02}:{rest % 60:02}"
