"""The ranks of this machine: start them, or join those that a launcher started.

Local ranks are forked. Without a GPU the parent imports torch and DeepSpeed first, once for all: two ranks start in a
second instead of ten. With one it does not, since a process that has touched CUDA cannot be forked. Ranks meet through
a file, so no port has to be free.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from megagpt import outcome
from megagpt.errors import UserError
from megagpt.parallel.launcher import TOKEN, hold_lifeline

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def run_local(work: Callable[[], None], ranks: int, out: Path | None = None) -> int:
    """Run `work` in `ranks` forked processes of this machine and return the exit status of the first that failed.

    Signals go on to every rank, which stop at their next step. A rank that dies takes the others with it, after
    `GRACE_SECONDS`, and its cause is the last thing printed. The attempt's outcome is written under `out`, if given.
    """
    if not gpu_present():
        import_deepspeed()
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - with torch's compiler: late, and 3 s in each rank
    with tempfile.TemporaryDirectory(prefix="megagpt-") as name:
        meeting = Path(name)
        attempt = outcome.begin(out) if out else meeting
        children = {rank: _fork(work, rank, ranks, meeting, attempt) for rank in range(ranks)}
        previous = {number: signal.signal(number, _forward_to(children)) for number in FORWARDED}
        try:
            failed, status = _first(attempt, _wait(dict(children)))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        ended = _verdict(attempt, failed, status)
        outcome.write(attempt / "outcome.json", ended)
        if status:
            print(f"megagpt: {ended.message}", file=sys.stderr)
        return status


def _fork(work: Callable[[], None], rank: int, ranks: int, meeting: Path, attempt: Path) -> int:
    """Start a rank; returns its process id. They meet in one folder, and leave word of their end in the other."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent, child = os.getpid(), os.fork()
    if child:
        return child
    status = 1
    try:
        _die_with_parent(parent)
        os.setpgid(0, 0)  # the terminal's Ctrl-C reaches the parent alone, which passes it on once
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ.update({"MEGAGPT_MEETING": str(meeting / "meeting"), outcome.ATTEMPT: str(attempt.absolute())})
        status = run_rank(work, attempt)
    finally:
        os._exit(status)  # a forked rank must never return into its parent's code


def run_rank(work: Callable[[], None], attempt: Path) -> int:
    """Run a rank's `work`; its exit status. If it fails, its word is left in the attempt's folder."""
    try:
        work()
        return 0
    except UserError as error:
        leave_word(outcome.of_error(error, rank=rank()), attempt)
        return error.exit_status
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        traceback.print_exc()
        leave_word(outcome.of_error(error, rank=rank()), attempt)
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run_launched(work: Callable[[], None], out: Path) -> NoReturn:
    """Run a rank that a launcher started, and end the process: no destructor may wait for ranks that are gone."""
    with hold_lifeline() or contextlib.nullcontext():
        status = run_rank(work, outcome.attempt_folder(out))
        os._exit(status)


def leave_word(word: outcome.Outcome, attempt: Path) -> None:
    """Say why this rank is about to end: in the attempt's folder, and in its own log where it has one."""
    with contextlib.suppress(OSError):  # a full disk must not hide the cause
        outcome.write_rank(attempt, word)
    if "MEGAGPT_MEETING" not in os.environ:
        print(f"megagpt: {word.message}", file=sys.stderr, flush=True)


def _verdict(attempt: Path, first: int, status: int) -> outcome.Outcome:
    """How the attempt ended, of which rank `first` failed first (status 0: none did)."""
    found = outcome.words(attempt)
    if not status:
        return outcome.verdict(found) or outcome.ended("finished", "done", rank=None)
    own = outcome.read(attempt / outcome.rank_file(first))
    if own is None and status > 128:
        killed = f"rank {first} was killed by {signal.Signals(status - 128).name}."
        return outcome.ended("failed", "rank_lost", killed, rank=first)
    if own is not None and own.cause != "peer_lost":
        return own
    told = outcome.verdict([word for word in found if word.result == "failed"])
    return told or outcome.ended("failed", "error", f"rank {first} ended with exit status {status}.", rank=first)


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however it ends: no rank may outlive its run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the kernel was told
            os._exit(1)


def _forward_to(children: dict[int, int]) -> Callable[[int, object], None]:
    def forward(number: int, _frame: object) -> None:
        for child in children.values():
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.kill(child, number)

    return forward


def _wait(children: dict[int, int]) -> list[tuple[int, int]]:
    """Collect every child (rank -> process id); once one has failed, end the rest after a grace period.

    Returns the ranks that failed by themselves with their exit statuses, as a shell has them, in this order.
    """
    failed: list[tuple[int, int]] = []
    deadline, ending = float("inf"), False
    while children:
        ended = {rank: state for rank, child in children.items() if (state := _ended(child)) is not None}
        for rank, state in ended.items():
            del children[rank]
            if state and not ending:
                failed.append((rank, state))
        if failed and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline and not ending:
            ending = True
            for child in children.values():
                os.kill(child, signal.SIGKILL)
        if not ended:
            time.sleep(0.02)
    return failed


