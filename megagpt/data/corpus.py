"""A built corpus, open for reading: manifest, tokenizer, and each split as one long row of tokens.

A folder holds manifest.json, tokenizer.json, sources.json and, a shard, NAME.tar and NAME.index. Opening one reads
the manifest and the sizes of the files; shards are mapped when first touched. Nothing is built, locked or shared
between ranks. Letters: n shards.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np

from megagpt.data.manifest import Manifest, load_manifest
from megagpt.data.shards import Shard, ShardEntry, rebuilt_index
from megagpt.data.tables import sha256_of
from megagpt.data.tokenizer import Tokenizer, load_tokenizer
from megagpt.errors import UserError
from megagpt.files import sha256, write_whole


class Split:
    """The concatenation of a split's shards. Positions count tokens from its first."""

    def __init__(self, folder: Path, entries: Sequence[ShardEntry], dtype: np.dtype) -> None:
        self.folder, self.entries, self.dtype = folder, entries, dtype
        self._starts = list(accumulate((entry.tokens for entry in entries), initial=0))
        self._open: list[Shard | None] = [None] * len(entries)
        self.tokens = self._starts[-1]
        self.documents = sum(entry.documents for entry in entries)

    def _map(self, number: int) -> Shard:
        try:
            shard = self._open[number] = Shard(self.folder, self.entries[number], self.dtype)
        except (OSError, ValueError) as error:
            raise UserError(f"a shard cannot be read: {error}.", _REPAIR.format(folder=self.folder)) from error
        return shard

    def copy(self, start: int, out: np.ndarray) -> None:
        """out[:] = the tokens from `start` on. `out` may be of any integer type."""
        while True:
            number = bisect_right(self._starts, start) - 1
            shard = self._open[number] or self._map(number)
            here = self._starts[number + 1] - start
            if here >= len(out):
                return shard.copy(start - self._starts[number], out)
            shard.copy(start - self._starts[number], out[:here])
            start, out = start + here, out[here:]

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens [start, stop), in the corpus's own type."""
        out = np.empty(stop - start, dtype=self.dtype)
        self.copy(start, out)
        return out

    def seams(self, start: int, stop: int) -> list[int]:
        """How far from `start` documents begin, those at 0 < distance < stop - start, ascending.

        A list: there are few a sequence, and Python's own integers are faster than numpy's by the handful.
        """
        seams = []
        number = bisect_right(self._starts, start) - 1
        while True:
            before = self._starts[number]
            ends = (self._open[number] or self._map(number)).document_ends
            for end in ends[bisect_right(ends, start - before) :]:
                if end >= stop - before:
                    return seams
                seams.append(end + before - start)
            number += 1
            if self._starts[number] >= stop:
                return seams

    def document_spans(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(start, length) of every document in order, int64 arrays, a shard at a time."""
        for number in range(len(self.entries)):
            ends = np.asarray((self._open[number] or self._map(number)).document_ends, dtype=np.int64)
            lengths = np.diff(ends, prepend=0)
            yield ends - lengths + self._starts[number], lengths


@dataclass(frozen=True)
class Corpus:
    """An opened corpus. `fingerprint` names its content, wherever `folder` lies."""

    folder: Path
    manifest: Manifest
    fingerprint: str

    def split(self, name: str) -> Split:
        """The split `train` or `heldout`. Raises UserError if it has no documents."""
        entries = self.manifest.shards_of(name)
        if not entries:
            raise UserError(
                f"the corpus {self.folder} has an empty {name} split.",
                "Build it from more text, or with another --heldout.",
            )
        return Split(self.folder, entries, np.dtype(self.manifest.dtype))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that it was built with. Raises UserError if the file is missing or another one."""
        tokenizer = load_tokenizer(self.folder)
        if tokenizer.sha256() != self.manifest.tokenizer_sha256:
            raise UserError(f"{self.folder}/tokenizer.json is not the tokenizer that the corpus was built with.")
        return replace(tokenizer, end_of_text=self.manifest.end_of_text)


_REPAIR = "Run 'megagpt data verify {folder}' to see what is broken; copy those files again, or rebuild the corpus."


def open_corpus(folder: Path) -> Corpus:
    """Open a built corpus; costs the manifest and a look at each file's size (verify reads them whole).

    Raises UserError if it is none, of another version, changed by hand, or a shard is missing or short.
    """
    manifest = load_manifest(folder)
    for entry in manifest.shards:
        for name, size in ((f"{entry.name}.tar", entry.tar_bytes), (f"{entry.name}.index", entry.index_bytes)):
            try:
                found = (folder / name).stat().st_size
            except OSError as error:
                raise UserError(f"the corpus {folder} lacks {name}.", _REPAIR.format(folder=folder)) from error
            if found != size:
                rule = f"{folder / name} has {found:,} bytes where the manifest says {size:,}."
                raise UserError(rule, _REPAIR.format(folder=folder))
    return Corpus(folder=folder, manifest=manifest, fingerprint=manifest.fingerprint())


def open_mixture(mixture: Mapping[str, int]) -> list[Corpus]:
    """Open the corpora of `data.mixture` (folder -> weight), in its order.

    Raises UserError for an empty mixture, a weight below 1, one corpus twice, or corpora of different tokenizers.
    """
    if not mixture:
        raise UserError("data.mixture is empty.", "Name at least one corpus: --data.mixture FOLDER 1.")
    for name, weight in mixture.items():
        if weight < 1:
            raise UserError(
                f"data.mixture: {name} has the weight {weight}; it must be at least 1.", "Or leave it out."
            )
    corpora = [open_corpus(Path(name)) for name in mixture]
    first, seen = corpora[0], dict[str, Path]()
    for corpus in corpora:
        if corpus.fingerprint in seen:
            rule = f"data.mixture: {corpus.folder} and {seen[corpus.fingerprint]} are the same corpus."
            raise UserError(rule, "Name it once, with the sum of the weights.")
        seen[corpus.fingerprint] = corpus.folder
        mine, theirs = first.manifest, corpus.manifest
        if (mine.tokenizer_sha256, mine.end_of_text) != (theirs.tokenizer_sha256, theirs.end_of_text):
            raise UserError(
                f"data.mixture: {corpus.folder} was built with another tokenizer than {first.folder}.",
                f"Build it again with --tokenizer {first.folder}.",
            )
    return corpora


def verify(folder: Path, *, repair: bool) -> list[str]:
    """Check every hash of a corpus; what is wrong, a sentence each. `repair` writes lost or broken indices again.

    Raises UserError where there is no readable manifest.
    """
    manifest = load_manifest(folder)
    problems = []
    try:
        Corpus(folder, manifest, manifest.fingerprint()).tokenizer()
    except UserError as error:
        problems.append(error.rule)
    for entry in manifest.shards:
        problems += _verify_shard(folder, entry, np.dtype(manifest.dtype), repair=repair)
    return problems


def _verify_shard(folder: Path, entry: ShardEntry, dtype: np.dtype, *, repair: bool) -> Iterator[str]:
    tar, index = folder / f"{entry.name}.tar", folder / f"{entry.name}.index"
    whole = tar.is_file() and sha256(tar) == entry.tar_sha256
    if not index.is_file() or sha256(index) != entry.index_sha256:
        if whole and repair:
            content = rebuilt_index(tar)
            assert sha256_of(content) == entry.index_sha256, "a shard's index follows from its tar"
            write_whole(index, content)
        else:
            yield f"{index} is missing or broken" + ("; --repair makes it from the tar." if whole else ".")
    if whole:
        return
    if not tar.is_file():
        yield f"{tar} is missing."
    elif tar.stat().st_size != entry.tar_bytes:
        yield f"{tar} has {tar.stat().st_size:,} bytes where the manifest says {entry.tar_bytes:,}."
    else:
        yield f"{tar} does not have the sha256 of the manifest; {_broken_blocks(folder, entry, dtype)}."


def _broken_blocks(folder: Path, entry: ShardEntry, dtype: np.dtype) -> str:
    try:
        blocks = [str(block) for block in Shard(folder, entry, dtype).bad_blocks()]
    except (OSError, ValueError) as error:
        return f"its blocks cannot be told apart ({error})"
    return f"broken blocks: {', '.join(blocks) or 'none, the fault is between them'}"
