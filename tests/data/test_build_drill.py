"""A real corpus of 60 MB, its build killed ten times at random (slow: some minutes of tokenising)."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from megagpt.data.build import build
from megagpt.data.corpus import verify
from megagpt.data.task import PREPARATION, Recipe
from tests.data.test_build import contents

SIZE = 60_000_000
KILLS = 10


def write_corpus(folder: Path) -> int:
    """What Python code and documentation this machine has, up to SIZE bytes, in files of 4 MB; how much it is."""
    folder.mkdir()
    roots = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib")), Path("/usr/share/doc")]
    paths = (path for root in roots for kind in ("*.py", "*.rst.txt", "*.txt") for path in sorted(root.rglob(kind)))
    size = 0
    for path in paths:
        if size >= SIZE:
            break
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        copied = folder / f"{size // 4_000_000:03d}" / f"{size:09d}.txt"
        copied.parent.mkdir(exist_ok=True)
        if text:
            copied.write_text(text, encoding="utf-8")
        size += len(text.encode())
    return size


def steps_done(out: Path) -> int:
    """Tasks hashed, and tasks written."""
    return sum(len(list((out / PREPARATION).glob(kind))) for kind in ("*.hashes", "0*.json"))


@pytest.mark.slow
def test_a_build_of_60_megabytes_killed_ten_times_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    size = write_corpus(tmp_path / "raw")
    if size < SIZE:
        pytest.skip(f"this machine has {size:,} bytes of text")
    recipe = Recipe(heldout=0.01, tasks=60, vocabulary=4096, deduplicate=True)
    build([str(tmp_path / "raw")], tmp_path / "whole", tokenizer=None, recipe=recipe, processes=2)
    words = f"data build {tmp_path}/raw --out {tmp_path}/out --tokenizer {tmp_path}/whole --deduplicate --tasks 60 "
    words += "--heldout 0.01 --vocabulary 4096 --processes 2"
    command = [sys.executable, "-c", "import sys; from megagpt.cli import main; sys.exit(main())", *words.split()]
    generator = random.Random(1)
    for _ in range(KILLS):
        goal = steps_done(tmp_path / "out") + generator.randint(1, 11)  # of 120: all kills fall into the work
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        while steps_done(tmp_path / "out") < goal and process.poll() is None:
            time.sleep(0.01)
        time.sleep(generator.random() / 2)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert verify(tmp_path / "out", repair=False) == []
