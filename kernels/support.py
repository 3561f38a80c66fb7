"""Whether the kernels can run here, decided without importing Triton."""

from __future__ import annotations

import functools
import importlib.metadata
import os

import torch

OLDEST = (3, 6)
LEAST_CAPABILITY = (8, 0)


def interpreting() -> bool:
    """Whether Triton will run kernels in its interpreter, on a CPU, thousands of times slower: for tests alone."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "off")


@functools.cache
def triton_version() -> str | None:
    """The installed Triton's version, or None."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def obstacle() -> str:
    """Why the kernels cannot run on this machine's GPU or in the interpreter; empty if they can."""
    version = triton_version()
    if version is None:
        return "Triton is not installed"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"Triton is {version}, older than {OLDEST[0]}.{OLDEST[1]}"
    if interpreting():
        return ""
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.version.hip is not None:
        return "they have never run on an AMD GPU"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        return f"the GPU's compute capability is {capability[0]}.{capability[1]}, below 8.0"
    return ""
