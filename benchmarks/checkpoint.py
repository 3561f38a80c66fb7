"""Save and load a training state, beside the disk's rate, torch.save, torch.distributed.checkpoint and DeepSpeed.

One rank on the CPU, ZeRO 1, fp32. All write the same engine's state, in alternating rounds, and every writer ends with
an fsync of what it wrote, since a checkpoint in the page cache does not survive a power cut. The disk's own rate is
that of one block, written again and again, each handed to the disk at once. Before each read the files are dropped
from the page cache. Rates are of each writer's own bytes; the best of the rounds counts. What a save in the background
costs is seen in training: how long the training thread waits for it, and how much longer the step during it takes than
one without.

    python benchmarks/checkpoint.py [--width 512] [--layers 8] [--rounds 3] [--out checkpoint.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megagpt import config
from megagpt.files import read_further_ahead, start_writeback, write_whole
from megagpt.parallel import ranks

BLOCK = 1 << 24


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def sync(folder: Path) -> None:
    for path in files(folder):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def drop(folder: Path) -> None:
    """Forget the files' pages."""
    for path in files(folder):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bare_write(folder: Path, size: int) -> None:
    folder.mkdir()
    block = os.urandom(BLOCK)
    with (folder / "data").open("wb", buffering=0) as stream:
        for at in range(0, size - BLOCK + 1, BLOCK):
            stream.write(block)
            start_writeback(stream.fileno(), at, BLOCK)
        os.fsync(stream.fileno())


def bare_read(folder: Path) -> None:
    buffer = memoryview(bytearray(BLOCK))
    with (folder / "data").open("rb", buffering=0) as stream:
        read_further_ahead(stream.fileno())
        while stream.readinto(buffer):
            pass


def contestants(engine: Any, size: int) -> dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]]:
    """How each writes into a folder, and reads it back."""
    import torch
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    from megagpt.checkpoint.folders import folder_at
    from megagpt.checkpoint.lineage import Commit
    from megagpt.checkpoint.load import load_checked, read_manifest
    from megagpt.checkpoint.save import KINDS, save

    owned, held = engine.owned(), engine.held()  # once: after DeepSpeed has loaded, its engine no longer finds them
    tensors = {f"{kind}/{part.name}": getattr(part, kind) for part in owned for kind in KINDS}

    def ours_read(folder: Path) -> None:
        manifest = read_manifest(Commit(1, 1, folder_at(folder)))
        assert load_checked(manifest, held) is None

    def torch_write(folder: Path) -> None:
        folder.mkdir()
        torch.save(tensors, folder / "state.pt")

    def torch_read(folder: Path) -> None:
        for name, value in torch.load(folder / "state.pt", weights_only=True).items():
            tensors[name].copy_(value)

    deepspeed = engine._engine
    return {
        "disk": (lambda folder: bare_write(folder, size), bare_read),
        "megagpt": (
            lambda folder: save(folder_at(folder), owned, header={}, rank=0, ranks=1),
            ours_read,
        ),
        "torch.save": (torch_write, torch_read),
        "torch.distributed.checkpoint": (
            lambda folder: dcp_save(tensors, checkpoint_id=folder) and None,
            lambda folder: dcp_load(tensors, checkpoint_id=folder),
        ),
        "DeepSpeed save_checkpoint": (
            lambda folder: deepspeed.save_checkpoint(str(folder), tag="step") and None,
            lambda folder: deepspeed.load_checkpoint(str(folder), tag="step") and None,
        ),
    }


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def background(engine: Any, folder: Path, rounds: int) -> dict[str, Any]:
    """What saves in the background cost training, beside ones that are waited for, in alternating rounds."""
    import torch

    from megagpt.checkpoint.background import BackgroundSave, HostCopy
    from megagpt.checkpoint.folders import folder_at
    from megagpt.checkpoint.save import bytes_of, save
    from megagpt.data.batch import Batch

    tokens = torch.arange(2 * 129).view(2, 129) % 1000
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, torch.arange(2))
    arguments: dict[str, Any] = {"header": {}, "rank": 0, "ranks": 1}
    copy, owned = HostCopy(), engine.owned()
    found: dict[str, list[float]] = {name: [] for name in ("step", "step_with_save", "stall", "synchronous", "copy")}
    for number in range(rounds + 1):
        row = {"step": seconds(lambda: engine.train_batch([batch], lr=1e-4))}
        row["synchronous"] = seconds(lambda: save(folder_at(folder / "waited"), owned, **arguments))
        waits: list[float] = []

        def step(waits: list[float] = waits) -> BackgroundSave:
            began = time.perf_counter()
            work = BackgroundSave(folder_at(folder / "background"), owned, copy, **arguments)
            engine.before_next_update(lambda: waits.append(seconds(work.copied.wait)))
            waits.append(time.perf_counter() - began)
            engine.train_batch([batch], lr=1e-4)
            return work

        began = time.perf_counter()
        work = step()
        row["step_with_save"] = time.perf_counter() - began
        work.finish()
        row["stall"], row["copy"] = sum(waits), work.copied.seconds
        for name in ("waited", "background"):
            shutil.rmtree(folder / name)
        if number:  # the first one allocates
            for name, value in row.items():
                found[name].append(value)
    middle = {name: statistics.median(values) for name, values in found.items()}
    return {
        "step_seconds": round(middle["step"], 4),
        "step_with_save_seconds": round(middle["step_with_save"], 4),
        "synchronous_seconds": round(middle["synchronous"], 4),
        "asynchronous_copy_seconds": round(middle["copy"], 4),
        "asynchronous_stall_seconds": round(middle["stall"], 4),
        "asynchronous_stall_share": round(middle["stall"] / middle["synchronous"], 4),
        "asynchronous_extra_bytes_over_state": round(copy.bytes() / bytes_of(owned), 3),
    }


