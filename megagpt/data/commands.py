"""What `megagpt data build | inspect | verify` do, and the options of each. Heavy imports wait until one runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from megagpt.data.workers import available_cores
from megagpt.errors import UserError

if TYPE_CHECKING:
    from megagpt.data.corpus import Corpus
    from megagpt.data.manifest import Counts, Manifest

_EXCERPT = 160  # characters of a document


@dataclass(frozen=True, kw_only=True)
class Build:
    """Tokenise raw texts into a corpus: any number of processes, and any number of kills, give the same bytes."""

    inputs: Positional[tuple[str, ...]]
    """Parquet, JSONL or text files (.gz and .zst too), folders of them, or globs in quotes."""
    out: Path
    """Folder of the corpus. A build that was stopped goes on there."""
    tokenizer: Path | None = None
    """A tokenizer.json, or a folder with one (another corpus, a Hugging Face model). None: train one on the input."""
    vocabulary: int = 32_768
    """Tokens of the tokenizer, where one is trained; at least 257."""
    column: str = "text"
    """Parquet column or JSONL key that holds the text."""
    heldout: float = 0.005
    """Share of the documents kept out of training for evaluation, from 0 to below 1; chosen by their hash."""
    processes: int = field(default_factory=available_cores)
    """Processes that tokenise, a core each."""
    tasks: int = 16
    """Parts of the input, each with shards of its own: at most so many processes are busy. Large input has more."""
    end_of_text: str = ""
    """The token that ends a document. Empty: <|endoftext|>, </s> or whichever usual one the tokenizer has."""
    where: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Take only documents with COLUMN=VALUE, or !=, <, <=, >, >=; may be given several times, and all must hold."""
    filter: str = ""
    """MODULE:FUNCTION or FILE.py:FUNCTION; takes a text, returns whether the corpus takes it."""
    deduplicate: bool = False
    """Take only the first of documents with exactly the same text."""
    backend: Literal["tokenizers", "gigatoken"] = "tokenizers"
    """What encodes: Hugging Face's tokenizers, or gigatoken if it gives the same ids for a sample of the input."""
    task: str = ""
    """I/N: do only every N-th task from number I on, as one of N processes of a SLURM array; needs --tokenizer."""
    json: bool = False
    """Print the summary as JSON."""


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Take over WebDataset tars of one document a sample (.npy ids, .txt, .json) as a corpus of blocks."""

    tars: Positional[tuple[str, ...]]
    """Local tar files, globs in quotes, or, with --allow-commands, 'pipe:COMMAND ...' for what a command writes."""
    out: Path
    """Folder of the corpus. A conversion that was stopped goes on there."""
    tokenizer: Path
    """The tokenizer of the ids, or for the texts: a tokenizer.json, or a folder with one."""
    column: str = "text"
    """Key of the text in .json members."""
    heldout: float = 0.005
    """Share of the documents kept out of training for evaluation, from 0 to below 1; chosen by their hash."""
    deduplicate: bool = False
    """Take only the first of documents that are exactly the same."""
    processes: int = field(default_factory=available_cores)
    """Processes that work, a core each; a tar is not divided."""
    allow_commands: bool = False
    """Run the commands among the tars, without a shell. Each must write the same whenever it is run."""
    json: bool = False
    """Print the summary as JSON."""


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show what a corpus holds: counts, lengths, and the beginnings of some documents."""

    corpus: Positional[str]
    """Folder or URL of the corpus."""
    documents: int = 3
    """Documents to show the beginning of, spread evenly over the training split."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Read a corpus whole and check every hash. Exit status 2 if anything is broken."""

    corpus: Positional[str]
    """Folder or URL of the corpus."""
    repair: bool = False
    """In a folder: make lost or broken indices and packing plans again, where the shard itself is whole."""
    json: bool = False
    """Print JSON."""


