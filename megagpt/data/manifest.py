"""`manifest.json`: what a corpus is, and the commit of its build. It is written last; without it there is no corpus.

Its `fingerprint` is the sha256 of everything else in it, as canonical JSON. Since it holds the hash of every shard,
it names the corpus's content wherever the folder lies; the data order is keyed by it, and a checkpoint refers to it.
Paths of the raw files are therefore not in it but in `sources.json`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagpt.data.shards import ShardEntry
from megagpt.data.tables import canonical_json, sha256_of
from megagpt.errors import UserError
from megagpt.files import write_whole

FORMAT = "megagpt corpus 1"
SPLITS = ("train", "heldout")


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Totals of a split. `histogram[b]` documents have 2**b up to 2**(b+1) - 1 tokens, end of text included."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    histogram: tuple[int, ...] = ()

    def __add__(self, other: Counts) -> Counts:
        length = max(len(self.histogram), len(other.histogram))
        mine = self.histogram + (0,) * (length - len(self.histogram))
        theirs = other.histogram + (0,) * (length - len(other.histogram))
        return Counts(
            documents=self.documents + other.documents,
            tokens=self.tokens + other.tokens,
            text_bytes=self.text_bytes + other.text_bytes,
            histogram=tuple(a + b for a, b in zip(mine, theirs, strict=True)),
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of manifest.json, but for the format and the fingerprint, which follow."""

    tokenizer_sha256: str
    vocabulary: int
    end_of_text: int
    dtype: str
    options: dict[str, Any]
    source_files: int
    empty_documents: int
    left_out: dict[str, int] = field(default_factory=dict)
    counts: dict[str, Counts]
    shards: tuple[ShardEntry, ...]

    def body(self) -> dict[str, Any]:
        """What the fingerprint covers."""
        values = dataclasses.asdict(self)
        if not self.left_out:
            del values["left_out"]
        return {"format": FORMAT, **json.loads(canonical_json(values))}

    def fingerprint(self) -> str:
        return sha256_of(canonical_json(self.body()))

    def shards_of(self, split: str) -> tuple[ShardEntry, ...]:
        return tuple(entry for entry in self.shards if entry.split == split)


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Commit the corpus in `folder`."""
    content = {"fingerprint": manifest.fingerprint(), **manifest.body()}
    write_whole(folder / "manifest.json", (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def load_manifest(folder: Path) -> Manifest:
    """Read and check a corpus's manifest. Raises UserError if it is missing, changed or of another version."""
    path = folder / "manifest.json"
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        rule = f"{folder} is not a corpus: it has no manifest.json."
        raise UserError(rule, "Build one with 'megagpt data build', or finish a build that was stopped.") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    return parse_manifest(content, path)


def parse_manifest(text: bytes, path: Path | str) -> Manifest:
    """The manifest with this content; `path` is for messages. Raises UserError as load_manifest."""
    try:
        content = json.loads(text.decode())
        fingerprint, found = content.pop("fingerprint"), content.get("format")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from error
    if found != FORMAT:
        raise UserError(
            f"{path} is of the format '{found}'; this megagpt reads '{FORMAT}'.", "Build the corpus again."
        )
    if sha256_of(canonical_json(content)) != fingerprint:
        rule = f"{path} was changed after it was written: its fingerprint {fingerprint[:12]} does not match."
        raise UserError(rule, "Restore the file, or build the corpus again; no field of it is for editing.")
    try:
        return _parsed(content)
    except (KeyError, TypeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path | str, error: Exception) -> UserError:
    return UserError(f"{path} is not a corpus's manifest: {error!r}.", "Build the corpus again.")


def _parsed(content: dict[str, Any]) -> Manifest:
    fields = {key: value for key, value in content.items() if key != "format"}
    fields["counts"] = {
        split: Counts(**{**counts, "histogram": tuple(counts["histogram"])})
        for split, counts in content["counts"].items()
    }
    fields["shards"] = tuple(ShardEntry(**entry) for entry in content["shards"])
    return Manifest(**fields)
