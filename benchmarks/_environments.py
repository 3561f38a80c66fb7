"""A virtual environment for each peer, made once: their dependencies conflict with each other and with ours."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


def python_with(requirements: Sequence[str], cache: Path) -> Path:
    """The interpreter of an environment under `cache` that has `requirements`, at the versions of constraints.txt."""
    key = "\n".join((sys.version, CONSTRAINTS.read_text(encoding="utf-8"), *requirements))
    folder = cache / f"{'-'.join(requirements)}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    python, whole = folder / "bin" / "python", folder / "complete"
    if not whole.exists():
        print(f"installing {' '.join(requirements)} into {folder}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "-qq", "--constraint", str(CONSTRAINTS), *requirements]
        subprocess.run(install, check=True)
        whole.touch()
    return python
