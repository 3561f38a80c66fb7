"""Build a corpus: raw texts -> tokens -> shards, in tasks that may run anywhere, be killed and be run again.

The input is cut into tasks by its sizes alone. Task 7 writes the shards train-00007-00, heldout-00007-00, ... and
then, in OUT/.build, the marker 00007.json with what it counted; a task with a marker is done. When all are, the
manifest is written, and .build removed. So the bytes of a corpus depend on the input, the tokenizer and the recipe,
and not on the number of processes, their timing or how often the build was killed.
Cost: the tokenizer (2-4 MB/s a core with Hugging Face's); reading, hashing and writing are under 10 % of it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from megagpt.data import sources
from megagpt.data.choose import find_repeats
from megagpt.data.manifest import SPLITS, Counts, Manifest, load_manifest, save_manifest
from megagpt.data.progress import progress
from megagpt.data.sources import Slice
from megagpt.data.tables import canonical_json, sha256_of
from megagpt.data.task import (
    PREPARATION,
    Job,
    Recipe,
    TaskResult,
    hash_task,
    hashes_file,
    is_heldout,
    repeats_file,
    result_of,
    run_task,
)
from megagpt.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer, with_gigatoken
from megagpt.data.workers import Report, Work, run_tasks
from megagpt.errors import UserError
from megagpt.files import require_space, sync_folder, write_whole

_LARGEST_TASK = 128 << 20  # bytes of text: a task is redone after a kill, so it should not take hours
_TRAINING_BYTES = 64 << 20  # of text for a tokenizer; more hardly changes it
_SAMPLE_BYTES = 200_000  # of text, to foresee the size of the shards
_PROOF_SLICES, _PROOF_BYTES = 16, 32_000  # of text, on which a fast tokenizer proves itself


def build(
    inputs: Sequence[str],
    out: Path,
    *,
    tokenizer: Path | None,
    recipe: Recipe,
    processes: int,
    fast: bool = False,
    commands: bool = False,
) -> Manifest:
    """Build the corpus `out` from files, folders or globs; go on where an earlier build was stopped.

    `tokenizer` is a tokenizer.json or a folder with one; None trains one of recipe.vocabulary on the input. `fast`
    lets gigatoken encode, once it has given the same ids as tokenizers for texts from all over this input. `commands`
    allows inputs that are commands.
    A corpus that is already built from the same is left as it is.
    Raises UserError for a bad recipe or input, too little disk space, or a folder that holds another corpus.
    """
    plan = _planned(sources.find_files(inputs, commands=commands), tokenizer, recipe, processes)
    if (out / "manifest.json").exists():
        return _already_built(out, plan)
    _make(out)
    with _locked(out, fcntl.LOCK_EX | fcntl.LOCK_NB):
        if (out / "manifest.json").exists():  # another build has just committed it
            return _already_built(out, plan)
        _agree(out, plan)
        used = plan.tokenizer or _trained_tokenizer(out, plan.tasks, recipe)
        _run(out, plan, used, range(len(plan.tasks)), processes=processes, fast=fast)
        return _commit(out, plan, used)


def _make(out: Path) -> None:
    """The folder of a build, with a place for what is there only until it is done."""
    try:
        (out / PREPARATION).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror}.", "Name a folder that can.") from error


def build_part(
    inputs: Sequence[str],
    out: Path,
    *,
    part: int,
    parts: int,
    tokenizer: Path,
    recipe: Recipe,
    processes: int,
    fast: bool = False,
) -> Manifest | None:
    """Do every `parts`-th task from number `part` on, beside other processes and nodes that do the others.

    Whoever finds all done commits the corpus; None before that. Repeats are known only when every task's hashes are,
    so with recipe.deduplicate each part must be run once more after all have ended. Raises UserError as `build`.
    """
    if not 0 <= part < parts:
        raise UserError(f"--task {part}/{parts} is no part: they count from 0 to {parts - 1}.")
    plan = _planned(sources.find_files(inputs), tokenizer, recipe, processes)
    assert plan.tokenizer is not None, "a tokenizer was given"
    if (out / "manifest.json").exists():
        return _already_built(out, plan)
    _make(out)
    with _locked(out, fcntl.LOCK_SH):
        if not (out / "manifest.json").exists():
            _agree(out, plan)
            mine = range(part, len(plan.tasks), parts)
            _run(out, plan, plan.tokenizer, mine, processes=processes, fast=fast)
        if any(result_of(out, number) is None for number in range(len(plan.tasks))):
            return None
    with _locked(out, fcntl.LOCK_EX):
        if (out / "manifest.json").exists():
            return _already_built(out, plan)
        return _commit(out, plan, plan.tokenizer)


def _planned(files: Sequence[str], tokenizer: Path | None, recipe: Recipe, processes: int) -> _Plan:
    _check(recipe, processes)
    recipe.choice()
    tasks = sources.cut(files, column=recipe.column, tasks=recipe.tasks, largest=_LARGEST_TASK)
    given = None if tokenizer is None else load_tokenizer(tokenizer, recipe.end_of_text)
    return _Plan(recipe, tasks, given)


def _run(out: Path, plan: _Plan, tokenizer: Tokenizer, numbers: Sequence[int], *, processes: int, fast: bool) -> None:
    """Do those of some tasks that are not done; without the repeats that they need, only their hashes."""
    tasks, recipe = plan.tasks, plan.recipe
    job = Job(out, recipe, tokenizer.definition, tokenizer.end_of_text, fast)
    if fast:
        tokenizer = with_gigatoken(tokenizer, _sample(tasks, recipe))  # refused here, once, and not in every task
    if recipe.deduplicate and not _repeats_known(out, tasks):
        waiting = [(number, tasks[number]) for number in numbers if not hashes_file(out, number).exists()]
        _each(f"hashing for {out}", waiting, partial(hash_task, job), processes)
        every = range(len(tasks))
        if not all(hashes_file(out, number).exists() for number in every):
            return
        find_repeats([hashes_file(out, n) for n in every], [repeats_file(out, n) for n in every])
    waiting = [(number, tasks[number]) for number in numbers if result_of(out, number) is None]
    _check_space(out, recipe, tokenizer, [task for _, task in waiting])
    _each(f"building {out}", waiting, partial(run_task, job), processes)


def _repeats_known(out: Path, tasks: Sequence[object]) -> bool:
    return all(repeats_file(out, number).exists() for number in range(len(tasks)))


def _each(label: str, waiting: list[tuple[int, list[Slice]]], work: Work, processes: int) -> None:
    with progress(label, sum(piece.text_bytes for _, task in waiting for piece in task)) as report:
        run_tasks(waiting, work, processes=processes, report=report)


def _sample(tasks: Sequence[Sequence[Slice]], recipe: Recipe) -> tuple[str, ...]:
    """The first texts of slices all over the input: what a fast tokenizer must prove itself on."""
    slices = list(chain.from_iterable(tasks))
    choice, found = recipe.choice(), []
    for piece in slices[:: max(1, len(slices) // _PROOF_SLICES)]:
        left = _PROOF_BYTES
        for document, taken in choice.read(piece):
            found.append(document.text if taken else "")
            left -= len(document.utf8)
            if left <= 0:
                break
    return tuple(found)


def _check(recipe: Recipe, processes: int) -> None:
    if not 0 <= recipe.heldout < 1:
        raise UserError(
            f"heldout = {recipe.heldout} must be at least 0 and below 1: the share of documents kept aside."
        )
    for name, value in (("tasks", recipe.tasks), ("processes", processes), ("block_tokens", recipe.block_tokens)):
        if value < 1:
            raise UserError(f"{name} = {value} must be at least 1.")


@dataclass(frozen=True)
class _Plan:
    """What is to be built, in words that a later build can compare with its own."""

    recipe: Recipe
    tasks: list[list[Slice]]
    tokenizer: Tokenizer | None

    def sources(self) -> bytes:
        """sources.json: a line a slice, in order."""
        return _lines(
            {"task": number, **dataclasses.asdict(piece)} for number, task in enumerate(self.tasks) for piece in task
        )

    def identity(self) -> dict[str, Any]:
        files = sorted({piece.path for task in self.tasks for piece in task if piece.kind != "command"})
        stamps = [[path, Path(path).stat().st_size, Path(path).stat().st_mtime_ns] for path in files]
        return {
            "recipe": self.recipe.options(),
            "sources": sha256_of(self.sources()),
            "stamps": sha256_of(canonical_json(stamps)),
            "tokenizer": "" if self.tokenizer is None else self.tokenizer.sha256(),
        }


def _lines(values: Iterable[Any]) -> bytes:
    """A JSON array, a line a value."""
    return b"[\n" + b",\n".join(map(canonical_json, values)) + b"\n]\n"


def _already_built(out: Path, plan: _Plan) -> Manifest:
    manifest = load_manifest(out)
    tokenizer = manifest.tokenizer_sha256 if plan.tokenizer is None else plan.tokenizer.sha256()
    same = (out / "sources.json").is_file() and (out / "sources.json").read_bytes() == plan.sources()
    if not same or manifest.options != plan.recipe.options() or manifest.tokenizer_sha256 != tokenizer:
        raise UserError(f"{out} already holds a corpus, built from other input or options.", "Name another folder.")
    shutil.rmtree(out / PREPARATION, ignore_errors=True)
    return manifest


@contextmanager
def _locked(out: Path, operation: int) -> Iterator[None]:
    """Hold the folder, alone or with others that do a part; the kernel lets go of it however this process ends.

    Who holds it alone leaves no temporary file: of a build that was killed, or of workers that were ended.
    """
    with (out / PREPARATION / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, operation)
        except OSError as error:
            raise UserError(f"another build is writing to {out}.", "Wait for it, or name another folder.") from error
        alone = bool(operation & fcntl.LOCK_EX)
        try:
            if alone:
                _remove_temporaries(out)
            yield
        finally:
            if alone:
                _remove_temporaries(out)


def _remove_temporaries(out: Path) -> None:
    for leftover in chain(out.glob(".*.tmp"), (out / PREPARATION).glob(".*.tmp")):
        leftover.unlink(missing_ok=True)


def _agree(out: Path, plan: _Plan) -> None:
    """Begin the build, or see that the one begun here was the same. Raises UserError if not."""
    path = out / PREPARATION / "plan.json"
    identity = plan.identity()
    if not path.exists():
        write_whole(path, canonical_json(identity))
        return
    begun = json.loads(path.read_bytes())
    changed = [name for name in identity if begun.get(name) != identity[name]]
    if changed:
        words = {"recipe": "options", "sources": "files", "stamps": "changed files", "tokenizer": "tokenizer"}
        raise UserError(
            f"{out} holds an unfinished build with other {' and '.join(words[name] for name in changed)}.",
            "Give the same again to go on with it, or remove the folder.",
        )


def _trained_tokenizer(out: Path, tasks: Sequence[Sequence[Slice]], recipe: Recipe) -> Tokenizer:
    """A tokenizer trained on the beginning of every slice; kept, so that a build that goes on has the same."""
    path = out / PREPARATION / "tokenizer.json"
    if not path.exists():
        slices = list(chain.from_iterable(tasks))
        size = sum(piece.text_bytes for piece in slices)
        share = min(1.0, _TRAINING_BYTES / max(1, size))
        with progress("training the tokenizer", int(share * size)) as report:
            tokenizer = train_tokenizer(_training_texts(slices, share, recipe, report), recipe.vocabulary)
        write_whole(path, tokenizer.definition.encode())
    return load_tokenizer(path)


def _training_texts(slices: Sequence[Slice], share: float, recipe: Recipe, report: Report) -> Iterator[str]:
    """The first `share` of every slice, held-out documents left out."""
    choice = recipe.choice()
    for piece in slices:
        left = share * piece.text_bytes
        for document, taken in choice.read(piece):
            if taken and not is_heldout(document.utf8, recipe.heldout):
                yield document.text
            left -= len(document.utf8)
            report(len(document.utf8))
            if left <= 0:
                break


def _check_space(out: Path, recipe: Recipe, tokenizer: Tokenizer, tasks: Sequence[Sequence[Slice]]) -> None:
    """Foresee the shards' size from the first texts. Raises UserError, before a shard is begun, if it is too much."""
    read = tokens = 0
    choice = recipe.choice()
    for piece in chain.from_iterable(tasks):
        for document, taken in choice.read(piece):
            text, ids = document.text[:_SAMPLE_BYTES], document.ids
            tokens += len(tokenizer.encode_document(text) if ids is None else ids) if taken else 0
            read += min(len(document.utf8), _SAMPLE_BYTES)
            if read >= _SAMPLE_BYTES:
                break
        if read >= _SAMPLE_BYTES:
            break
    text = sum(piece.text_bytes for task in tasks for piece in task)
    needed = int(text / max(1, read) * tokens * tokenizer.dtype().itemsize * 1.05)
    require_space(out, needed, "the corpus")


