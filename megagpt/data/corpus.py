"""A built corpus, open for reading: manifest, tokenizer, and each split as one long row of tokens.

A folder, or a URL, holds manifest.json, tokenizer.json, sources.json and, a shard, NAME.tar and NAME.index. Opening
one reads the manifest and the sizes of the files; shards are mapped, or fetched (fetch.py), when first touched.
Nothing is built, locked or shared between ranks but the node's cache of what was fetched. Letters: n shards.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np

from megagpt.config import Data
from megagpt.data.cache import Cache
from megagpt.data.fetch import REPAIR, LocalShards, Remote, RemoteShard, RemoteShards
from megagpt.data.manifest import Manifest, load_manifest, parse_manifest
from megagpt.data.shards import Shard, ShardEntry, rebuilt_index
from megagpt.data.store import Patience, Store, is_url
from megagpt.data.tables import sha256_of
from megagpt.data.tokenizer import Tokenizer, load_tokenizer
from megagpt.errors import UserError
from megagpt.files import sha256, write_whole

_DEFAULTS = Data()
_MOST_OPEN = 512  # shards of a split that are mapped at once: systems limit maps, and file systems too


class Split:
    """The concatenation of a split's shards. Positions count tokens from its first."""

    def __init__(self, shards: LocalShards | RemoteShards) -> None:
        self.entries, self.dtype = shards.entries, shards.dtype
        self.shards = shards
        self._starts = list(accumulate((entry.tokens for entry in self.entries), initial=0))
        self._open: list[Shard | RemoteShard | None] = [None] * len(self.entries)
        self._opened: deque[int] = deque()
        self.tokens = self._starts[-1]
        self.documents = sum(entry.documents for entry in self.entries)

    def _map(self, number: int) -> Shard | RemoteShard:
        if len(self._opened) == _MOST_OPEN:
            self._open[self._opened.popleft()] = None
        self._opened.append(number)
        shard = self._open[number] = self.shards.open(number)
        return shard

    def ask(self, start: int, stop: int) -> int:
        """Have the tokens [start, stop) fetched, if they are remote; about how many bytes that is."""
        if isinstance(self.shards, LocalShards):
            return 0
        size, stop = 0, min(stop, self.tokens)
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            first, last = self._starts[number], min(stop, self._starts[number + 1])
            size += self.shards.ask(number, start - first, last - first)
            start, number = last, number + 1
        return size

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
    """An opened corpus. `fingerprint` names its content, wherever it lies.

    `location` is the folder or URL as it was given; `folder` holds manifest.json, tokenizer.json and plans: the corpus
    itself, or in the cache what stands for it if the corpus is `remote`.
    """

    folder: Path
    manifest: Manifest
    fingerprint: str
    location: str
    remote: Remote | None = None

    @property
    def name(self) -> str:
        """The last part of its location."""
        return self.location.rstrip("/").rpartition("/")[2]

    def has_heldout(self) -> bool:
        """Whether there are documents to evaluate on."""
        return bool(self.manifest.shards_of("heldout"))

    def split(self, name: str) -> Split:
        """The split `train` or `heldout`. Raises UserError if it has no documents."""
        entries = self.manifest.shards_of(name)
        if not entries:
            raise UserError(
                f"the corpus {self.location} has an empty {name} split.",
                "Build it from more text, or with another --heldout.",
            )
        dtype = np.dtype(self.manifest.dtype)
        if self.remote is None:
            return Split(LocalShards(self.folder, entries, dtype))
        return Split(RemoteShards(self.remote, entries, dtype))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that it was built with. Raises UserError if the file is missing or another one."""
        tokenizer = load_tokenizer(self.folder)
        if tokenizer.sha256() != self.manifest.tokenizer_sha256:
            raise UserError(f"{self.location}/tokenizer.json is not the tokenizer that the corpus was built with.")
        return replace(tokenizer, end_of_text=self.manifest.end_of_text)


def open_corpus(location: Path | str, settings: Data = _DEFAULTS) -> Corpus:
    """Open a built corpus in a folder or at a URL; costs the manifest and a look at each file's size.

    `settings` say how a remote one is read. Raises UserError if it is none, of another version, changed by hand, or a
    shard is missing or short; Unreachable if a store does not answer.
    """
    if is_url(str(location)):
        return _open_remote(str(location), settings)
    folder = Path(location)
    manifest = load_manifest(folder)
    _check_sizes(manifest, str(folder), lambda name: (folder / name).stat().st_size)
    return Corpus(folder=folder, manifest=manifest, fingerprint=manifest.fingerprint(), location=str(folder))


def _check_sizes(manifest: Manifest, location: str, size_of: Callable[[str], int]) -> None:
    for entry in manifest.shards:
        for name, size in ((f"{entry.name}.tar", entry.tar_bytes), (f"{entry.name}.index", entry.index_bytes)):
            try:
                found = size_of(name)
            except (OSError, KeyError) as error:
                raise UserError(f"the corpus {location} lacks {name}.", REPAIR.format(folder=location)) from error
            if found != size:
                rule = f"{location}/{name} has {found:,} bytes where the manifest says {size:,}."
                raise UserError(rule, REPAIR.format(folder=location))


def _open_remote(url: str, settings: Data) -> Corpus:
    """A corpus at a URL, with what stands for it in the cache: manifest, tokenizer, plans that are made."""
    store = Store(url, Patience(budget=settings.patience))
    root = Path(settings.cache).expanduser()
    content = store.read("manifest.json")
    manifest = parse_manifest(content, store.where("manifest.json"))
    sizes = store.sizes()
    if sizes is not None:
        _check_sizes(manifest, url.rstrip("/"), sizes.__getitem__)
    cache = Cache(root / "files", int(settings.cache_gib * 2**30))
    fingerprint = manifest.fingerprint()
    remote = Remote(store, cache, _mode(manifest, cache.limit, settings), fingerprint)
    folder = root / "corpora" / fingerprint
    folder.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(folder=folder, manifest=manifest, fingerprint=fingerprint, location=url.rstrip("/"), remote=remote)
    try:
        corpus.tokenizer()
    except UserError:  # it is not there yet, or a broken one
        write_whole(folder / "tokenizer.json", store.read("tokenizer.json"))
        corpus.tokenizer()
    write_whole(folder / "manifest.json", content)
    return corpus


def _mode(manifest: Manifest, limit: int, settings: Data) -> Literal["shards", "blocks"]:
    """Whole shards or blocks. Raises UserError where the cache does not hold what one step needs."""
    sizes = [entry.tar_bytes + entry.index_bytes for entry in manifest.shards]
    live = 2 * (settings.window or 1)  # shards that are read at a time, and the next ones
    needed = live * max(sizes, default=0)
    mode = settings.remote
    if mode == "auto":
        held = 2 * sum(sizes) <= limit or (settings.window is not None and needed <= limit)
        mode = "shards" if held else "blocks"
    if mode == "shards" and needed > limit:
        raise UserError(
            f"data.cache_gib = {settings.cache_gib:g} does not hold {live} shards of {max(sizes) / 2**30:.3g} GiB, "
            'as data.remote = "shards" needs.',
            "Raise it, or read single blocks with --data.remote blocks.",
        )
    return mode


def open_mixture(mixture: Mapping[str, int], settings: Data = _DEFAULTS) -> list[Corpus]:
    """Open the corpora of `data.mixture` (folder or URL -> weight), in its order; `settings` as for open_corpus.

    Raises UserError for an empty mixture, a weight below 1, one corpus twice, or corpora of different tokenizers.
    """
    if not mixture:
        raise UserError("data.mixture is empty.", "Name at least one corpus: --data.mixture FOLDER 1.")
    for name, weight in mixture.items():
        if weight < 1:
            raise UserError(
                f"data.mixture: {name} has the weight {weight}; it must be at least 1.", "Or leave it out."
            )
    corpora = [open_corpus(name, settings) for name in mixture]
    first, seen = corpora[0], dict[str, str]()
    for corpus in corpora:
        if corpus.fingerprint in seen:
            rule = f"data.mixture: {corpus.location} and {seen[corpus.fingerprint]} are the same corpus."
            raise UserError(rule, "Name it once, with the sum of the weights.")
        seen[corpus.fingerprint] = corpus.location
        mine, theirs = first.manifest, corpus.manifest
        if (mine.tokenizer_sha256, mine.end_of_text) != (theirs.tokenizer_sha256, theirs.end_of_text):
            raise UserError(
                f"data.mixture: {corpus.location} was built with another tokenizer than {first.location}.",
                f"Build it again with --tokenizer {first.location}.",
            )
    return corpora


def verify_remote(corpus: Corpus) -> list[str]:
    """Read a corpus in a store whole and check every hash; what is wrong, a sentence each. Nothing is kept."""
    assert corpus.remote is not None
    store, problems = corpus.remote.store, []
    for entry in corpus.manifest.shards:
        for name, size, expected in (
            (f"{entry.name}.index", entry.index_bytes, entry.index_sha256),
            (f"{entry.name}.tar", entry.tar_bytes, entry.tar_sha256),
        ):
            digest = hashlib.sha256()
            for part in corpus.remote.parts(name, size):
                digest.update(part)
            if digest.hexdigest() != expected:
                problems.append(f"{store.where(name)} does not have the sha256 of the manifest.")
    return problems


def verify(folder: Path, *, repair: bool) -> list[str]:
    """Check every hash of a corpus; what is wrong, a sentence each. `repair` writes lost or broken indices again.

    Raises UserError where there is no readable manifest.
    """
    manifest = load_manifest(folder)
    problems = []
    try:
        Corpus(folder, manifest, manifest.fingerprint(), str(folder)).tokenizer()
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
