"""`megagpt doctor`: is this machine fit to train, and if not, what to do about it.

Every check is a function of what it is given, so that each finding can be rehearsed; `checks` gives them this
machine's own. Nothing is ever changed or deleted: the doctor names the file and the command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import resource
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

GIB = 2**30
REQUIRED = (
    "torch",
    "deepspeed",
    "webdataset",
    "pyarrow",
    "tokenizers",
    "safetensors",
    "fsspec",
    "tyro",
    "rich",
    "numpy",
)
OPTIONAL = ("triton", "transformers", "tensorboard", "wandb", "s3fs")
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)
OLDEST_DEEPSPEED = (0, 19, 8)
COMPILERS = frozenset({"ninja", "nvcc", "cicc", "c++", "g++", "cc1plus", "clang++"})
LOCK_SECONDS = 600  # DeepSpeed's CPU op, the slowest, compiles in 60 to 160 s on two cores
LOOKUP_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding, and what to do unless all is well."""

    name: str
    status: Literal["ok", "warn", "fail"]
    finding: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check versions, devices, stale locks, name lookup, disk, memory and limits. Exit status 1 if one check fails."""

    json: bool = False
    """Print the findings as JSON."""


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """What a name server answered (None: nothing in time, or no such name), and how long it took."""

    answer: str | None
    seconds: float


def run_doctor(options: Doctor) -> int:
    """Print every check; 1 if one of them fails, else 0."""
    found = checks(Path.cwd())
    if options.json:
        print(json.dumps([dataclasses.asdict(check) for check in found], indent=2))
    else:
        _print(found)
    return int(any(check.status == "fail" for check in found))


def checks(folder: Path) -> list[Check]:
    """All checks of this machine; runs would be written under `folder`."""
    gpus, gpu_build = _gpus()
    host = socket.gethostname()
    forward = lookup(socket.gethostbyname, host)
    backward = lookup(lambda address: socket.gethostbyaddr(address)[0], forward.answer) if forward.answer else None
    return [
        check_python(sys.version_info[:2]),
        check_packages({name: _version(name) for name in (*REQUIRED, *OPTIONAL)}),
        check_devices(gpus, gpu_build=gpu_build, cpu=f"{platform.machine()}, {_usable_cpus()} cores"),
        check_compiler(next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None), gpus=len(gpus)),
        check_locks(_lock_ages(_extensions_folder()), compiling=_compiling()),
        check_names(host, forward, backward),
        check_disk(folder, shutil.disk_usage(folder).free),
        check_shared_memory(shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0),  # noqa: S108
        check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)),
    ]


def check_python(version: tuple[int, ...]) -> Check:
    """The interpreter's (major, minor)."""
    finding = ".".join(map(str, version))
    if OLDEST_PYTHON <= version <= NEWEST_PYTHON:
        return Check(name="python", status="ok", finding=finding)
    remedy = f"Use Python {'.'.join(map(str, OLDEST_PYTHON))} to {'.'.join(map(str, NEWEST_PYTHON))}."
    return Check(name="python", status="fail" if version < OLDEST_PYTHON else "warn", finding=finding, remedy=remedy)


def check_packages(versions: Mapping[str, str | None]) -> Check:
    """Package name -> version, or None where it is not installed."""
    finding = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    missing = [name for name in REQUIRED if not versions.get(name)]
    if missing:
        remedy = f"pip install {' '.join(missing)}"
        return Check(name="packages", status="fail", finding=f"{', '.join(missing)} not installed", remedy=remedy)
    if _numbers(versions["deepspeed"] or "") < OLDEST_DEEPSPEED:
        finding = f"deepspeed {versions['deepspeed']}: before 0.19.8, pipeline gradients were silently wrong"
        return Check(name="packages", status="fail", finding=finding, remedy="pip install 'deepspeed>=0.19.8'")
    return Check(name="packages", status="ok", finding=finding)


def check_devices(gpus: Sequence[str], *, gpu_build: str | None, cpu: str) -> Check:
    """Names of the GPUs that torch sees; the CUDA or ROCm version torch was built for, if any."""
    if gpus:
        kinds = ", ".join(f"{list(gpus).count(name)} x {name}" for name in dict.fromkeys(gpus))
        return Check(name="devices", status="ok", finding=f"{kinds} ({gpu_build})")
    if gpu_build:
        finding = f"torch is built for {gpu_build}, and sees no GPU; training would run on the CPU ({cpu})"
        remedy = "See whether nvidia-smi (or rocm-smi) lists one; if so, its driver is too old for this torch."
        return Check(name="devices", status="warn", finding=finding, remedy=remedy)
    return Check(name="devices", status="ok", finding=f"no GPU; the CPU trains ({cpu})")


def check_compiler(path: str | None, *, gpus: int) -> Check:
    """A C compiler matters on GPUs alone, where Triton builds the launcher of each kernel with it."""
    if path or not gpus:
        finding = path or "none, and none is needed on a CPU"
        return Check(name="C compiler", status="ok", finding=finding)
    finding = "none: Triton kernels cannot start on the GPU, and the slower torch operators run"
    return Check(name="C compiler", status="warn", finding=finding, remedy="apt-get install gcc, or load its module.")


