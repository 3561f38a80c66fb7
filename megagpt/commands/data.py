"""What `megagpt data which | replay | mix | stats | convert` do: a run's data, looked at from outside it."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from megagpt.checkpoint.folders import checkpoints_of
from megagpt.checkpoint.lineage import commits
from megagpt.checkpoint.load import read_manifest
from megagpt.checkpoint.saver import beginning
from megagpt.config import Run, load, load_run
from megagpt.data import mixture, order, pack, trace
from megagpt.data.corpus import Corpus, open_corpus, open_mixture
from megagpt.data.order import Cursor
from megagpt.data.substitute import with_substitutes
from megagpt.errors import UserError
from megagpt.files import whole
from megagpt.report.metrics import read_records

_EXCERPT = 160  # characters of a sequence


@dataclass(frozen=True, kw_only=True)
class Which:
    """Name the documents that a step of a run reads: the file and the row or line of each."""

    run: Positional[Path]
    """Folder of the run."""
    step: int
    """Step, counted from 1; it need not have been done yet."""
    rank: int | None = None
    """Data rank whose part of the step to show. None: all of it."""
    json: bool = False
    """Print JSON, a line a sequence."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Show the exact batch of a step, decoded."""

    run: Positional[Path]
    """Folder of the run."""
    step: int
    """Step, counted from 1; it need not have been done yet."""
    rank: int | None = None
    """Data rank whose part of the step to show. None: all of it."""
    out: Path | None = None
    """Write the tokens here, as .npy: sequences x (context + 1), padded with the end of text."""
    json: bool = False
    """Print JSON, a line a sequence, with the whole text."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Say what a run would read of each corpus: tokens, epochs, and how well a window shuffles. Starts nothing."""

    run: Positional[str]
    """A preset or a run.toml."""
    mixture: tuple[str, ...] = ()
    """CORPUS WEIGHT ..., instead of the run's data.mixture."""
    tokens: int | None = None
    """Tokens of the run. None: its own."""
    window: int | None = None
    """Shards shuffled together, instead of the run's data.window."""
    json: bool = False
    """Print JSON, a line a corpus."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Say what each raw file gave to a corpus: documents, tokens, bytes a token, and what was left out."""

    corpus: Positional[Path]
    """Folder of the corpus."""
    json: bool = False
    """Print JSON, a line a file."""


@dataclass(frozen=True)
class StepRows:
    """What one step reads: a stream position, a corpus and a sequence a row.

    `planned` are the sequences by the order alone: others where one was read in place of a broken block's.
    """

    cursor: Cursor
    samples: np.ndarray
    corpus: np.ndarray
    sequence: np.ndarray
    planned: np.ndarray

    def told(self, row: int, corpus: Corpus) -> dict[str, Any]:
        """A row as JSON has it."""
        sequence, planned = int(self.sequence[row]), int(self.planned[row])
        instead = {} if sequence == planned else {"in_place_of": planned}
        return {"position": int(self.samples[row]), "corpus": corpus.location, "sequence": sequence, **instead}


def run_which(options: Which) -> None:
    """`megagpt data which`. Raises UserError if the run, the step or a corpus is not there."""
    run, cursor, corpora = open_run(options.run)
    rows = rows_of_step(options.run, run, cursor, corpora, step=options.step, data_rank=options.rank)
    documents = [trace.documents_of(corpus, cursor, sequence) for corpus, sequence in _each(rows, corpora)]
    needed: dict[Path, list[int]] = defaultdict(list)
    by_folder = {corpus.folder: corpus for corpus in corpora}
    for (corpus, _), numbers in zip(_each(rows, corpora), documents, strict=True):
        needed[corpus.folder] += numbers
    origins = {folder: trace.origins(by_folder[folder], numbers) for folder, numbers in needed.items()}
    for row, ((corpus, _), numbers) in enumerate(zip(_each(rows, corpora), documents, strict=True)):
        found = [(number, origins[corpus.folder][number]) for number in numbers]
        if options.json:
            listed = [{"document": number, **dataclasses.asdict(origin)} for number, origin in found]
            print(json.dumps({**rows.told(row, corpus), "documents": listed}))
        else:
            print(_heading(rows.told(row, corpus)))
            for number, origin in found:
                where = "" if origin.row is None else f":{origin.row}"
                print(f"  document {number:,}  {origin.path}{where}")


