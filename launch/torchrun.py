"""torchrun's command line and a script around it, for one machine or for whatever starts a script on each node."""

from __future__ import annotations

import shlex

from megagpt.launch.spec import Launch


def elastic(launch: Launch, *, address: str, node: str, restarts: int) -> list[str]:
    """The torchrun command with a fixed place for each node; `node` is its rank, or what a shell or a pod puts there.

    It sets RANK and the like, and starts all ranks again if one fails; the run goes on from its newest checkpoint.
    """
    python, *arguments = launch.command
    meeting = ["--standalone"]
    if launch.nodes > 1:
        port = str(launch.cluster.ports[0])
        meeting = [
            f"--nnodes={launch.nodes}",
            f"--node-rank={node}",
            f"--master-addr={address}",
            f"--master-port={port}",
        ]
    started = arguments[1:] if arguments[:1] == ["-m"] else arguments
    kind = ["-m"] if arguments[:1] == ["-m"] else []
    options = [f"--nproc-per-node={launch.gpus_per_node}", f"--max-restarts={restarts}"]
    return [python, "-m", "torch.distributed.run", *meeting, *options, *kind, *started]


def torchrun_script(launch: Launch, *, layout: str) -> str:
    """One script for every node; with several, MASTER_ADDR and NODE_RANK say which is which."""
    several = [': "${MASTER_ADDR:?the address of node 0}" "${NODE_RANK:?0 on the first node, 1 on the next}"']
    command = elastic(launch, address="@ADDRESS@", node="@NODE@", restarts=launch.retries.inside)
    line = shlex.join(command).replace("@ADDRESS@", '"$MASTER_ADDR"').replace("@NODE@", '"$NODE_RANK"')
    # The store that ranks meet in is otherwise the agent's, which keeps the dead ranks' addresses over a restart.
    fresh = ["export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]
    return _script(launch, layout, [*(several if launch.nodes > 1 else []), *fresh, f"exec {line}"])


def local_script(launch: Launch, *, layout: str) -> str:
    """Our own ranks on this machine."""
    return _script(launch, layout, [f"exec {shlex.join(launch.command)}"])


def _script(launch: Launch, layout: str, lines: list[str]) -> str:
    exports = [f"export {name}={shlex.quote(value)}" for name, value in launch.environment().items()]
    return "\n".join(
        [
            "#!/bin/bash",
            f"# megagpt: {launch.name}, {launch.world_size()} ranks = {layout}.",
            "set -euo pipefail",
            f"cd {shlex.quote(launch.folder)}",
            *exports,
            *lines,
            "",
        ]
    )
