"""What the compiler makes of a kernel: registers, spills, shared memory and the instructions of its hot loop.

The kernels' own launchers run on small CPU tensors; each launch is compiled for a GPU that need not exist, with the
very specialisation that a real launch would have, and the machine code is disassembled with Triton's own tools.
Hot loop: of the innermost loops the one with the most tensor-core instructions, else the one with the most
instructions; a kernel without loops counts as a whole.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from megagpt.kernels import tuning

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm86": GPUTarget("cuda", 86, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm80": 166_912, "sm86": 101_376, "sm90": 232_448, "sm100": 232_448, "gfx942": 65_536}
SHARED_PER_SM = {"sm80": 167_936, "sm86": 102_400, "sm90": 233_472, "sm100": 233_472}
# Of one SM: bf16 operations a cycle with fp32 sums, and bytes on their way that cover 700 ns at its share of memory.
OPERATIONS_PER_CYCLE = {"sm80": 2048, "sm86": 512, "sm90": 4096, "sm100": 8192}
BYTES_TO_COVER_LATENCY = {"sm80": 13_200, "sm86": 8_000, "sm90": 17_800, "sm100": 37_800}
TENSOR_CORE = {"sm80": "HMMA", "sm86": "HMMA", "sm90": "HGMMA", "sm100": "UTCHMMA"}


class _AbsentGpu:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        """A number of its own for each target: Triton keeps what it compiled by device alone."""
        return list(TARGETS.values()).index(self.target)

    def get_current_stream(self, device: int | None = None) -> int:  # noqa: ARG002
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@dataclass(frozen=True, kw_only=True)
class Resources:
    """One compiled kernel. `hot` counts the opcodes of one pass of its hot loop, `whole` those of all its code, and
    `skipped` how many of `hot` a forward jump can leave out (the mask of a tile that needs none).
    """

    kernel: str
    architecture: str
    registers: int
    shared_bytes: int
    warps: int
    hot: Counter[str]
    whole: Counter[str]
    skipped: int
    constants: dict[str, Any]
    notes: tuple[str, ...]
    """What ptxas says about serialised tensor-core instructions; empty if it says nothing."""

    def count(self, *opcodes: str, hot: bool = True) -> int:
        """Instructions whose opcode begins with one of `opcodes`."""
        code = self.hot if hot else self.whole
        return sum(number for opcode, number in code.items() if opcode.startswith(opcodes))

    def spills(self, *, hot: bool = True) -> int:
        return self.count("LDL", "STL", hot=hot)

    def blocks_per_sm(self) -> int:
        """Programs that fit on one SM, by registers, shared memory and threads."""
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = 65_536 // max(1, per_warp * self.warps)
        by_shared = SHARED_PER_SM[self.architecture] // max(1024, self.shared_bytes + 1024)
        return min(by_registers, by_shared, (48 if self.architecture == "sm86" else 64) // self.warps, 32)

    def steady_instructions(self) -> int:
        """Instructions of a pass in which no tile needs a mask: those behind the longest forward jump are left out."""
        return self.hot.total() - self.skipped

    def bytes_in_flight(self) -> int:
        """Bytes that one SM has asked for at once, all its programs together, in one pass of the hot loop."""
        lanes = 32 * self.warps * self.blocks_per_sm()
        return sum(width * number for width, number in self.loaded_bytes().items()) * lanes

    def bound(self, operations: float) -> float:
        """The share of the tensor cores' peak that no launch can pass, with so many operations in one pass of the hot
        loop; with none, the share of the memory's rate. `report.py` says on what grounds.
        """
        if operations == 0:
            return min(1.0, self.bytes_in_flight() / BYTES_TO_COVER_LATENCY[self.architecture])
        cycles = operations / OPERATIONS_PER_CYCLE[self.architecture]
        issue = self.steady_instructions() * self.warps / 4  # four schedulers, one instruction each
        exponentials = self.count("MUFU") * self.warps * 32 / 16  # sixteen a cycle
        return cycles / max(cycles, issue, exponentials)

    def loaded_bytes(self) -> dict[int, int]:
        """Width in bytes of one lane's global load -> how many of them one pass of the hot loop has (TMA: 128)."""
        widths: Counter[int] = Counter()
        for opcode, number in self.hot.items():
            if opcode.startswith("UTMALDG"):
                widths[128] += number
            elif opcode.startswith(("LDG", "LDGSTS")):
                found = re.search(r"\.(?:U|S)?(8|16|64|128)(?:\.|$)", opcode.replace(".LTC128B", ""))
                widths[int(found.group(1)) // 8 if found else 4] += number
        return dict(widths)


@contextlib.contextmanager
def compiling_for(architecture: str) -> Iterator[list[Any]]:
    """Inside, a launch compiles its kernel for `architecture` and runs nothing; the list holds what was compiled.

    It leaves Triton without a driver, so it belongs in a process of its own.
    """
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    driver.set_active(cast(Any, _AbsentGpu(TARGETS[architecture])))
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(tuning, "architecture", return_value=architecture),
    ):
        yield compiled


