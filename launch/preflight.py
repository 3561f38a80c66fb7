"""One node's examination before a run: `python -m megagpt.launch.preflight FOLDER --nodes NODE ... [--whole]`.

Writes FOLDER/<node>.json, for the supervisor to judge (preflight_step.py). The quick part is names, clock, disk,
memory and limits; the whole one adds versions, GPUs with a short burn, and the bandwidth to every other node, and
needs torch. Runs where the ranks will, inside their container.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from megagpt import doctor
from megagpt.files import write_whole

WRITE_MIB = 32
EXCHANGE_MIB = 8
GPU_EXCHANGE_MIB = 256
MOST_ROUNDS = 15
TRIES = 6
BURN_SECONDS = 3.0
MEETING_SECONDS = 40.0


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Who exchanges with whom: each round pairs every node with another (but one, if they are odd), no pair twice.

    The circle method: node 0 stays, the others turn. Beyond `MOST_ROUNDS` + 1 nodes not every pair is tried.
    """
    seats = list(range(nodes)) + ([-1] if nodes % 2 else [])
    found = []
    for _ in range(min(len(seats) - 1, MOST_ROUNDS)):
        pairs = zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2 :]), strict=True)
        found.append([(min(pair), max(pair)) for pair in pairs if -1 not in pair])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def quick(folder: Path) -> dict[str, Any]:
    """What needs nothing but Python, in a fraction of a second."""
    host = socket.gethostname()
    forward = doctor.lookup(socket.gethostbyname, host)
    backward = (
        doctor.lookup(lambda address: socket.gethostbyaddr(address)[0], forward.answer) if forward.answer else None
    )
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0  # noqa: S108
    checks = [
        doctor.check_names(host, forward, backward),
        doctor.check_disk(folder, shutil.disk_usage(folder).free),
        doctor.check_shared_memory(shared),
        doctor.check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)),
    ]
    rate, ahead = _write(folder, host)
    return {
        "checks": [dataclasses.asdict(check) for check in checks],
        "write_mib_per_s": rate,
        "clock_ahead_seconds": ahead,
    }


def _write(folder: Path, host: str) -> tuple[float, float]:
    """MiB/s of a synced write to the run's folder, and how far this clock is ahead of its file server's."""
    path = folder / f".{host}.write"
    try:
        began = time.perf_counter()
        with path.open("wb") as file:
            file.write(os.urandom(1 << 20) * WRITE_MIB)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - began
        return WRITE_MIB / seconds, time.time() - path.stat().st_mtime
    finally:
        path.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """What must be the same on all nodes."""
    import torch

    import megagpt

    found = {"python": platform.python_version(), "torch": torch.__version__, "megagpt": megagpt.__version__}
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[attr-defined]
        found["driver"] = _nvidia("driver_version")[0][0]
    return found


def gpus(expected: int) -> list[str]:
    """What is wrong with this node's GPUs; nothing is if none is expected."""
    if not expected:
        return []
    import torch

    found = torch.cuda.device_count()
    wrong = [f"{found} GPUs, of {expected}"] if found < expected else []
    if torch.version.cuda:
        for index, (memory, rows) in enumerate(_nvidia("ecc.errors.uncorrected.volatile.total,remapped_rows.failure")):
            wrong += [f"GPU {index}: {memory} uncorrected ECC errors"] if memory not in ("0", "[N/A]") else []
            wrong += [f"GPU {index}: its spare memory rows are used up"] if rows not in ("No", "0", "[N/A]") else []
    return wrong + [
        f"GPU {index}: the same product came out differently" for index in range(found) if not _burn(index)
    ]


def _nvidia(fields: str) -> list[list[str]]:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout  # noqa: S603
    return [[value.strip() for value in line.split(",")] for line in said.splitlines()]


def _burn(index: int) -> bool:
    """Whether a GPU multiplies the same matrices to the same bits, for a few seconds at full load."""
    import torch

    generator = torch.Generator(device=f"cuda:{index}").manual_seed(index)
    a, b = (
        torch.randn(8192, 8192, device=f"cuda:{index}", dtype=torch.bfloat16, generator=generator) for _ in range(2)
    )
    expected, until = a @ b, time.monotonic() + BURN_SECONDS
    while time.monotonic() < until:
        if not torch.equal(a @ b, expected):
            return False
    return True


def bandwidth(place: int, nodes: int, *, on_gpu: bool) -> dict[str, Any]:
    """MiB/s of an all-reduce over all nodes, and of an exchange with each other node (by its place)."""
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    timeout = timedelta(seconds=MEETING_SECONDS)
    store = TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), nodes, place == 0, timeout, wait_for_workers=False
    )
    store = PrefixStore(os.environ["MEGAGPT_TOKEN"], store)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=place, world_size=nodes, timeout=timeout)
    size = (GPU_EXCHANGE_MIB if on_gpu else EXCHANGE_MIB) << 20
    sent = torch.ones(size // 4, device="cuda" if on_gpu else "cpu")
    got = torch.empty_like(sent)
    reduced = _timed(lambda: dist.all_reduce(sent), on_gpu=on_gpu)
    pairs: dict[str, float] = {}
    for pairing in rounds(nodes):
        peer = next((a + b - place for a, b in pairing if place in (a, b)), None)
        if peer is not None:
            exchange = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, got, peer)]
            seconds = _timed(partial(_exchange, exchange), on_gpu=on_gpu)
            pairs[str(peer)] = size / seconds / 2**20
        dist.barrier()
    dist.destroy_process_group()
    return {"all_reduce_mib_per_s": size / reduced / 2**20, "pairs_mib_per_s": pairs}


def _exchange(operations: list[Any]) -> None:
    import torch.distributed as dist

    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _timed(work: Callable[[], Any], *, on_gpu: bool) -> float:
    """Seconds of the fastest of some calls: the first opens the connections, and others may be disturbed."""
    import torch

    seconds = float("inf")
    for _ in range(TRIES):
        began = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = min(seconds, time.perf_counter() - began)
    return seconds


def main() -> None:
    """Examine this node, and write down what was found, part by part: a part that hangs must not hide the others."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", nargs="+", required=True)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--whole", action="store_true")
    options = parser.parse_args()
    host = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    report = quick(options.folder)
    path = options.folder / f"{host}.json"
    write_whole(path, json.dumps(report))
    if options.whole:
        report["versions"] = versions()
        report["gpus"] = gpus(options.gpus)
        write_whole(path, json.dumps(report))
        if len(options.nodes) > 1:
            report["network"] = bandwidth(options.nodes.index(host), len(options.nodes), on_gpu=options.gpus > 0)
    report["complete"] = True
    write_whole(path, json.dumps(report))


if __name__ == "__main__":
    main()
    os._exit(0)  # everything is written down; torch takes seconds to take itself apart