def check_locks(ages: Mapping[Path, float], *, compiling: bool) -> Check:
    """Lock files of torch's extension cache -> their age in seconds; is a compiler at work?"""
    stale = [path for path, age in ages.items() if age > LOCK_SECONDS]
    if stale and not compiling:
        finding = f"{', '.join(map(str, stale))}: left by a killed compilation; every later one waits for it for ever"
        return Check(name="locks", status="fail", finding=finding, remedy=f"rm {' '.join(map(str, stale))}")
    at_work = f"{len(ages)} held by a compilation at work" if ages else "none in torch's extension cache"
    return Check(name="locks", status="ok", finding=at_work)


def check_names(host: str, forward: Lookup, backward: Lookup | None) -> Check:
    """Name -> address and back, as torch.distributed asks when ranks meet; `backward` is None without an address."""
    remedy = f"Add a line to /etc/hosts: {forward.answer or 'ADDRESS'} {host}"
    if forward.answer is None or backward is None:
        finding = f"{host} has no address after {forward.seconds:.1f} s; ranks on other machines cannot find this one"
        return Check(name="names", status="warn", finding=finding, remedy=remedy)
    seconds = forward.seconds + backward.seconds
    finding = f"{host} is {forward.answer}, which is {backward.answer or 'no known name'}, in {seconds:.2f} s"
    if seconds > 1:
        finding += "; ranks wait as long to meet"
        return Check(name="names", status="warn", finding=finding, remedy=remedy)
    return Check(name="names", status="ok", finding=finding)


def check_disk(folder: Path, free: int) -> Check:
    """Bytes free where runs would be written."""
    finding = f"{free / GIB:,.1f} GiB free in {folder}"
    if free >= 10 * GIB:
        return Check(name="disk", status="ok", finding=finding)
    remedy = "Free some space, or write elsewhere with --out: a checkpoint takes 12 bytes a parameter and more."
    return Check(name="disk", status="fail" if free < GIB else "warn", finding=finding, remedy=remedy)


def check_shared_memory(size: int) -> Check:
    """Bytes of /dev/shm, through which NCCL joins the GPUs of a machine."""
    finding = f"{size / GIB:,.2f} GiB"
    if size >= GIB:
        return Check(name="shared memory", status="ok", finding=finding)
    remedy = "In a container: docker run --shm-size=8g (or --ipc=host)."
    return Check(name="shared memory", status="warn", finding=finding, remedy=remedy)


def check_open_files(limits: tuple[int, int]) -> Check:
    """(soft, hard) limit of open files; resource.RLIM_INFINITY is none."""
    soft, hard = limits
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= 1024:
        finding = "no limit" if soft == unlimited else f"{soft:,}"
        return Check(name="open files", status="ok", finding=finding)
    wanted = 65_536 if hard == unlimited else min(hard, 65_536)
    finding = f"{soft:,}: shards, logs and sockets of a large run need more"
    return Check(name="open files", status="warn", finding=finding, remedy=f"ulimit -n {wanted}")


def lookup(function: Callable[[str], str], name: str, seconds: float = LOOKUP_SECONDS) -> Lookup:
    """Ask `function` for `name`, and wait no longer than `seconds`."""
    answers: list[str] = []

    def ask() -> None:
        try:
            answers.append(function(name))
        except OSError:  # no such name
            return

    begin = time.perf_counter()
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return Lookup(answer=answers[0] if answers else None, seconds=time.perf_counter() - begin)


def _print(found: Sequence[Check]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True, force_terminal=sys.stdout.isatty())
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for check in found:
        console.print(Text.assemble((f"{check.status:<6}", colours[check.status]), f"{check.name:<15}{check.finding}"))
        if check.remedy:
            console.print(Text(f"{'':21}{check.remedy}"))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())


def _gpus() -> tuple[list[str], str | None]:
    """Names of the GPUs, and what torch was built for; none without torch, which check_packages reports."""
    try:
        import torch
    except ImportError:
        return [], None
    hip = getattr(torch.version, "hip", None)
    build = f"ROCm {hip}" if hip else f"CUDA {torch.version.cuda}" if torch.version.cuda else None
    count = torch.cuda.device_count() if build else 0
    return [torch.cuda.get_device_name(index) for index in range(count)], build


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _extensions_folder() -> Path:
    """Where torch.utils.cpp_extension builds, without importing it."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = os.environ.get("XDG_CACHE_HOME")
    return Path(named) if named else (Path(cache) if cache else Path.home() / ".cache") / "torch_extensions"


def _lock_ages(folder: Path) -> dict[Path, float]:
    """Lock files of the cache -> their age in seconds."""
    ages: dict[Path, float] = {}
    for path in sorted(folder.glob("**/lock")):
        with contextlib.suppress(FileNotFoundError):  # released meanwhile
            ages[path] = time.time() - path.stat().st_mtime
    return ages


def _compiling() -> bool:
    """Is a compiler at work on this machine? Unknown counts as no."""
    for process in Path("/proc").glob("[0-9]*/comm"):
        try:
            if process.read_text().strip() in COMPILERS:
                return True
        except OSError:  # it ended meanwhile
            continue
    return False
