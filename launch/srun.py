"""The srun step of one attempt: a task a GPU, its cores beside it, its log its own. Standard library alone.

Every task sees all GPUs of its node and takes its own by LOCAL_RANK: a task that sees only one cannot reach its
neighbours' memory directly, and NCCL falls back to slower paths. The environment is inherited whole (--export=ALL):
srun cuts the values of --export=NAME=VALUE at commas.
"""

from __future__ import annotations

from collections.abc import Sequence

from megagpt.launch.spec import Cluster, Launch


def srun_command(launch: Launch, *, nodes: Sequence[str], attempt: int) -> list[str]:
    """The argument list that starts all ranks on `nodes`, as many as the layout needs, in this order of ranks."""
    if len(nodes) != launch.nodes:
        raise ValueError(f"{launch.nodes} nodes are needed, and {len(nodes)} given")
    return [
        "srun",
        f"--nodes={launch.nodes}",
        f"--ntasks={launch.world_size()}",
        f"--ntasks-per-node={launch.gpus_per_node}",
        f"--nodelist={','.join(nodes)}",
        "--distribution=block",
        *binding(launch),
        "--kill-on-bad-exit=1",
        "--export=ALL",
        f"--chdir={launch.folder}",
        f"--output={launch.attempt_folder(attempt)}/logs/rank-%t.log",
        *_pyxis(launch),
        *rank_command(launch),
    ]


def binding(launch: Launch) -> list[str]:
    """The options that give each task its cores and all tasks of a node its GPUs."""
    cluster, found = launch.cluster, []
    if cluster.cpus_per_task:
        found.append(f"--cpus-per-task={cluster.cpus_per_task}")  # srun no longer takes it from sbatch since 22.05
        if cluster.numa == "auto":
            found += ["--cpu-bind=cores", "--mem-bind=local"]
    if launch.devices:
        found += [gpus(launch), "--gpu-bind=none"]
    return found


def gpus(launch: Launch) -> str:
    """The option that asks for the GPUs of each node."""
    kind = f"{launch.cluster.gpu_type}:" if launch.cluster.gpu_type else ""
    return f"--gpus-per-node={kind}{launch.gpus_per_node}"


def rank_command(launch: Launch) -> list[str]:
    """What one task runs: the rank itself, inside apptainer's container where that is the cluster's way."""
    if launch.cluster.container != "apptainer":
        return list(launch.command)
    device = ["--nv"] if launch.devices else []
    binds = ["--bind", ",".join(_mounts(launch))]
    return ["apptainer", "exec", *device, *binds, "--pwd", launch.folder, launch.cluster.image, *launch.command]


def _pyxis(launch: Launch) -> list[str]:
    cluster: Cluster = launch.cluster
    if cluster.container != "pyxis":
        return []
    return [
        f"--container-image={cluster.image}",
        f"--container-mounts={','.join(mount if ':' in mount else f'{mount}:{mount}' for mount in _mounts(launch))}",
        f"--container-workdir={launch.folder}",
        "--no-container-mount-home",
        *([f"--container-env={','.join(cluster.environment)}"] if cluster.environment else []),
    ]


def _mounts(launch: Launch) -> list[str]:
    return list(dict.fromkeys([*launch.cluster.mounts, launch.folder, launch.out]))
