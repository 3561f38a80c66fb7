"""The demo's own pieces: text that every machine has, and yardsticks for what a model makes of it.

The text is Python's standard library, as two corpora that share none: prose (docstrings) and code (sources without
their docstrings), so that nothing held out of one can be learnt from the other.

Yardsticks, in bits per byte of the same held-out text, for s -> t two tokens in a row and V the vocabulary:
    unigram   p(t) = (c(t) + 1) / (n + V)                                       counts of the training tokens
    bigram    p(t | s) = (c(s, t) + r(s) p(t)) / (c(s) + r(s))                  r(s): different successors of s
    xz -9     the size of the compressed held-out text; it has seen no training text, and learns as it goes
The bigram is interpolated after Witten and Bell 1991 (doi:10.1109/18.87000), method C.
"""

from __future__ import annotations

import ast
import hashlib
import json
import lzma
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megagpt.files import write_whole

SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "site-packages",  # other programs
        "encodings", "pydoc_data",  # generated tables
        "idle_test", "test", "tests", "turtledemo",
    }
)  # fmt: skip
LEAST_PROSE = 100  # characters: shorter docstrings are mostly a signature in words
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text, and where it stands in the standard library."""

    text: str
    path: str


def write_corpora(folder: Path, *, prose_bytes: int = 3_000_000, code_bytes: int = 6_000_000) -> tuple[Path, Path]:
    """Write prose.jsonl and code.jsonl, of at most so many bytes of text each, and return their paths.

    Where the library holds more, documents are chosen by the hash of their text: the same ones every time, from all
    over the library.
    """
    prose, code = [], []
    for path, source in _sources(Path(sysconfig.get_paths()["stdlib"])):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in the library's own strings
            tree = ast.parse(source)
        prose += [document for document in docstrings(source, tree, path) if len(document.text) >= LEAST_PROSE]
        code.append(Document(text=without_docstrings(source, tree), path=path))
    folder.mkdir(parents=True, exist_ok=True)
    targets = folder / "prose.jsonl", folder / "code.jsonl"
    for target, documents, size in zip(targets, (prose, code), (prose_bytes, code_bytes), strict=True):
        lines = [json.dumps({"text": one.text, "path": one.path}) + "\n" for one in chosen(documents, size)]
        write_whole(target, "".join(lines))
    return targets


def docstrings(source: str, tree: ast.Module, path: str) -> list[Document]:
    """The docstrings of a module, its classes and functions, dedented; each is named by its place in the module."""
    found = _documented(tree, path, source.splitlines())
    return [Document(text=(ast.get_docstring(node) or "") + "\n", path=place) for node, place in found]


def without_docstrings(source: str, tree: ast.Module) -> str:
    """The source without the lines of its docstrings; a body of nothing else becomes `pass`."""
    lines = source.splitlines(keepends=True)
    for node, _ in list(_documented(tree, "", lines)):
        string = node.body[0]
        first, last = string.lineno - 1, string.end_lineno or string.lineno
        lines[first:last] = [""] * (last - first)
        if len(node.body) == 1 and not isinstance(node, ast.Module):
            lines[first] = " " * string.col_offset + "pass\n"
    return "".join(lines).strip("\n") + "\n"


def _documented(node: ast.AST, place: str, lines: Sequence[str]) -> Iterator[tuple[_Documented, str]]:
    """Every module, class and function with a docstring on lines of its own, and its place."""
    if isinstance(node, _Documented) and ast.get_docstring(node, clean=False):
        string = node.body[0]
        if not lines[string.lineno - 1][: string.col_offset].strip():  # not so in: def f(): "text"
            yield node, place
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):  # where statements are; expressions have none
        for child in getattr(node, field, ()):
            named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            yield from _documented(child, f"{place}:{child.name}" if named else place, lines)


def chosen(documents: Iterable[Document], size: int) -> list[Document]:
    """Different texts of at most `size` bytes in all, in the order of their paths: those of the lowest hashes."""
    different = {document.text: document for document in documents}
    kept, total = [], 0
    for document in sorted(different.values(), key=lambda one: hashlib.sha256(one.text.encode()).digest()):
        total += len(document.text.encode())
        if total > size:
            break
        kept.append(document)
    return sorted(kept, key=lambda one: (one.path, one.text))


def yardsticks(
    train_tokens: np.ndarray, heldout_tokens: np.ndarray, token_bytes: np.ndarray, text: bytes
) -> dict[str, float]:
    """Held-out bits per byte of the unigram and bigram models of the training tokens, and of xz -9.

    `train_tokens` and `heldout_tokens` are 1-D token ids, `token_bytes` the bytes that each of the V ids stands for,
    `text` the held-out text that `heldout_tokens` encode. End-of-text tokens cost bits and stand for no byte, as in
    the model's own evaluation. Raises ValueError if one of them is empty.
    """
    if min(len(train_tokens), len(heldout_tokens), len(text)) == 0:
        raise ValueError("yardsticks need training tokens, held-out tokens and held-out text")
    unigram_V = _unigram(train_tokens, len(token_bytes))
    size = int(token_bytes[heldout_tokens].sum())
    unigram = -np.log2(unigram_V[heldout_tokens]).sum()
    bigram = -np.log2(_bigram(train_tokens, heldout_tokens, unigram_V)).sum()
    return {
        "unigram_bits_per_byte": float(unigram / size),
        "bigram_bits_per_byte": float(bigram / size),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }


def _unigram(train_tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    """The probability of each token."""
    return (np.bincount(train_tokens, minlength=vocabulary) + 1.0) / (len(train_tokens) + vocabulary)


def _bigram(train_tokens: np.ndarray, heldout_tokens: np.ndarray, unigram_V: np.ndarray) -> np.ndarray:
    """The probability of each held-out token after the one before it; the first by the unigram model."""
    vocabulary = len(unigram_V)
    seen, counts = np.unique(_pairs(train_tokens, vocabulary), return_counts=True)
    before_V = np.bincount(train_tokens[:-1], minlength=vocabulary)
    successors_V = np.bincount(seen // vocabulary, minlength=vocabulary)
    asked = _pairs(heldout_tokens, vocabulary)
    place = np.searchsorted(seen, asked)
    found = seen[np.minimum(place, len(seen) - 1)] == asked if len(seen) else np.zeros(len(asked), dtype=bool)
    together = np.zeros(len(asked))
    together[found] = counts[place[found]]
    before, after = heldout_tokens[:-1], heldout_tokens[1:]
    weight = np.maximum(successors_V[before], 1)  # a token never seen before another: all to the unigram model
    probability = (together + weight * unigram_V[after]) / (before_V[before] + weight)
    return np.concatenate([unigram_V[heldout_tokens[:1]], probability])


def _pairs(tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    """Each two tokens in a row, as one number."""
    return tokens[:-1].astype(np.int64) * vocabulary + tokens[1:]


def _sources(library: Path) -> Iterator[tuple[str, str]]:
    """(path, text) of the library's own modules, in the order of their paths."""
    for path in sorted(library.rglob("*.py")):
        inner = path.relative_to(library)
        if SKIPPED_FOLDERS.intersection(inner.parts) or path.name.startswith("_sysconfigdata"):
            continue
        yield inner.as_posix(), path.read_text(encoding="utf-8")
