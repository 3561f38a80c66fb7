"""One task of a build: some slices of the input become shards of their own, and then a marker says so.

Task 7 writes train-00007-00.tar, heldout-00007-00.tar and so on with their indices, a further part wherever a shard
is full, and last, in OUT/.build, 00007.json with what it counted. Run twice, it writes the same bytes twice.
A document is held out if the first 8 bytes of its sha256, as a big-endian fraction, are below the held-out share:
equal texts fall on the same side.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from megagpt.data.choose import Choice, hash_of, load_filter, parse_condition
from megagpt.data.manifest import SPLITS, Counts
from megagpt.data.shards import BLOCK_TOKENS, ShardEntry, ShardWriter, open_shard
from megagpt.data.sources import Document, Slice
from megagpt.data.tables import canonical_json
from megagpt.data.tokenizer import Tokenizer, parse_tokenizer, with_gigatoken
from megagpt.data.workers import Report
from megagpt.errors import UserError
from megagpt.files import write_whole

PREPARATION = ".build"
_SHARD_TOKENS = 1 << 27
FATES = ("empty", "filtered", "repeated")  # of documents that are left out


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the bytes of a corpus depend on, besides its input and tokenizer; kept in the manifest."""

    column: str = "text"
    heldout: float = 0.005
    tasks: int = 16
    block_tokens: int = BLOCK_TOKENS
    vocabulary: int = 32_768
    end_of_text: str = ""
    where: tuple[str, ...] = ()
    filter: str = ""
    filter_sha256: str = ""
    deduplicate: bool = False

    def options(self) -> dict[str, Any]:
        """As the manifest keeps it: what leaves documents out only where something does."""
        values = dataclasses.asdict(self)
        off = [name for name in ("where", "filter", "filter_sha256", "deduplicate") if not values[name]]
        return json.loads(canonical_json({name: value for name, value in values.items() if name not in off}))

    def choice(self) -> Choice:
        """Raises UserError if a condition or the filter is none, or the filter's source has changed."""
        conditions = tuple(parse_condition(words) for words in self.where)
        if not self.filter:
            return Choice(self.column, conditions, None, "")
        function, found = load_filter(self.filter)
        if found != self.filter_sha256:
            raise UserError(f"the source of --filter {self.filter} changed while the corpus was built.")
        return Choice(self.column, conditions, function, self.filter)


@dataclass(frozen=True)
class Job:
    """What a worker must know besides its task. `fast`: gigatoken encodes, which has proved itself before."""

    out: Path
    recipe: Recipe
    definition: str
    end_of_text: int
    fast: bool = False

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded once a process."""
        tokenizer = parse_tokenizer(self.definition, source="tokenizer.json", end_of_text=self.recipe.end_of_text)
        tokenizer = dataclasses.replace(tokenizer, end_of_text=self.end_of_text)
        return with_gigatoken(tokenizer, ()) if self.fast else tokenizer


@dataclass(frozen=True)
class TaskResult:
    """What a marker holds. `left_out` counts the documents that conditions or repetition kept out."""

    empty_documents: int
    left_out: dict[str, int]
    slices: list[dict[str, Any]]
    counts: dict[str, Counts]
    shards: tuple[ShardEntry, ...]


def is_heldout(utf8: bytes, share: float) -> bool:
    """Whether a document is kept out of training: by its content alone."""
    return share > 0 and int.from_bytes(hashlib.sha256(utf8).digest()[:8], "big") < int(share * 2**64)


def run_task(job: Job, task: tuple[int, Sequence[Slice]], report: Report) -> None:
    """Tokenise one task's slices into its shards and mark it done. Reports bytes of text, as estimated."""
    number, slices = task
    tokenizer = job.tokenizer
    tallies = [_Tally() for _ in slices]
    with ExitStack() as stack:
        writers = {split: stack.enter_context(_SplitWriter(job, split, number, tokenizer.dtype())) for split in SPLITS}
        for piece, document, fate in fates(job, number, slices, report):
            tally = tallies[piece]
            if fate in SPLITS:
                ids, text_bytes = _tokens(tokenizer, document, slices[piece])
                writers[fate].add(ids, text_bytes)
                tally.documents[fate] += 1
                tally.tokens[fate] += len(ids)
                tally.text_bytes[fate] += text_bytes
            else:
                tally.left_out[fate] = tally.left_out.get(fate, 0) + 1
    left_out = {fate: sum(tally.left_out.get(fate, 0) for tally in tallies) for fate in FATES}
    result = {
        "empty_documents": left_out.pop("empty"),
        "left_out": left_out,
        "slices": [dataclasses.asdict(tally) for tally in tallies],
        "counts": {split: dataclasses.asdict(writers[split].counts()) for split in SPLITS},
        "shards": [dataclasses.asdict(entry) for split in SPLITS for entry in writers[split].entries],
    }
    write_whole(marker(job.out, number), canonical_json(result))


