"""Layouts as `megagpt verify` names them: data x pipeline x tensor, and what else changes the arithmetic's order.

2x2x2          2 replicas of 2 stages of 2 tensor ranks, ZeRO 1, one micro-batch a step
1x1x8/z3/a4    ZeRO stage 3, 4 micro-batches a step
2x1x4/sp       sequence parallelism
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megagpt.config import Parallel
from megagpt.errors import UserError

_FORM = re.compile(r"(\d+)x(\d+)x(\d+)")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one model is cut, and in how many micro-batches a step's rows come."""

    data: int = 1
    pipeline: int = 1
    tensor: int = 1
    zero_stage: int = 1
    accumulation: int = 1
    sequence_parallel: bool = False
    offload: bool = False

    def __str__(self) -> str:
        words = [f"{self.data}x{self.pipeline}x{self.tensor}", f"z{self.zero_stage}", f"a{self.accumulation}"]
        words += ["sp"] if self.sequence_parallel else []
        return "/".join(words + (["offload"] if self.offload else []))

    def ranks(self) -> int:
        return self.data * self.pipeline * self.tensor

    def parallel(self) -> Parallel:
        return Parallel(
            data=self.data,
            pipeline=self.pipeline,
            tensor=self.tensor,
            zero_stage=self.zero_stage,  # pyright: ignore[reportArgumentType]
            sequence_parallel=self.sequence_parallel,
            offload=self.offload,
        )


def parse(text: str) -> Layout:
    """The layout of one word, such as 2x2x2/z1/a3/sp. Raises UserError if it is none."""
    grid, *options = text.split("/")
    sizes = _FORM.fullmatch(grid)
    if sizes is None or not all(int(size) for size in sizes.groups()):
        raise UserError(f"'{text}' is no layout.", "Write data x pipeline x tensor, as in 2x2x2 or 2x2x2/z1/a3/sp.")
    data, pipeline, tensor = map(int, sizes.groups())
    zero_stage, accumulation, flags = 1, 1, set()
    for option in options:
        if re.fullmatch(r"z[0-3]", option):
            zero_stage = int(option[1:])
        elif re.fullmatch(r"a[1-9]\d*", option):
            accumulation = int(option[1:])
        elif option in ("sp", "offload"):
            flags.add(option)
        else:
            raise UserError(
                f"'{option}' in the layout '{text}' means nothing.", "Options: z0 to z3, a1 ..., sp, offload."
            )
    return Layout(
        data=data,
        pipeline=pipeline,
        tensor=tensor,
        zero_stage=zero_stage,
        accumulation=accumulation,
        sequence_parallel="sp" in flags,
        offload="offload" in flags,
    )


SMALL = ("2x1x1/z0/a1", "2x1x1/z3/a3", "1x2x1/z1/a4", "1x1x2/z1/a3/sp", "2x1x2/z2/a1", "1x2x2/z0/a3")
"""On 4 ranks at most: a minute."""
EIGHT = (
    "8x1x1/z0/a1", "8x1x1/z1/a3", "8x1x1/z2/a1", "8x1x1/z3/a3",
    "1x1x8/z0/a1", "1x1x8/z1/a3/sp", "1x4x2/z1/a4", "1x2x4/z1/a3/sp",
    "2x1x4/z0/a3", "2x1x4/z1/a1/sp", "2x1x4/z2/a4", "2x1x4/z3/a3/sp",
    "4x1x2/z0/a1/sp", "4x1x2/z1/a3", "4x1x2/z2/a3/sp", "4x1x2/z3/a1",
    "4x2x1/z0/a3", "4x2x1/z1/a1", "2x4x1/z0/a4", "2x4x1/z1/a3",
    "2x2x2/z0/a1", "2x2x2/z0/a4/sp", "2x2x2/z1/a3", "2x2x2/z1/a4/sp",
)  # fmt: skip
"""On 8 ranks, every axis at every size, each ZeRO stage and accumulation with and without sequence parallelism."""


def defaults(world: int) -> list[Layout]:
    """The layouts that are tried when none is named: those on 8 ranks, or for fewer the small set that fits."""
    return [layout for layout in map(parse, EIGHT if world >= 8 else SMALL) if layout.ranks() <= world]