def _commit(out: Path, plan: _Plan, tokenizer: Tokenizer) -> Manifest:
    """Write what makes the shards a corpus, the manifest last. Raises UserError if there was no text to train on."""
    results = [_finished(out, number) for number in range(len(plan.tasks))]
    left_out = {fate: sum(result.left_out[fate] for result in results) for fate in ("filtered", "repeated")}
    counts = {split: sum((result.counts[split] for result in results), start=Counts()) for split in SPLITS}
    if not counts["train"].documents:
        raise UserError(
            f"no document is left to train on: {counts['heldout'].documents:,} were held out, "
            f"{sum(result.empty_documents for result in results):,} were empty, and {sum(left_out.values()):,} were "
            "filtered or repeated.",
            "Give more text, or a smaller --heldout."
            + (" Look at --where and --filter." if left_out["filtered"] else ""),
        )
    manifest = Manifest(
        tokenizer_sha256=tokenizer.sha256(),
        vocabulary=tokenizer.vocabulary,
        end_of_text=tokenizer.end_of_text,
        dtype=tokenizer.dtype().name,
        options=plan.recipe.options(),
        source_files=len({piece.path for task in plan.tasks for piece in task}),
        empty_documents=sum(result.empty_documents for result in results),
        left_out={fate: count for fate, count in left_out.items() if count},
        counts=counts,
        shards=tuple(entry for result in results for entry in result.shards),
    )
    write_whole(out / "tokenizer.json", tokenizer.definition.encode())
    write_whole(out / "sources.json", plan.sources())
    write_whole(out / "statistics.json", _lines(tally for result in results for tally in result.slices))
    save_manifest(out, manifest)
    shutil.rmtree(out / PREPARATION)
    sync_folder(out)
    return manifest


def _finished(out: Path, number: int) -> TaskResult:
    result = result_of(out, number)
    assert result is not None, "every task was run"
    return result