def run_build(options: Build) -> None:
    """`megagpt data build`. Raises UserError for whatever is wrong with input, options or disk."""
    from megagpt.data.build import build, build_part
    from megagpt.data.choose import load_filter
    from megagpt.data.task import Recipe

    recipe = Recipe(
        column=options.column,
        heldout=options.heldout,
        tasks=options.tasks,
        vocabulary=options.vocabulary,
        end_of_text=options.end_of_text,
        where=options.where,
        filter=options.filter,
        filter_sha256=load_filter(options.filter)[1] if options.filter else "",
        deduplicate=options.deduplicate,
    )
    tools: dict[str, Any] = {
        "recipe": recipe,
        "processes": options.processes,
        "fast": options.backend == "gigatoken",
    }
    if options.task:
        part, parts, tokenizer = _part(options)
        found = build_part(options.inputs, options.out, part=part, parts=parts, tokenizer=tokenizer, **tools)
        if found is None:
            print(f"{options.out}: part {part} of {parts} has done what it can; other tasks are not done yet.")
            return
        manifest = found
    else:
        manifest = build(options.inputs, options.out, tokenizer=options.tokenizer, **tools)
    _tell_built(options, manifest)


def _tell_built(options: Build | Convert, manifest: Manifest) -> None:
    if options.json:
        print(json.dumps({"corpus": str(options.out), **_summary(manifest)}))
        return
    _print(_rows(options.out, manifest))
    if not manifest.counts["heldout"].documents and options.heldout:
        print("no document was held out: there is nothing to evaluate on. Give more text or a larger --heldout.")


def run_convert(options: Convert) -> None:
    """`megagpt data convert`. Raises UserError for whatever is wrong with tars, options or disk."""
    from megagpt.data.build import build
    from megagpt.data.sources import find_files, is_command
    from megagpt.data.task import Recipe

    tars = find_files(options.tars, commands=options.allow_commands)
    others = [path for path in tars if not (path.endswith(".tar") or is_command(path))]
    if others:
        raise UserError(
            f"{others[0]} is not a tar.", "Text, JSONL and Parquet become a corpus with 'megagpt data build'."
        )
    manifest = build(
        tars,
        options.out,
        tokenizer=options.tokenizer,
        recipe=Recipe(column=options.column, heldout=options.heldout, deduplicate=options.deduplicate),
        processes=options.processes,
        commands=options.allow_commands,
    )
    _tell_built(options, manifest)


def _part(options: Build) -> tuple[int, int, Path]:
    number, slash, count = options.task.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal()):
        raise UserError(f"--task {options.task} is not I/N, such as 0/64.")
    if options.tokenizer is None:
        raise UserError(
            "--task needs --tokenizer: parts cannot each train one.", "Build a small corpus first, or give one."
        )
    return int(number), int(count), options.tokenizer


def run_inspect(options: Inspect) -> None:
    """`megagpt data inspect`. Raises UserError if the folder is no whole corpus."""
    from megagpt.data.corpus import open_corpus

    corpus = open_corpus(options.corpus)
    excerpts = list(_excerpts(corpus, options.documents))
    if options.json:
        content = {"corpus": str(options.corpus), **_summary(corpus.manifest)}
        print(json.dumps({**content, "options": corpus.manifest.options, "excerpts": excerpts}))
        return
    _print(_rows(options.corpus, corpus.manifest))
    _print([("tokens a document", "train", "held out"), *_histogram(corpus.manifest)])
    for excerpt in excerpts:
        print(f"{excerpt['tokens']:,} tokens: {' '.join(excerpt['text'].split())}")


def run_verify(options: Verify) -> None:
    """`megagpt data verify`. Raises UserError if the folder is no corpus, or anything in it is broken."""
    shards, problems = _verified(options)
    if options.json:
        print(json.dumps({"corpus": str(options.corpus), "shards": shards, "problems": problems}))
    else:
        print("\n".join(problems) or f"{options.corpus}: {shards:,} shards, every hash matches.")
    if problems:
        raise UserError(
            f"the corpus {options.corpus} has {len(problems):,} broken file{'s' * (len(problems) > 1)}.",
            "--repair makes indices and plans again; other files must be copied again, or the corpus rebuilt.",
        )


