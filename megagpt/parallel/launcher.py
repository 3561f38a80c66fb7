"""What a launcher tells a rank, and what keeps the two in touch. Standard library alone: it runs before any import.

Ranks learn their place from RANK and the like (torchrun, mpirun wrappers), or from SLURM's variables under srun. Our
supervisor adds, for each attempt, where the first rank listens and a random token, under which the ranks meet: a rank
of another run or of an earlier attempt that comes to the same port finds nothing there. The token keeps out strays,
not attackers: whoever can reach the port can disturb a run (docs/launch.md).

The lifeline is a TCP connection to the supervisor on which nothing is sent after the greeting. The kernels of both
ends keep it alive. So it closes at once when the rank ends, however it ends, and falls silent within seconds when its
node is gone or its cable pulled; no thread of the rank has to run for that.
"""

from __future__ import annotations

import json
import os
import re
import socket

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
TOKEN = "MEGAGPT_TOKEN"  # noqa: S105 - the variable's name
LIFELINE = "MEGAGPT_LIFELINE"
CONNECT_SECONDS = 10.0


def launched() -> bool:
    """Whether a launcher (torchrun, srun, mpirun, ...) started this process as one of several ranks."""
    return all(name in os.environ for name in RANK_VARIABLES)


def adopt_slurm() -> None:
    """Under srun, set the variables of a rank from SLURM's; they win over nothing that is set already.

    A single task, as `srun --pty bash` starts it, is a person's shell unless a supervisor told where to meet.
    """
    found = os.environ
    if launched() or "SLURM_STEP_ID" not in found or "SLURM_PROCID" not in found:
        return
    if int(found.get("SLURM_STEP_NUM_TASKS", "1")) == 1 and TOKEN not in found:
        return
    found["RANK"] = found["SLURM_PROCID"]
    found["LOCAL_RANK"] = found["SLURM_LOCALID"]
    found["WORLD_SIZE"] = found["SLURM_STEP_NUM_TASKS"]
    tasks = found.get("SLURM_STEP_TASKS_PER_NODE", found["WORLD_SIZE"])
    found["LOCAL_WORLD_SIZE"] = str(tasks_of_node(tasks, int(found.get("SLURM_NODEID", "0"))))
    found.setdefault("MASTER_ADDR", first_host(found.get("SLURM_STEP_NODELIST", "localhost")))
    found.setdefault(
        "MASTER_PORT", str(20_000 + (int(found["SLURM_JOB_ID"]) * 31 + int(found["SLURM_STEP_ID"])) % 10_000)
    )


def tasks_of_node(text: str, node: int) -> int:
    """Tasks on the node-th node, of a list as SLURM writes it: 4(x2),3 is 4, 4, 3."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not found:
            raise ValueError(f"{text!r} is no list of tasks per node")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts[node]


def first_host(nodes: str) -> str:
    """The first of a list of nodes as SLURM writes it: gpu[07-09,11],x1 is gpu07."""
    found = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if not found:
        raise ValueError(f"{nodes!r} is no list of nodes")
    return "".join(part or "" for part in found.groups())


def hold_lifeline() -> socket.socket | None:
    """Greet the supervisor, if there is one; the connection must be kept until the process ends."""
    address, token = os.environ.get(LIFELINE), os.environ.get(TOKEN)
    if not address or not token:
        return None
    host, port = address.rsplit(":", 1)
    line = socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS)
    greeting = {
        "token": token,
        "rank": int(os.environ["RANK"]),
        "host": socket.gethostname(),
        "step_id": os.environ.get("SLURM_STEP_ID", ""),
    }
    line.sendall(json.dumps(greeting).encode() + b"\n")
    return line