def run_replay(options: Replay) -> None:
    """`megagpt data replay`. Raises UserError if the run, the step or a corpus is not there."""
    run, cursor, corpora = open_run(options.run)
    rows = rows_of_step(options.run, run, cursor, corpora, step=options.step, data_rank=options.rank)
    batch = []
    for row, (corpus, sequence) in enumerate(_each(rows, corpora)):
        tokens, text = trace.decoded(corpus, cursor, sequence)
        padding = np.full(cursor.context + 1 - len(tokens), corpus.manifest.end_of_text, dtype=tokens.dtype)
        batch.append(np.concatenate([tokens, padding]))
        if options.json:
            content = {**rows.told(row, corpus), "tokens": tokens.tolist(), "text": text}
            print(json.dumps(content, ensure_ascii=False))
        else:
            print(f"{_heading(rows.told(row, corpus))}, {len(tokens):,} tokens")
            print(f"  {' '.join(text.split())[:_EXCERPT]}")
    if options.out is not None:
        with whole(options.out) as temporary, temporary.open("wb") as file:
            np.save(file, np.stack(batch), allow_pickle=False)


def run_mix(options: Mix) -> None:
    """`megagpt data mix`. Raises UserError if a corpus is not there, or its weight is none."""
    run = load(options.run)
    given = _weights(options.mixture) if options.mixture else run.data.mixture
    window = run.data.window if options.window is None else options.window
    data = dataclasses.replace(run.data, mixture=given, window=window)
    corpora = open_mixture(given, data)
    cursor = beginning(dataclasses.replace(run, data=data), corpora)
    tokens = run.train.tokens if options.tokens is None else options.tokens
    for number, (corpus, share) in enumerate(zip(corpora, mixture.shares(cursor, tokens), strict=True)):
        content: dict[str, Any] = {"corpus": corpus.location, **dataclasses.asdict(share)}
        line = (
            f"{corpus.location}: {share.tokens:,} tokens, {share.epochs:.2f} epochs of {share.sequences:,} sequences"
        )
        if window is not None:
            windowed, full = mixture.runs_at_once(cursor, number)
            content |= {"shards_in_1024_sequences": windowed, "of_a_full_shuffle": full}
            line += f"; 1,024 in a row come from {windowed:.1f} shards (a full shuffle: {full:.1f})"
        print(json.dumps(content) if options.json else line)
    limited = dataclasses.replace(cursor, max_epochs=run.data.max_epochs)
    limited.check_repetition(-(-tokens // cursor.context))


def run_stats(options: Stats) -> None:
    """`megagpt data stats`. Raises UserError if the corpus does not say where it came from."""
    corpus = open_corpus(options.corpus)
    files: dict[str, dict[str, int]] = {}
    for path, tally in trace.tallies(corpus):
        totals = files.setdefault(path, defaultdict(int))
        for name in ("documents", "tokens", "text_bytes"):
            totals[name] += sum(tally[name].values())
        totals["heldout"] += tally["documents"]["heldout"]
        for fate, count in tally["left_out"].items():
            totals[fate] += count
    for path, totals in files.items():
        words = max(1, totals["tokens"] - totals["documents"])
        if options.json:
            print(json.dumps({"path": path, **totals, "bytes_per_token": totals["text_bytes"] / words}))
            continue
        left_out = [f"{totals[fate]:,} {fate}" for fate in ("empty", "filtered", "repeated") if totals[fate]]
        parts = [
            f"{totals['documents']:,} documents ({totals['heldout']:,} held out)",
            f"{totals['tokens']:,} tokens",
            f"{totals['text_bytes'] / words:.3f} bytes a token",
            *left_out,
        ]
        print(f"{path}: {', '.join(parts)}")


def _weights(words: Sequence[str]) -> dict[str, int]:
    if len(words) % 2 or not all(weight.isdecimal() and int(weight) > 0 for weight in words[1::2]):
        raise UserError(f"--mixture {' '.join(words)} is not CORPUS WEIGHT ..., weights being whole numbers from 1.")
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


def _heading(row: dict[str, Any]) -> str:
    instead = f" (in place of {row['in_place_of']:,}, of which a block is broken)" if "in_place_of" in row else ""
    return f"position {row['position']:,}: sequence {row['sequence']:,} of {row['corpus']}{instead}"


def _each(rows: StepRows, corpora: Sequence[Corpus]) -> Iterator[tuple[Corpus, int]]:
    for number, sequence in zip(rows.corpus.tolist(), rows.sequence.tolist(), strict=True):
        yield _corpus_of(rows.cursor, number, corpora), sequence


def open_run(out: Path) -> tuple[Run, Cursor, list[Corpus]]:
    """A run's settings, the newest state of its data (as it begins, before any checkpoint) and its corpora."""
    run = load_run(out)
    corpora = open_mixture(run.data.mixture, run.data)
    for commit in commits(checkpoints_of(run.checkpoint, out)):
        return run, Cursor.from_dict(read_manifest(commit).header["cursor"]), corpora
    return run, beginning(run, corpora), corpora


def rows_of_step(
    out: Path, run: Run, cursor: Cursor, corpora: Sequence[Corpus], *, step: int, data_rank: int | None
) -> StepRows:
    """The rows of a step (counted from 1), or one data rank's part. Raises UserError if there is no such step.

    A step that was done is looked up in metrics.jsonl, since batches may have changed; a later one is computed.
    """
    if step < 1:
        raise UserError(f"--step {step} is no step: they count from 1.")
    first, size = _recorded(out, run, step) or _computed(run, step)
    ranks = run.parallel.data
    share = slice(None)
    if data_rank is not None:
        if not 0 <= data_rank < ranks:
            raise UserError(f"--rank {data_rank} is no data rank: the run has {ranks}, counted from 0.")
        share = slice(data_rank * size // ranks, (data_rank + 1) * size // ranks)
    samples = np.arange(first, first + size)[share]
    number, planned = order.sequences(cursor, samples)
    tables = {
        lost.source: pack.open_sequences(
            _corpus_of(cursor, lost.source, corpora), "train", context=cursor.context, packing=cursor.packing
        )
        for lost in cursor.lost
        if lost.source in number
    }
    return StepRows(cursor, samples, number, with_substitutes(cursor, tables, samples, number, planned), planned)


def _recorded(out: Path, run: Run, step: int) -> tuple[int, int] | None:
    """(sequences before it, sequences of it) of a step that was done; of one done again, the last time."""
    found = [record for record in read_records(out / "metrics.jsonl") if record["step"] == step]
    return (found[-1]["tokens"] // run.model.context - found[-1]["batch"], found[-1]["batch"]) if found else None


def _computed(run: Run, step: int) -> tuple[int, int]:
    consumed = 0
    for _ in range(step - 1):
        consumed += run.train.batch_at(consumed * run.model.context)
    return consumed, run.train.batch_at(consumed * run.model.context)


def _corpus_of(cursor: Cursor, number: int, corpora: Sequence[Corpus]) -> Corpus:
    """The corpus of a source. Raises UserError if the run no longer has it in its mixture."""
    fingerprint = cursor.sources[number].fingerprint
    for corpus in corpora:
        if corpus.fingerprint == fingerprint:
            return corpus
    raise UserError(
        f"the step read a corpus {fingerprint[:12]} that is not in data.mixture of the run.toml.",
        "Put its folder back there.",
    )
