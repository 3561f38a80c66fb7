"""Which documents of the raw input a corpus takes: conditions on columns, a function of the user's, no exact repeats.

Repeats are found in two rounds, so that the answer does not depend on who runs which task. Every task writes the
hashes of its documents, in order (16 bytes of sha256 each); when all have, those are sorted by value, a part of the
values at a time, and of equal ones the first, in the order of tasks and documents, stays.
Memory: 24 bytes a document of a part, of which one has about 16 million, and one byte a document of the input.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.data import sources
from megagpt.data.sources import Document, Slice
from megagpt.errors import UserError
from megagpt.files import write_whole

_RELATIONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_HASH_BYTES = 16
_PART = 1 << 24  # documents whose hashes are sorted at once
Filter = Callable[[str], bool]


@dataclass(frozen=True)
class Condition:
    """What a column of a document must hold. Numbers are compared as numbers, all else as text."""

    column: str
    relation: str
    value: str

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Whether it does; a missing value does not."""
        found = record.get(self.column)
        if found is None:
            return False
        try:
            if not isinstance(found, bool):
                return _RELATIONS[self.relation](float(found), float(self.value))
        except (TypeError, ValueError):
            pass  # one of them is no number
        text = str(found).lower() if isinstance(found, bool) else str(found)
        return _RELATIONS[self.relation](text, self.value)


def parse_condition(words: str) -> Condition:
    """`column=value` and so on. Raises UserError if it has no relation or no column."""
    match = re.fullmatch(r"([^=<>!]+)(=|!=|<=|>=|<|>)(.*)", words, re.DOTALL)
    if match is None:
        raise UserError(f"--where {words} is no condition.", "Write COLUMN=VALUE, or with !=, <, <=, > or >=.")
    return Condition(match[1].strip(), match[2], match[3].strip())


def load_filter(name: str) -> tuple[Filter, str]:
    """The function that `MODULE:FUNCTION` or `FILE.py:FUNCTION` names, and the sha256 of its source file.

    Raises UserError if there is none.
    """
    where, _, function = name.rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            if spec is None or spec.loader is None:
                raise ImportError(f"{where} cannot be loaded")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        found = getattr(module, function)
        source = inspect.getsourcefile(module)
    except (ImportError, AttributeError, OSError, ValueError, SyntaxError, TypeError) as error:
        rule = f"--filter {name} is no function that can be loaded: {error}."
        raise UserError(
            rule, "Write MODULE:FUNCTION or FILE.py:FUNCTION; it takes a text and returns a bool."
        ) from error
    if source is None:
        raise UserError(f"--filter {name} has no Python source, by which a corpus remembers it.")
    return found, hashlib.sha256(Path(source).read_bytes()).hexdigest()


@dataclass(frozen=True)
class Choice:
    """The documents of a build, before repeats are left out."""

    column: str
    conditions: tuple[Condition, ...]
    function: Filter | None
    name: str

    def read(self, piece: Slice) -> Iterator[tuple[Document, bool]]:
        """Every document of a slice, and whether it is taken: an empty one never is.

        Raises UserError as sources.read, if a column of a condition is missing, or if the user's function fails.
        """
        columns = tuple(dict.fromkeys(condition.column for condition in self.conditions))
        for document in sources.read(piece, self.column, columns):
            yield document, bool(document.utf8) and self._takes(document, piece)

    def _takes(self, document: Document, piece: Slice) -> bool:
        if not all(condition.holds(document.record) for condition in self.conditions):
            return False
        if self.function is None:
            return True
        try:
            taken = self.function(document.text)
        except Exception as error:  # the user's own code may raise anything
            where = f"{piece.path}:{sources.line_of(piece, document.row) + 1}"
            raise UserError(f"--filter {self.name} failed at {where}: {error!r}.") from error
        if not isinstance(taken, bool):
            where = f"{piece.path}:{sources.line_of(piece, document.row) + 1}"
            raise UserError(f"--filter {self.name} returned {taken!r} at {where}, where a bool belongs.")
        return taken


def hash_of(document: Document) -> bytes:
    return hashlib.sha256(document.utf8).digest()[:_HASH_BYTES]


def find_repeats(hashes: Sequence[Path], repeats: Sequence[Path]) -> None:
    """Write, for each task's file of hashes, a byte a document: 1 where an earlier one is equal. Cost: a sort."""
    sizes = [path.stat().st_size // _HASH_BYTES for path in hashes]
    flags = [np.zeros(size, dtype=np.uint8) for size in sizes]
    parts = 1 << max(0, (sum(sizes) // _PART).bit_length())
    for part in range(parts):
        found = [_hashes_in(path, part, parts) for path in hashes]
        tasks = np.repeat(np.arange(len(found)), [len(numbers) for numbers, _ in found])
        numbers = np.concatenate([numbers for numbers, _ in found])
        values = np.concatenate([values for _, values in found])
        by_value = np.lexsort((values[:, 1], values[:, 0]))  # stable: equal ones stay in the order of the input
        values = values[by_value]
        again = by_value[1:][(values[1:] == values[:-1]).all(axis=1)]
        for task in np.unique(tasks[again]):
            flags[task][numbers[again][tasks[again] == task]] = 1
    for path, flag in zip(repeats, flags, strict=True):
        write_whole(path, flag.tobytes())


def _hashes_in(path: Path, part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Of one file, the places and values (two words each) of the hashes in one part of all values."""
    values = np.fromfile(path, dtype=">u8").reshape(-1, 2).astype(np.uint64)
    numbers = np.flatnonzero(values[:, 0] % np.uint64(parts) == part)
    return numbers, values[numbers]