def _first(attempt: Path, failed: list[tuple[int, int]]) -> tuple[int, int]:
    """The rank that failed first and its exit status; (0, 0) if none did.

    A rank that blames a peer may be gone before the kernel has taken apart the one that was killed.
    """
    words = {rank: outcome.read(attempt / outcome.rank_file(rank)) for rank, _ in failed}
    causes = [one for one in failed if (word := words[one[0]]) is None or word.cause != "peer_lost"]
    return next(iter(causes or failed), (0, 0))


def _ended(child: int) -> int | None:
    """The exit status of a child that has ended (128 + n if signal n killed it), or None."""
    done, state = os.waitpid(child, os.WNOHANG)
    if not done:
        return None
    code = os.waitstatus_to_exitcode(state)
    return 128 - code if code < 0 else code


def join(*, world: int) -> None:
    """Join the process group of the run, on the GPU's NCCL or the CPU's gloo, and tell DeepSpeed about it.

    Raises UserError if the launcher started another number of ranks than the layout has.
    """
    if world_size() != world:
        raise UserError(
            f"the layout has {world} ranks (parallel.data x pipeline x tensor); the launcher started {world_size()}.",
            f"Start {world} ranks, or set parallel.data so that the product is {world_size()}.",
        )
    deepspeed = import_deepspeed()
    import torch
    import torch.distributed as dist

    on_gpu = gpu_present()
    if not on_gpu:
        share = len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])
        torch.set_num_threads(max(1, min(share, torch.get_num_threads())))
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    timeout = timedelta(minutes=30)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", rank=rank(), world_size=world, timeout=timeout, **_meeting(world, timeout)
    )
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)


def _meeting(world: int, timeout: timedelta) -> dict[str, Any]:
    """Where the ranks meet: forked ones at a file, a supervisor's at a port under its token, others as torch does."""
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    file, token = os.environ.get("MEGAGPT_MEETING"), os.environ.get(TOKEN)
    if file:
        return {"init_method": f"file://{file}"}
    if not token:
        return {"init_method": "env://"}
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, world, is_master=rank() == 0, timeout=timeout, wait_for_workers=False)
    return {"store": PrefixStore(token, store)}


def lowest_over_ranks(value: int) -> int:
    """The lowest of all ranks' values; without a process group, the value itself. Every rank must call it."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return value
    found = torch.tensor(value, device="cuda" if gpu_present() else "cpu")
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return int(found)


def sum_over_ranks(values: list[float]) -> list[float]:
    """Each value's sum over all ranks, in fp64; without a process group, the values. Every rank must call it."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return values
    sums = torch.tensor(values, dtype=torch.float64, device="cuda" if gpu_present() else "cpu")
    dist.all_reduce(sums)
    return sums.tolist()


def wrapping_sums_over_ranks(values: list[int]) -> list[int]:
    """Each value's sum over all ranks mod 2^64; without a process group, the values. Every rank must call it."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return values
    signed = [value - 2**64 if value >= 2**63 else value for value in values]
    sums = torch.tensor(signed, dtype=torch.int64, device="cuda" if gpu_present() else "cpu")
    dist.all_reduce(sums)
    return [value % 2**64 for value in sums.tolist()]


def values_of_ranks(value: float) -> list[float]:
    """Every rank's value, by rank; without a process group, the value. Every rank must call it."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    device = "cuda" if gpu_present() else "cpu"
    values = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=device)
    values[dist.get_rank()] = value
    dist.all_reduce(values)  # each element has one rank's value, and zeros: exact
    return values.tolist()


def gpu_present() -> bool:
    """Whether this machine has an NVIDIA or AMD GPU, found without waking it: CUDA must not start before a fork."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()


def import_deepspeed() -> ModuleType:
    """DeepSpeed, imported so that it says nothing, and on a CPU neither looks for a GPU nor compiles anything.

    On a CPU it would compile a shared-memory collective at the first run, for a minute or more, and a process killed
    meanwhile leaves a lock file on which every later run hangs. Marked as unavailable, gloo does the work instead. It
    would also refuse fp16 on CPUs without the instructions, where torch computes it all the same, only slowly.
    """
    if not gpu_present():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # DeepSpeed's calls
    if not gpu_present():
        setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010 - a table that DeepSpeed makes by compiling
        setattr(get_accelerator(), "is_fp16_supported", lambda: True)  # noqa: B010
    return deepspeed
