"""Boxes: axis-aligned blocks of a tensor, the one shape in which checkpoints store and look up state.

Under ZeRO a rank owns a range of a tensor's elements in row-major order. Of a matrix such a range is at most three
boxes: the end of a row, whole rows, the start of a row:

    . . . . # #        box 1    row 0, columns 4-5
    # # # # # #        box 2    rows 1-2, all columns
    # # # # # #
    # # . . . .        box 3    row 3, columns 0-1
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """The elements [start, start + size) along each dim."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    def elements(self) -> int:
        return math.prod(self.size)

    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(start, start + size) for start, size in zip(self.start, self.size, strict=True))

    def inside(self, outer: Box) -> Box:
        """The same elements, counted from the corner of `outer`."""
        return Box(tuple(a - b for a, b in zip(self.start, outer.start, strict=True)), self.size)


def of_range(shape: Sequence[int], start: int, count: int) -> list[Box]:
    """The boxes, in order, that the row-major elements [start, start + count) of a tensor of `shape` make up."""
    if count == 0:
        return []
    if len(shape) == 0:
        return [Box((), ())]
    if len(shape) == 1:
        return [Box((start,), (count,))]
    row = math.prod(shape[1:])
    stop = start + count
    first, last = start // row, (stop - 1) // row
    if first == last:
        return _in_row(shape, first, start % row, count)
    boxes: list[Box] = []
    if start % row:
        boxes += _in_row(shape, first, start % row, row - start % row)
        first += 1
    whole = stop // row - first
    if whole:
        boxes.append(Box((first, *[0] * (len(shape) - 1)), (whole, *shape[1:])))
    if stop % row:
        boxes += _in_row(shape, last, 0, stop % row)
    return boxes


def _in_row(shape: Sequence[int], row: int, start: int, count: int) -> list[Box]:
    return [Box((row, *box.start), (1, *box.size)) for box in of_range(shape[1:], start, count)]


def overlap(a: Box, b: Box) -> Box | None:
    """The elements in both, or None."""
    start = tuple(max(x, y) for x, y in zip(a.start, b.start, strict=True))
    stop = tuple(min(x + m, y + n) for x, m, y, n in zip(a.start, a.size, b.start, b.size, strict=True))
    size = tuple(last - first for first, last in zip(start, stop, strict=True))
    return Box(start, size) if all(length > 0 for length in size) else None


def fault_in_tiling(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Why `boxes` do not cover each element of `shape` exactly once, in a few words, or None if they do."""
    for box in boxes:
        whole = Box((0,) * len(shape), tuple(shape))
        if len(box.start) != len(shape) or overlap(box, whole) != box:
            return f"{box} reaches outside the shape {tuple(shape)}"
    ordered = sorted(boxes, key=lambda box: box.start)
    for index, box in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if box.size and other.start[0] >= box.start[0] + box.size[0]:
                break  # sorted by their first row: nothing later can meet this box
            if overlap(box, other):
                return f"{box} and {other} overlap"
    covered = sum(box.elements() for box in boxes)
    if covered != math.prod(shape):
        return f"{covered:,} of {math.prod(shape):,} elements are there"
    return None
