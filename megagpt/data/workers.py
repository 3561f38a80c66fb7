"""Tasks spread over processes: each gets the next one when it is idle, by a pipe of its own.

A worker that dies closes its pipe, which the parent sees at once; a parent that dies closes them all, and each worker
stops at its next word. So no process outlives a SIGKILL of the other side, and nothing waits on a queue for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar, cast

from megagpt.errors import UserError

Task = TypeVar("Task")
Report = Callable[[int], None]
Work = Callable[[Task, Report], None]


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(tasks: Sequence[Task], work: Work[Task], *, processes: int, report: Report) -> None:
    """Do `work(task, report)` for all tasks; with one process, in this one.

    `work` must be importable by name (a function of a module, or a partial of one). What it reports reaches `report`
    here. The first error ends all workers: UserError is raised as it was, another as RuntimeError with its traceback.
    """
    if processes == 1 or len(tasks) <= 1:
        for task in tasks:
            work(task, report)
        return
    with _workers(work, min(processes, len(tasks))) as workers:
        waiting = list(reversed(tasks))
        for pipe in workers:
            pipe.send((waiting.pop(),))
        while workers:
            for pipe in cast("list[Connection]", wait(list(workers))):
                message = _receive(pipe, workers[pipe])
                if isinstance(message, int):
                    report(message)
                elif message is not None:
                    raise message
                elif waiting:
                    pipe.send((waiting.pop(),))
                else:
                    workers.pop(pipe).join(0)
                    pipe.close()


def _receive(pipe: Connection, process: BaseProcess) -> int | Exception | None:
    try:
        return pipe.recv()
    except (EOFError, OSError) as error:
        process.join()
        code = process.exitcode or 0
        cause = f"signal {-code} (9: perhaps out of memory)" if code < 0 else f"exit status {code}"
        raise RuntimeError(f"a worker process died by {cause}") from error


@contextmanager
def _workers(work: Work[Task], count: int) -> Iterator[dict[Connection, BaseProcess]]:
    """`count` idle workers, by the parent's end of their pipes. They are ended when the context closes."""
    context = multiprocessing.get_context("forkserver")  # forking this process would copy the threads' locks
    context.set_forkserver_preload([getattr(work, "func", work).__module__])  # imported once, not once a worker
    workers: dict[Connection, BaseProcess] = {}
    started: list[BaseProcess] = []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = process
            started.append(process)
        yield workers
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.join()


def _serve(pipe: Connection, work: Work[Task]) -> None:
    """A worker's life: tasks come as 1-tuples, reports go back as integers, None or an error ends a task."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent alone answers it
    try:
        while True:
            (task,) = pipe.recv()
            try:
                work(task, pipe.send)
            except UserError as error:
                pipe.send(error)
            except Exception:  # whatever it is, the parent raises it
                pipe.send(RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))
            else:
                pipe.send(None)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