def _tokens(tokenizer: Tokenizer, document: Document, piece: Slice) -> tuple[np.ndarray, int]:
    """A document's ids, end of text included, and the bytes of its text."""
    if document.ids is None:
        return tokenizer.encode_document(document.text), len(document.utf8)
    try:
        ids = tokenizer.checked(document.ids)
    except ValueError as error:
        raise UserError(f"{piece.path}: document {document.row + 1:,} {error}.") from error
    return ids, len(tokenizer.decode(ids[:-1]).encode())


@dataclass
class _Tally:
    """What one slice gave: documents, tokens (ends of text included) and bytes of each split."""

    documents: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    text_bytes: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)


def fates(
    job: Job, number: int, slices: Sequence[Slice], report: Report
) -> Iterator[tuple[int, Document, Literal["train", "heldout", "empty", "filtered", "repeated"]]]:
    """Every document of a task in order: its slice's place, itself, and where it goes. Reports bytes, as estimated."""
    repeated = _repeats(job, number)
    for place, (document, taken) in _documents(job.recipe.choice(), slices, report):
        if not document.utf8:
            yield place, document, "empty"
        elif not taken:
            yield place, document, "filtered"
        elif next(repeated):
            yield place, document, "repeated"
        else:
            yield place, document, "heldout" if is_heldout(document.utf8, job.recipe.heldout) else "train"


def _repeats(job: Job, number: int) -> Iterator[int]:
    return iter(repeats_file(job.out, number).read_bytes()) if job.recipe.deduplicate else itertools.repeat(0)


def _documents(choice: Choice, slices: Sequence[Slice], report: Report) -> Iterator[tuple[int, tuple[Document, bool]]]:
    for place, piece in enumerate(slices):
        left = piece.text_bytes
        for document, taken in choice.read(piece):
            yield place, (document, taken)
            done = min(left, len(document.utf8))
            left -= done
            report(done)
        report(left)


def hash_task(job: Job, task: tuple[int, Sequence[Slice]], report: Report) -> None:
    """Write the hashes of a task's documents, by which repeats are found before any shard is written."""
    number, slices = task
    chosen = _documents(job.recipe.choice(), slices, report)
    write_whole(hashes_file(job.out, number), b"".join(hash_of(document) for _, (document, taken) in chosen if taken))


def hashes_file(out: Path, number: int) -> Path:
    return out / PREPARATION / f"{number:05d}.hashes"


def repeats_file(out: Path, number: int) -> Path:
    return out / f"repeats-{number:05d}.bytes"


def marker(out: Path, number: int) -> Path:
    return out / PREPARATION / f"{number:05d}.json"


def result_of(out: Path, number: int) -> TaskResult | None:
    """What a finished task left; None if it has to be run (again)."""
    try:
        content = json.loads(marker(out, number).read_bytes())
    except FileNotFoundError:
        return None
    shards = tuple(ShardEntry(**entry) for entry in content["shards"])
    for entry in shards:
        for name, size in ((f"{entry.name}.tar", entry.tar_bytes), (f"{entry.name}.index", entry.index_bytes)):
            if not (out / name).is_file() or (out / name).stat().st_size != size:
                return None
    counts = {
        split: Counts(**{**found, "histogram": tuple(found["histogram"])})
        for split, found in content["counts"].items()
    }
    return TaskResult(content["empty_documents"], content["left_out"], content["slices"], counts, shards)


class _SplitWriter:
    """The shards of one split in one task, the next begun where one is full. A context, closed by the task's end."""

    def __init__(self, job: Job, split: str, task: int, dtype: np.dtype) -> None:
        self.job, self.split, self.task, self.dtype = job, split, task, dtype
        self.entries: list[ShardEntry] = []
        self._text_bytes = 0
        self._histogram = [0] * 32
        self._shard: ShardWriter | None = None
        self._stack = ExitStack()

    def __enter__(self) -> _SplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish_shard()
        else:
            self._stack.__exit__(kind, error, trace)

    def _name(self) -> str:
        return f"{self.split}-{self.task:05d}-{len(self.entries):02d}"

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        if self._shard is not None and self._shard.tokens + len(ids) > _SHARD_TOKENS:
            self._finish_shard()
        if self._shard is None:
            shard = open_shard(self.job.out, self._name(), dtype=self.dtype, block_tokens=self.job.recipe.block_tokens)
            self._shard = self._stack.enter_context(shard)
        self._shard.add(ids)
        self._text_bytes += text_bytes
        self._histogram[len(ids).bit_length() - 1] += 1

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self._stack.close()
            self.entries.append(self._shard.entry(self.job.out, self._name(), self.split))
            self._shard = None

    def counts(self) -> Counts:
        used = max((size for size, count in enumerate(self._histogram, start=1) if count), default=0)
        return Counts(
            documents=sum(entry.documents for entry in self.entries),
            tokens=sum(entry.tokens for entry in self.entries),
            text_bytes=self._text_bytes,
            histogram=tuple(self._histogram[:used]),
        )
