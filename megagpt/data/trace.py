"""Where the tokens of a sequence came from: its documents, and the file and row of each.

Packing answers which documents of the split; and reading the raw input of their task
again, with the same choice of documents, which row each came from. Nothing is stored a document for that. Where the
raw files are gone, statistics.json still tells the file.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.data import pack
from megagpt.data.corpus import Corpus
from megagpt.data.order import Cursor
from megagpt.data.sources import Slice, line_of
from megagpt.data.task import Job, Recipe, fates
from megagpt.errors import UserError


@dataclass(frozen=True)
class Origin:
    """Where a document of a corpus came from; `row` counts from 1, and is None where the raw file is not at hand."""

    path: str
    row: int | None


def documents_of(corpus: Corpus, cursor: Cursor, sequence: int) -> list[int]:
    """The training documents, by number, that a sequence has tokens of."""
    table = pack.open_sequences(corpus, "train", context=cursor.context, packing=cursor.packing)
    ends = np.concatenate([starts + lengths for starts, lengths in corpus.split("train").document_spans()])
    found = []
    for start, length in table.pieces(sequence):
        first, last = np.searchsorted(ends, [start, start + length - 1], "right").tolist()
        found += range(first, last + 1)
    return list(dict.fromkeys(found))


def origins(corpus: Corpus, documents: Sequence[int]) -> dict[int, Origin]:
    """Where training documents of a corpus came from. Raises UserError if it was not built from raw files here."""
    tasks, places = _slices(corpus), sorted(set(documents))
    found: dict[int, Origin] = {}
    before = 0
    for number, (slices, counts) in enumerate(tasks):
        inside = [place - before for place in places if before <= place < before + sum(counts)]
        for place, origin in _origins_in_task(corpus, number, slices, counts, inside):
            found[before + place] = origin
        before += sum(counts)
    return found


def _slices(corpus: Corpus) -> list[tuple[list[Slice], list[int]]]:
    """The slices of each task, with their training documents."""
    tasks: list[tuple[list[Slice], list[int]]] = []
    for source, tally in _table(corpus):
        task = source.pop("task")
        while len(tasks) <= task:
            tasks.append(([], []))
        tasks[task][0].append(Slice(**source))
        tasks[task][1].append(tally["documents"]["train"])
    return tasks


def tallies(corpus: Corpus) -> Iterator[tuple[str, dict[str, Any]]]:
    """For each slice of the raw input: its file, and the counts that it gave (statistics.json)."""
    for source, tally in _table(corpus):
        yield source["path"], tally


def _table(corpus: Corpus) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    sources, found = (json.loads(_content(corpus, name)) for name in ("sources.json", "statistics.json"))
    return list(zip(sources, found, strict=True))


def _content(corpus: Corpus, name: str) -> bytes:
    if corpus.remote is not None:
        return corpus.remote.store.read(name)
    try:
        return (corpus.folder / name).read_bytes()
    except FileNotFoundError as error:
        rule = f"{corpus.folder} does not say where its documents came from: {error.filename} is missing."
        raise UserError(rule, "Build it again, in another folder.") from error


def _origins_in_task(
    corpus: Corpus, number: int, slices: list[Slice], counts: list[int], places: list[int]
) -> Iterator[tuple[int, Origin]]:
    """Of training documents at some places in a task, where they came from: each slice at hand is read until then."""
    if not places:
        return
    if not all(piece.kind != "command" and Path(piece.path).is_file() for piece in slices):
        stops = np.cumsum(counts).tolist()
        yield from ((place, Origin(slices[bisect_right(stops, place)].path, None)) for place in places)
        return
    recipe = Recipe(**{**corpus.manifest.options, "where": tuple(corpus.manifest.options.get("where", ()))})
    job = Job(corpus.folder, recipe, "", corpus.manifest.end_of_text)
    wanted, place = iter(places), -1
    due = next(wanted, None)
    for piece, document, fate in fates(job, number, slices, lambda _: None):
        place += fate == "train"
        if fate == "train" and place == due:
            yield place, Origin(slices[piece].path, line_of(slices[piece], document.row) + 1)
            due = next(wanted, None)
            if due is None:
                return


def decoded(corpus: Corpus, cursor: Cursor, sequence: int) -> tuple[np.ndarray, str]:
    """The tokens of a sequence, and their text."""
    table = pack.open_sequences(corpus, "train", context=cursor.context, packing=cursor.packing)
    row = np.empty(cursor.context + 1, dtype=corpus.manifest.dtype)
    tokens = row[: table.fill(sequence, row)]
    return tokens, corpus.tokenizer().decode(tokens)