def _verified(options: Verify) -> tuple[int, list[str]]:
    """The corpus's shards, and what is wrong with it."""
    from megagpt.data.corpus import open_corpus, verify, verify_remote
    from megagpt.data.manifest import load_manifest
    from megagpt.data.pack import verify_plans
    from megagpt.data.store import is_url

    if is_url(str(options.corpus)):
        corpus = open_corpus(str(options.corpus))
        return len(corpus.manifest.shards), verify_remote(corpus)
    folder = Path(options.corpus)
    problems = verify(folder, repair=options.repair) or verify_plans(folder, repair=options.repair)
    return len(load_manifest(folder).shards), problems


def _summary(manifest: Manifest) -> dict[str, Any]:
    return {
        "fingerprint": manifest.fingerprint(),
        "vocabulary": manifest.vocabulary,
        "end_of_text": manifest.end_of_text,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "shards": len(manifest.shards),
        "shard_bytes": sum(entry.tar_bytes + entry.index_bytes for entry in manifest.shards),
        "source_files": manifest.source_files,
        "empty_documents": manifest.empty_documents,
        "left_out": manifest.left_out,
        "splits": {split: dataclasses.asdict(counts) for split, counts in manifest.counts.items()},
    }


def _rows(folder: Path | str, manifest: Manifest) -> list[tuple[str, ...]]:
    def row(name: str, value: str) -> tuple[str, ...]:
        return name, *(format(_figure(manifest.counts[split], name), value) for split in ("train", "heldout"))

    return [
        (str(folder), "train", "held out"),
        row("documents", ",d"),
        row("tokens", ",d"),
        row("text bytes", ",d"),
        row("bytes a token", ".3f"),
        ("shards", *(f"{len(manifest.shards_of(split)):,}" for split in ("train", "heldout"))),
        ("vocabulary", f"{manifest.vocabulary:,}", ""),
        *((f"{fate} documents", f"{count:,}", "") for fate, count in manifest.left_out.items()),
        ("fingerprint", manifest.fingerprint()[:12], ""),
    ]


def _figure(counts: Counts, name: str) -> float:
    words = max(1, counts.tokens - counts.documents)  # an end of text stands for no byte
    figures = {"documents": counts.documents, "tokens": counts.tokens, "text bytes": counts.text_bytes}
    return counts.text_bytes / words if name == "bytes a token" else figures[name]


def _histogram(manifest: Manifest) -> Iterator[tuple[str, ...]]:
    train, heldout = (manifest.counts[split].histogram for split in ("train", "heldout"))
    for bits in range(max(len(train), len(heldout))):
        counts = [histogram[bits] if bits < len(histogram) else 0 for histogram in (train, heldout)]
        if any(counts):
            yield f"{1 << bits:,} to {(2 << bits) - 1:,}", *(f"{count:,}" for count in counts)


def _print(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for name, *values in rows:
        cells = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *cells]).rstrip())
    print()


def _excerpts(corpus: Corpus, count: int) -> Iterator[dict[str, Any]]:
    split, tokenizer = corpus.split("train"), corpus.tokenizer()
    shown = min(count, split.documents)
    wanted = [number * split.documents // shown for number in range(shown)]
    before = 0
    for starts, lengths in split.document_spans():
        for number in (number for number in wanted if before <= number < before + len(starts)):
            start, length = int(starts[number - before]), int(lengths[number - before])
            ids = split.read(start, start + min(length - 1, _EXCERPT))
            yield {"document": number, "tokens": length, "text": tokenizer.decode(ids)[:_EXCERPT]}
        before += len(starts)
