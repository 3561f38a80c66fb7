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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from megagpt.data import sources
from megagpt.data.manifest import SPLITS, Counts, Manifest, load_manifest, save_manifest
from megagpt.data.progress import progress
from megagpt.data.sources import Slice
from megagpt.data.tables import canonical_json, sha256_of
from megagpt.data.task import PREPARATION, Job, Recipe, TaskResult, is_heldout, result_of, run_task
from megagpt.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from megagpt.data.workers import Report, run_tasks
from megagpt.errors import UserError
from megagpt.files import require_space, sync_folder, write_whole

_LARGEST_TASK = 128 << 20  # bytes of text: a task is redone after a kill, so it should not take hours
_TRAINING_BYTES = 64 << 20  # of text for a tokenizer; more hardly changes it
_SAMPLE_BYTES = 200_000  # of text, to foresee the size of the shards


def build(inputs: Sequence[str], out: Path, *, tokenizer: Path | None, recipe: Recipe, processes: int) -> Manifest:
    """Build the corpus `out` from files, folders or globs; go on where an earlier build was stopped.

    `tokenizer` is a tokenizer.json or a folder with one; None trains one of recipe.vocabulary on the input.
    A corpus that is already built from the same is left as it is.
    Raises UserError for a bad recipe or input, too little disk space, or a folder that holds another corpus.
    """
    _check(recipe, processes)
    tasks = sources.cut(sources.find_files(inputs), column=recipe.column, tasks=recipe.tasks, largest=_LARGEST_TASK)
    given = None if tokenizer is None else load_tokenizer(tokenizer, recipe.end_of_text)
    plan = _Plan(recipe, tasks, given)
    if (out / "manifest.json").exists():
        return _already_built(out, plan)
    (out / PREPARATION).mkdir(parents=True, exist_ok=True)
    with _only_builder(out):
        if (out / "manifest.json").exists():  # another build has just committed it
            return _already_built(out, plan)
        _agree(out, plan)
        used = given or _trained_tokenizer(out, tasks, recipe)
        job = Job(out, recipe, used.definition, used.end_of_text)
        waiting = [(number, task) for number, task in enumerate(tasks) if result_of(out, number) is None]
        _check_space(out, job, [task for _, task in waiting])
        size = sum(piece.text_bytes for _, task in waiting for piece in task)
        with progress(f"building {out}", size) as report:
            run_tasks(waiting, partial(run_task, job), processes=processes, report=report)
        return _commit(out, plan, used)


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
        lines = [
            canonical_json({"task": number, **dataclasses.asdict(piece)})
            for number, task in enumerate(self.tasks)
            for piece in task
        ]
        return b"[\n" + b",\n".join(lines) + b"\n]\n"

    def identity(self) -> dict[str, Any]:
        files = sorted({piece.path for task in self.tasks for piece in task})
        stamps = [[path, Path(path).stat().st_size, Path(path).stat().st_mtime_ns] for path in files]
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "sources": sha256_of(self.sources()),
            "stamps": sha256_of(canonical_json(stamps)),
            "tokenizer": "" if self.tokenizer is None else self.tokenizer.sha256(),
        }


def _already_built(out: Path, plan: _Plan) -> Manifest:
    manifest = load_manifest(out)
    tokenizer = manifest.tokenizer_sha256 if plan.tokenizer is None else plan.tokenizer.sha256()
    same = (out / "sources.json").is_file() and (out / "sources.json").read_bytes() == plan.sources()
    if not same or manifest.options != dataclasses.asdict(plan.recipe) or manifest.tokenizer_sha256 != tokenizer:
        raise UserError(f"{out} already holds a corpus, built from other input or options.", "Name another folder.")
    shutil.rmtree(out / PREPARATION, ignore_errors=True)
    return manifest


@contextmanager
def _only_builder(out: Path) -> Iterator[None]:
    """Hold the folder, and leave no temporary file; the kernel lets go of it however this process ends."""
    with (out / PREPARATION / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another build is writing to {out}.", "Wait for it, or name another folder.") from error
        try:
            _remove_temporaries(out)  # of a build that was killed
            yield
        finally:
            _remove_temporaries(out)  # of workers that were ended


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
    for piece in slices:
        left = share * piece.text_bytes
        for document in sources.read(piece, recipe.column):
            if not is_heldout(document.utf8, recipe.heldout):
                yield document.text
            left -= len(document.utf8)
            report(len(document.utf8))
            if left <= 0:
                break


def _check_space(out: Path, job: Job, tasks: Sequence[Sequence[Slice]]) -> None:
    """Foresee the shards' size from the first texts. Raises UserError, before a shard is begun, if it is too much."""
    read = tokens = 0
    tokenizer = job.tokenizer()
    for piece in chain.from_iterable(tasks):
        for document in sources.read(piece, job.recipe.column):
            tokens += len(tokenizer.encode(document.text[:_SAMPLE_BYTES])) + 1
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
    counts = {split: sum((result.counts[split] for result in results), start=Counts()) for split in SPLITS}
    if not counts["train"].documents:
        raise UserError(
            f"no document is left to train on: {counts['heldout'].documents:,} were held out, and "
            f"{sum(result.empty_documents for result in results):,} were empty.",
            "Give more text, or a smaller --heldout.",
        )
    manifest = Manifest(
        tokenizer_sha256=tokenizer.sha256(),
        vocabulary=tokenizer.vocabulary,
        end_of_text=tokenizer.end_of_text,
        dtype=tokenizer.dtype().name,
        options=dataclasses.asdict(plan.recipe),
        source_files=len({piece.path for task in plan.tasks for piece in task}),
        empty_documents=sum(result.empty_documents for result in results),
        counts=counts,
        shards=tuple(entry for result in results for entry in result.shards),
    )
    write_whole(out / "tokenizer.json", tokenizer.definition.encode())
    write_whole(out / "sources.json", plan.sources())
    save_manifest(out, manifest)
    shutil.rmtree(out / PREPARATION)
    sync_folder(out)
    return manifest


def _finished(out: Path, number: int) -> TaskResult:
    result = result_of(out, number)
    assert result is not None, "every task was run"
    return result