def proof_seconds(engine: Any) -> float:
    """What the checksums over the whole state take: once a load, and once a save in a thread of its own."""
    from megagpt.checkpoint.save import KINDS

    return min(seconds(lambda: engine.checksums(KINDS)) for _ in range(3))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from megagpt.mesh import mesh_of
    from megagpt.parallel.engine import Engine

    ranks.join(world=1)
    run = config.load("quickstart")
    sizes = {"width": options.width, "layers": options.layers, "heads": 8, "vocabulary": 32768}
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, **sizes), parallel=config.Parallel(data=1))
    engine = Engine(run, mesh_of(run.parallel, 0))
    size = sum(part.weight.numel() for part in engine.owned()) * 12
    found: dict[str, Any] = {}
    proof = proof_seconds(engine)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        stall = background(engine, Path(name), options.rounds)
        rivals = contestants(engine, size)
        for _ in range(options.rounds):
            for rival, (write, read) in rivals.items():
                folder = Path(name) / "state"

                def durable(write: Any = write, folder: Path = folder) -> None:
                    write(folder)
                    sync(folder)

                row = found.setdefault(rival, {"write": [], "read": []})
                row["write"].append(seconds(durable))
                row["bytes"] = sum(path.stat().st_size for path in files(folder))
                drop(folder)
                row["read"].append(seconds(lambda read=read, folder=folder: read(folder)))
                shutil.rmtree(folder)
    rates = {
        rival: {f"{key}_gb_per_s": round(row["bytes"] / min(row[key]) / 1e9, 3) for key in ("write", "read")}
        for rival, row in found.items()
    }
    return {
        "state_bytes": size,
        "rates": rates,
        "write_share_of_disk": round(rates["megagpt"]["write_gb_per_s"] / rates["disk"]["write_gb_per_s"], 3),
        "read_share_of_disk": round(rates["megagpt"]["read_gb_per_s"] / rates["disk"]["read_gb_per_s"], 3),
        "checksums_gb_per_s": round(size / proof / 1e9, 3),
        **stall,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    parser.add_argument("--out", type=Path, help="also write the results to this file")
    options = parser.parse_args()

    def work() -> None:
        import torch

        result = {
            "date": time.strftime("%Y-%m-%d"),
            "command": f"python benchmarks/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
            "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            **measure(options),
        }
        text = json.dumps(result, indent=2)
        print(text)
        if options.out is not None:
            write_whole(options.out, text + "\n")

    return ranks.run_local(work, 1)


if __name__ == "__main__":
    sys.exit(main())