def read(kernel: Any, architecture: str) -> Resources:
    """The resources of a kernel that was compiled for an NVIDIA architecture."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _output("cuobjdump", "--dump-resource-usage", str(cubin))
        code = _output("nvdisasm", "-c", str(cubin))
    instructions = _instructions(code)
    whole = Counter(opcode for _, opcode, _ in instructions)
    tensor = TENSOR_CORE[architecture]
    hot, skipped = whole, 0
    best = (0, 0)
    for start, end in _innermost_loops(instructions):
        loop = Counter(opcode for _, opcode, _ in instructions[start : end + 1])
        weight = (sum(number for opcode, number in loop.items() if opcode.startswith(tensor)), loop.total())
        if weight > best:
            best, hot, skipped = weight, loop, _longest_skip(instructions, start, end)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    return Resources(
        kernel=kernel.metadata.name, architecture=architecture, registers=int(registers.group(1)),
        shared_bytes=kernel.metadata.shared, warps=kernel.metadata.num_warps, whole=whole, hot=hot, skipped=skipped,
        constants={kernel.src.fn.arg_names[at[0]]: value for at, value in kernel.src.constants.items()},
        notes=_serialisation(kernel, architecture),
    )  # fmt: skip


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run(  # noqa: S603
        [str(NVIDIA_TOOLS / tool), *arguments], capture_output=True, text=True, check=True
    ).stdout


def _instructions(code: str) -> list[tuple[str, str, str]]:
    """(label before it or "", opcode, operands) of every instruction of nvdisasm's listing."""
    found, label = [], ""
    for line in code.splitlines():
        if named := re.match(r"\s*(\.L_\w+):", line):
            label = named.group(1)
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(?!NOP)([A-Z][A-Z0-9_.]*)\s*(.*)", line):
            found.append((label, match.group(1), match.group(2)))
            label = ""
    return found


def _jumps(code: list[tuple[str, str, str]]) -> Iterator[tuple[int, int]]:
    """(place, target) of every branch to a label."""
    place = {label: index for index, (label, _, _) in enumerate(code) if label}
    for index, (_, opcode, operands) in enumerate(code):
        target = re.search(r"\.L_\w+", operands)
        if opcode.startswith("BRA") and target and target.group() in place:
            yield index, place[target.group()]


def _innermost_loops(code: list[tuple[str, str, str]]) -> list[tuple[int, int]]:
    """First and last instruction of every loop that holds no smaller one; waits of a few instructions do not count."""
    ends: dict[int, int] = {}
    for index, target in _jumps(code):
        if target < index and index - target > 8:
            ends[target] = max(index, ends.get(target, 0))
    spans = list(ends.items())
    return [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]


def _longest_skip(code: list[tuple[str, str, str]], start: int, end: int) -> int:
    """Instructions that the longest forward jump inside a loop leaves out."""
    return max((to - at - 1 for at, to in _jumps(code) if start <= at < to <= end), default=0)


def _serialisation(kernel: Any, architecture: str) -> tuple[str, ...]:
    """Ptxas's remarks that it had to serialise tensor-core instructions, which only Hopper's can suffer."""
    if architecture != "sm90":
        return ()
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(kernel.asm["ptx"], encoding="utf-8")
        found = subprocess.run(  # noqa: S603
            [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(ptx), "-o", str(Path(folder) / "out.cubin")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    return tuple(sorted(set(re.findall(r"C75\d\d", found.stderr + found.stdout))))
