"""Whole runs on forked ranks, with faults planted in one of them."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from megagpt import outcome
from megagpt.checkpoint import lineage
from megagpt.checkpoint.folders import folder_at
from megagpt.config import Checkpoint, Heal, Parallel, Report, Train
from megagpt.heal.goodput import goodput
from megagpt.heal.watchdog import HANG_STATUS
from megagpt.parallel import ranks
from tests.heal.test_skips import spoilt_loss
from tests.test_train import fit, kill_at, losses, records, run_of

STEPS = 24
TRAIN = Train(
    tokens=STEPS * 4 * 32,
    global_batch=4,
    micro_batch=2,
    precision="fp32",
    eval_every=0,
    eval_sequences=4,
    guard_every=5,
)
SPIKE = Heal(spike_score=8.0, spike_steps=2, spike_window=8)
LAYOUTS = [Parallel(data=2), Parallel(data=2, zero_stage=3), Parallel(pipeline=2)]


def patient(corpora: dict[str, Path], **sections: Any) -> Any:
    """A run of 24 steps that is saved every five."""
    values = {"train": TRAIN, "checkpoint": Checkpoint(every=5, keep=9), **sections}
    return run_of(corpora, **values)


def events(out: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in records(out, "events") if event["event"] == name]


def final_weights(out: Path) -> list[bytes]:
    commit = next(lineage.commits(folder_at(out / "checkpoints")))
    files = (out / "checkpoints").glob(f"gen-{commit.generation:04d}/step-{commit.step:09d}/*.safetensors")
    found = [path.read_bytes() for path in sorted(files)]
    assert found
    return found


def spiking(*steps: int) -> Any:
    """Every rank sees a loss of 50 in the steps that the engine does as its `steps`-th."""

    def plant() -> None:
        from megagpt.parallel.engine import Engine

        train, count = Engine.train_batch, itertools.count(1)

        def train_batch(self: Engine, *arguments: Any, **values: Any) -> Any:
            done = train(self, *arguments, **values)
            return dataclasses.replace(done, loss=50.0) if next(count) in steps else done

        Engine.train_batch = train_batch  # type: ignore[method-assign]

    return plant


def told_to_skip(step: int, positions: tuple[int, int]) -> Any:
    """The run that continues after `step` leaves out these positions."""

    def plant() -> None:
        from megagpt.checkpoint.saver import Saver

        resume = Saver.resume

        def skipping(self: Saver, *arguments: Any, **values: Any) -> Any:
            progress = resume(self, *arguments, **values)
            assert progress.step == step
            progress.cursor = progress.cursor.skipping(*positions)
            return progress

        Saver.resume = skipping  # type: ignore[method-assign]

    return plant


@pytest.mark.parametrize("layout", LAYOUTS, ids=["zero 1", "zero 3", "pipeline"])
def test_after_a_spike_the_run_is_bit_for_bit_one_that_was_told_to_skip_the_data(corpora, tmp_path, layout):
    run = patient(corpora, parallel=layout, heal=SPIKE)
    assert fit(run, tmp_path / "healed", before=spiking(12, 13)) == 0
    (spike,) = events(tmp_path / "healed", "spike")
    assert (spike["step"], spike["began"], spike["rank"]) == (13, 12, None)
    assert spike["action"] == "back to step 10, without the sequences 40 to 51"
    short = dataclasses.replace(run, train=dataclasses.replace(TRAIN, steps=10))
    assert fit(short, tmp_path / "told") == 0
    assert fit(run, tmp_path / "told", before=told_to_skip(10, (40, 52))) == 0
    assert losses(tmp_path / "healed") == losses(tmp_path / "told")
    assert final_weights(tmp_path / "healed") == final_weights(tmp_path / "told")
    assert [step for step, *_ in losses(tmp_path / "healed")] == list(range(1, STEPS + 1))


def test_a_run_killed_after_it_went_back_does_not_read_what_it_left_out(corpora, tmp_path):
    run = patient(corpora, heal=SPIKE)
    assert fit(run, tmp_path / "straight", before=spiking(12, 13)) == 0

    def both() -> None:
        spiking(12, 13)()
        kill_at(14, rank=1)()

    assert fit(run, tmp_path / "killed", before=both) == 128 + signal.SIGKILL
    assert fit(run, tmp_path / "killed") == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")


def test_spikes_that_go_on_end_the_run_as_diverged(corpora, tmp_path, capfd):
    run = patient(corpora, heal=dataclasses.replace(SPIKE, rollbacks=1))
    assert fit(run, tmp_path, before=spiking(12, 13, 15, 16)) == 1
    assert "heal.rollbacks = 1: the run has diverged" in capfd.readouterr().err
    assert [event["event"] for event in records(tmp_path, "events")][-1] == "diverged"


def test_a_spike_without_a_checkpoint_before_it_is_told_and_let_pass(corpora, tmp_path):
    run = patient(corpora, heal=SPIKE, checkpoint=Checkpoint(every=0))
    assert fit(run, tmp_path, before=spiking(12, 13)) == 0
    assert [event["action"] for event in events(tmp_path, "spike")] == ["none: there is no checkpoint before it"]
    assert len(losses(tmp_path)) == STEPS


def skipping(*steps: int) -> Any:
    """The loss of these steps is not a number on rank 1, whichever attempt does them."""

    def plant() -> None:
        from megagpt.report.journal import Journal
        from megagpt.train import Engine

        train, told, reached = Engine.train_batch, Journal.step, [0]

        def step(self: Journal, *arguments: Any, **values: Any) -> None:
            told(self, *arguments, **values)
            reached[0] = values["step"]

        def train_batch(self: Engine, *arguments: Any, **values: Any) -> Any:
            if reached[0] + 1 in steps:
                spoilt_loss(self)
            return train(self, *arguments, **values)

        Journal.step, Engine.train_batch = step, train_batch  # type: ignore[method-assign]

    return plant


def test_steps_that_an_attempt_skipped_after_its_last_commit_count_against_the_budget_of_the_next(
    corpora, tmp_path, capfd
):
    run = patient(corpora, heal=Heal(skip_budget=1))

    def before_the_commit_is_lost() -> None:
        skipping(7)()
        kill_at(8, rank=0)()

    assert fit(run, tmp_path, before=before_the_commit_is_lost) == 128 + signal.SIGKILL
    assert [event["step"] for event in events(tmp_path, "skipped")] == [7]
    assert fit(run, tmp_path, before=skipping(12)) == 1
    assert "is one of 2 such steps among the last 100" in capfd.readouterr().err


def stuck_at(step: int, *, rank: int, how: str) -> Any:
    """After `step`, this rank sleeps for ever, or its process is stopped."""

    def plant() -> None:
        from megagpt.report.journal import Journal

        told = Journal.step

        def then_stick(self: Journal, *arguments: Any, **values: Any) -> None:
            told(self, *arguments, **values)
            if values["step"] == step and ranks.rank() == rank:
                if how == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(600)

        Journal.step = then_stick  # type: ignore[method-assign]

    return plant


@pytest.mark.parametrize(("rank", "how"), [(1, "stopped"), (0, "asleep")])
def test_a_rank_that_hangs_is_named_and_all_leave_their_stacks(corpora, tmp_path, rank, how, capfd):
    heal = Heal(hang_factor=3.0, hang_seconds=2.0, slow_seconds=60.0)
    assert fit(patient(corpora, heal=heal), tmp_path, before=stuck_at(14, rank=rank, how=how)) == HANG_STATUS
    said = capfd.readouterr().err.splitlines()[-1]
    assert f"the run hangs: rank {rank} on " in said
    (event,) = events(tmp_path, "hang")
    assert (event["rank"], event["step"], event["action"]) == (rank, 14, "ended")
    folder = tmp_path / "attempts" / "0001"
    word = outcome.read(folder / f"rank-{rank:05d}.json")
    assert word is not None
    assert (word.cause, word.rank, word.retry) == ("hang", rank, "back_off")
    stacks = {path.name: path.read_text() for path in folder.glob("stacks-*.txt")}
    assert "in lowest_over_ranks" in stacks[f"stacks-{1 - rank:05d}.txt"]
    if how == "asleep":
        assert "in then_stick" in stacks[f"stacks-{rank:05d}.txt"]
        assert "then_stick" in said
    else:
        assert "its process has not run for" in said
    split = goodput(tmp_path, mtbf_hours=0)
    assert split is not None
    assert split.seconds["hang"] > 2


def slowed(rank: int, seconds: float) -> Any:
    """Each forward pass takes a rank so much longer."""

    def plant() -> None:
        from megagpt.model import Embedding

        forward = Embedding.forward

        def slow(self: Embedding, *arguments: Any) -> Any:
            if ranks.rank() == rank:
                time.sleep(seconds)
            return forward(self, *arguments)

        Embedding.forward = slow  # type: ignore[method-assign]

    return plant


def test_a_slow_rank_is_reported_with_its_score(corpora, tmp_path):
    run = patient(corpora, heal=Heal(straggler=2.0), report=Report(every=8))
    assert fit(run, tmp_path, before=slowed(1, 0.05)) == 0
    found = events(tmp_path, "straggler")
    assert [(event["step"], event["rank"]) for event in found] == [(8, 1), (16, 1), (24, 1)]
    assert "times its peers'" in found[0]["cause"]


@pytest.mark.parametrize("layout", [*LAYOUTS, Parallel(tensor=2)], ids=["zero 1", "zero 3", "pipeline", "tensor"])
def test_a_step_computed_twice_changes_nothing_and_finds_the_rank_that_computes_wrongly(
    corpora, tmp_path, layout, capfd
):
    short = dataclasses.replace(TRAIN, steps=6, eval_every=0)
    run = patient(corpora, parallel=layout, train=short, checkpoint=Checkpoint(every=0))
    assert fit(run, tmp_path / "plain") == 0
    careful = dataclasses.replace(run, heal=Heal(recompute_every=2))
    assert fit(careful, tmp_path / "careful") == 0
    assert losses(tmp_path / "careful") == losses(tmp_path / "plain")
    assert final_weights(tmp_path / "careful") == final_weights(tmp_path / "plain")
    assert fit(careful, tmp_path / "spoilt", before=wrong_once(rank=1, passes=3)) == 1
    assert "a step computed twice gave two results: the output of rank" in capfd.readouterr().err
    (event,) = events(tmp_path / "spoilt", "corruption")
    assert event["rank"] == 1
    word = outcome.read(tmp_path / "spoilt" / "attempts" / "0001" / "rank-00001.json")
    assert word is not None
    assert (word.cause, word.retry) == ("corruption", "exclude_node")


def wrong_once(*, rank: int, passes: int) -> Any:
    """One number of a norm's output is a little off on this rank, in the `passes`-th forward pass of a norm there."""

    def plant() -> None:
        from megagpt.modules import LayerNorm

        forward, count = LayerNorm.forward, itertools.count(1)

        def spoilt(self: LayerNorm, *arguments: Any) -> Any:
            found = forward(self, *arguments).clone()
            if ranks.rank() == rank and next(count) == passes:
                found.view(-1)[3] += 2.0**-20
            return found

        LayerNorm.forward = spoilt  # type: ignore[method-assign]

    return plant


