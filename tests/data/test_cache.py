from __future__ import annotations

import errno
import hashlib
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest

from megagpt.data.cache import Cache, Corrupt, Held
from megagpt.errors import UserError

SIZE = 1000


def content_of(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest() * 40


def take(cache: Cache, key: str, before: Callable[[], None] = lambda: None) -> Held:
    """Hold a file; `before` runs where half of it has come."""

    def download(descriptor: int) -> None:
        os.pwrite(descriptor, content_of(key)[: SIZE // 2], 0)
        before()
        os.pwrite(descriptor, content_of(key)[SIZE // 2 : SIZE], SIZE // 2)

    return cache.hold(key, SIZE, download, lambda path: path.read_bytes() == content_of(key)[:SIZE])


def names(cache: Cache) -> set[str]:
    return {path.name for path in cache.folder.iterdir()} - {"used"}


def refuse() -> None:
    raise AssertionError("it was downloaded again")


def test_a_file_is_downloaded_once_and_checked_by_each_process(tmp_path: Path) -> None:
    held = take(Cache(tmp_path, 10 * SIZE), "a")
    assert held.path.read_bytes() == content_of("a")[:SIZE]
    cache = Cache(tmp_path, 10 * SIZE)
    assert take(cache, "a", refuse).path == held.path
    held.path.write_bytes(b"x" * SIZE)  # as after a power cut
    assert take(Cache(tmp_path, 10 * SIZE), "a").path.read_bytes() == content_of("a")[:SIZE]
    assert names(cache) == {"a", "a.bad"}


def test_what_was_unused_the_longest_goes_and_what_is_held_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 5 * SIZE, patience=0.0)
    held = take(cache, "0")
    for number in range(1, 5):
        take(cache, str(number))
        os.utime(tmp_path / str(number), (number, number))
    os.utime(tmp_path / "0", (0, 0))
    take(cache, "1")  # used again
    take(cache, "5")
    assert names(cache) == {"0", "1", "4", "5"}
    assert held.path.exists()
    every = [held, *(take(cache, str(number)) for number in range(6, 10))]
    with pytest.raises(UserError, match=r"data\.cache_gib = .* is too little: 1,000 bytes more"):
        take(cache, "10")
    every.pop()
    assert take(cache, "10").path.exists()


def test_a_file_larger_than_the_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.cache_gib = .* is too little"):
        take(Cache(tmp_path, SIZE - 1), "a")


def test_what_never_passes_its_check_is_set_aside(tmp_path: Path) -> None:
    tries = []

    def download(descriptor: int) -> None:
        tries.append(os.pwrite(descriptor, b"y" * SIZE, 0))

    with pytest.raises(Corrupt) as caught:
        Cache(tmp_path, 10 * SIZE).hold("a", SIZE, download, lambda path: path.read_bytes() == b"x" * SIZE)
    assert len(tries) == 3
    assert caught.value.path.read_bytes() == b"y" * SIZE
    assert names(Cache(tmp_path, 10 * SIZE)) == {"a.bad"}


def test_a_full_disk_costs_what_is_not_in_use_and_then_ends_with_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path, 10 * SIZE)
    take(cache, "a")

    def allocate(descriptor: int, offset: int, size: int) -> None:
        if names(cache) - {"b.part"}:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    held = take(cache, "b")
    assert names(cache) == {"b"}
    with pytest.raises(UserError, match=rf"the disk of data\.cache = {tmp_path} is full"):
        take(cache, "c")
    assert names(cache) == {"b"}
    assert held.path.exists()


def _loses_its_process(folder: Path) -> None:
    take(Cache(folder, 10 * SIZE), "a", lambda: os.kill(os.getpid(), signal.SIGKILL))


def _counts_downloads(folder: Path, log: Path) -> None:
    cache = Cache(folder, 6 * SIZE)

    def came() -> None:
        with log.open("a") as lines:
            lines.write("x\n")
        time.sleep(0.02)

    for number in range(5):
        held = take(cache, f"key-{number}", came)
        assert held.path.read_bytes() == content_of(f"key-{number}")[:SIZE]


def test_a_download_whose_process_is_killed_is_taken_over(tmp_path: Path) -> None:
    victim = get_context("fork").Process(target=_loses_its_process, args=(tmp_path,))
    victim.start()
    victim.join()
    cache = Cache(tmp_path, 10 * SIZE)
    assert victim.exitcode == -signal.SIGKILL
    assert names(cache) == {"a.part"}
    assert take(cache, "a").path.read_bytes() == content_of("a")[:SIZE]
    assert names(cache) == {"a"}


def test_of_several_processes_one_downloads_and_the_others_wait(tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = get_context("fork")
    processes = [context.Process(target=_counts_downloads, args=(tmp_path / "cache", log)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert log.read_text() == "x\n" * 5