def full_at(step: int) -> Any:
    """The file of records has no space left for `step`."""

    def plant() -> None:
        from megagpt.report.metrics import Records

        append = Records.append

        def full(self: Records, record: Any) -> None:
            if getattr(record, "step", 0) == step:
                raise OSError(errno.ENOSPC, "No space left on device")
            append(self, record)

        Records.append = full  # type: ignore[method-assign]

    return plant


def test_a_disk_that_is_full_ends_the_run_with_that_cause_and_it_continues_bit_for_bit(corpora, tmp_path, capfd):
    run = patient(corpora)
    assert fit(run, tmp_path / "full", before=full_at(8)) == 1
    assert "No space left on device" in capfd.readouterr().err.splitlines()[-1]
    ended = outcome.read(tmp_path / "full" / "attempts" / "0001" / "outcome.json")
    assert ended is not None
    assert (ended.cause, ended.rank) == ("disk_full", 0)
    assert fit(run, tmp_path / "full") == 0
    assert fit(run, tmp_path / "straight") == 0
    assert losses(tmp_path / "full") == losses(tmp_path / "straight")


def test_the_wall_time_of_a_run_that_was_killed_is_split_without_a_remainder(corpora, tmp_path):
    run = patient(corpora)
    began = time.time()
    assert fit(run, tmp_path, before=kill_at(14, rank=0)) == 128 + signal.SIGKILL
    time.sleep(0.5)
    assert fit(run, tmp_path) == 0
    split = goodput(tmp_path, mtbf_hours=0)
    assert split is not None
    assert split.attempts == 2
    assert sum(split.seconds.values()) == pytest.approx(split.wall, abs=1e-6)
    assert split.wall == pytest.approx(time.time() - began, abs=1.5)
    assert split.seconds["lost"] > 0.5
    assert split.seconds["repeated"] > 0
    assert split.predicted is not None
    assert split.predicted.failures == 1
