"""Whole runs on two forked ranks: killed, stopped, changed and continued."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from megagpt import config
from megagpt.checkpoint import lineage
from megagpt.checkpoint.folders import Folder, folder_at
from megagpt.config import Checkpoint, Data, Model, Optim, Parallel, Run, Train
from megagpt.parallel import ranks

MODEL = Model(layers=2, width=32, heads=2, vocabulary=512, context=32, dropout=0.1)
TRAIN = Train(tokens=8 * 4 * 32, global_batch=4, micro_batch=2, precision="fp32", eval_every=4, eval_sequences=4)


def run_of(corpora: dict[str, Path], **sections: Any) -> Run:
    values = {
        "model": MODEL,
        "data": Data(mixture={str(corpora["prose"]): 1, str(corpora["code"]): 2}),
        "train": TRAIN,
        "parallel": Parallel(data=2),
        "optim": Optim(lr=3e-3),
        "checkpoint": Checkpoint(every=3),
    }
    return Run(**{**values, **sections})


def fit(run: Run, out: Path, *, before: Any = None) -> int:
    """The exit status of training on forked ranks; `before` runs in each of them first, to plant a fault."""

    def work() -> None:
        from megagpt.train import fit as fit_rank

        if before is not None:
            before()
        fit_rank(run, out)

    out.mkdir(exist_ok=True)
    return ranks.run_local(work, run.parallel.world_size(), out)


def records(out: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, float, float]]:
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records(out)]


def kill_at(step: int, *, rank: int, number: int = signal.SIGKILL) -> Any:
    """Send this rank a signal just after it did `step`."""

    def plant() -> None:
        from megagpt.report.journal import Journal

        told = Journal.step

        def then_die(self: Journal, *arguments: Any, **values: Any) -> None:
            told(self, *arguments, **values)
            if values["step"] == step and ranks.rank() == rank:
                os.kill(os.getpid(), number)

        Journal.step = then_die  # type: ignore[method-assign]

    return plant


@pytest.fixture(scope="module")
def straight(corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """ZeRO stage -> the folder of an uninterrupted run of eight steps."""
    folder = tmp_path_factory.mktemp("straight")
    found = {}
    for stage in range(4):
        found[stage] = folder / str(stage)
        assert fit(run_of(corpora, parallel=Parallel(data=2, zero_stage=stage)), found[stage]) == 0  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("stage", range(4))
def test_a_run_killed_in_mid_step_continues_bit_for_bit(corpora, straight, tmp_path, stage, capfd):
    run = run_of(corpora, parallel=Parallel(data=2, zero_stage=stage))
    assert fit(run, tmp_path, before=kill_at(5, rank=stage % 2)) == 128 + signal.SIGKILL
    assert f"rank {stage % 2} was killed by SIGKILL" in capfd.readouterr().err.splitlines()[-1]
    assert losses(tmp_path) != losses(straight[stage])
    assert fit(run, tmp_path) == 0
    assert losses(tmp_path) == losses(straight[stage])
    assert [step for step, *_ in losses(tmp_path)] == list(range(1, 9))


@pytest.mark.parametrize("layout", [Parallel(pipeline=2), Parallel(tensor=2)], ids=["pipeline", "tensor"])
def test_a_run_in_stages_or_cuts_that_loses_a_rank_ends_at_once_and_continues_bit_for_bit(
    corpora, tmp_path, layout, capfd
):
    run = run_of(corpora, parallel=layout)
    assert fit(run, tmp_path / "straight") == 0
    assert fit(run, tmp_path / "killed", before=kill_at(5, rank=1)) == 128 + signal.SIGKILL
    assert "rank 1 was killed by SIGKILL" in capfd.readouterr().err.splitlines()[-1]
    assert fit(run, tmp_path / "killed") == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")


def test_all_zero_stages_and_one_rank_train_alike(corpora, straight, tmp_path):
    alone = run_of(corpora, parallel=Parallel(data=1), train=dataclasses.replace(TRAIN, micro_batch=4))
    assert fit(alone, tmp_path) == 0
    expected = [loss for _, loss, _ in losses(tmp_path)]
    for stage in range(4):
        assert [loss for _, loss, _ in losses(straight[stage])] == pytest.approx(expected, rel=1e-6)


def test_a_run_told_to_stop_saves_and_exits_well_and_continues_bit_for_bit(corpora, straight, tmp_path):
    run = run_of(corpora)
    assert fit(run, tmp_path, before=kill_at(4, rank=1, number=signal.SIGTERM)) == 0
    newest = next(lineage.commits(folder_at(tmp_path / "checkpoints")))
    assert newest.step in (4, 5)  # agreed at the end of the step in which the signal came
    assert records(tmp_path, "events")[-1]["event"] == "stopped"
    assert fit(run, tmp_path) == 0
    assert losses(tmp_path) == losses(straight[1])


def test_a_kill_while_saving_leaves_the_checkpoint_before(corpora, straight, tmp_path):
    def plant() -> None:
        import megagpt.checkpoint.save as module

        commit = module.commit

        def dies(folder: Folder, *arguments: Any) -> None:
            if str(folder).endswith("6"):
                os.kill(os.getpid(), signal.SIGKILL)
            commit(folder, *arguments)

        module.commit = dies

    run = run_of(corpora)
    assert fit(run, tmp_path, before=plant) == 128 + signal.SIGKILL
    assert next(lineage.commits(folder_at(tmp_path / "checkpoints"))).step == 3
    assert fit(run, tmp_path) == 0
    assert losses(tmp_path) == losses(straight[1])


def test_a_run_that_saves_in_the_background_and_is_killed_while_it_does_continues_bit_for_bit(
    corpora, straight, tmp_path
):
    def plant() -> None:
        import megagpt.checkpoint.background as module

        write, take = module.write_part, module.HostCopy.take

        def late(self: module.HostCopy, owned: Any) -> Any:
            time.sleep(0.3)  # the next step's gradients are there before the copy is begun: its update has to wait
            return take(self, owned)

        def dies(folder: Folder, *arguments: Any) -> None:
            if str(folder).endswith("6") and ranks.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            write(folder, *arguments)

        module.write_part, module.HostCopy.take = dies, late  # type: ignore[method-assign]

    run = run_of(corpora)
    run = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, asynchronous=True))
    assert fit(run, tmp_path, before=plant) == 128 + signal.SIGKILL
    assert next(lineage.commits(folder_at(tmp_path / "checkpoints"))).step == 3
    assert fit(run, tmp_path) == 0
    assert losses(tmp_path) == losses(straight[1])
    assert next(lineage.commits(folder_at(tmp_path / "checkpoints"))).step == records(tmp_path)[-1]["step"]


def test_a_finished_run_started_again_does_nothing(corpora, straight, tmp_path):
    before = (straight[2] / "metrics.jsonl").read_bytes()
    assert fit(run_of(corpora, parallel=Parallel(data=2, zero_stage=2)), straight[2]) == 0
    assert (straight[2] / "metrics.jsonl").read_bytes() == before


def test_run_toml_repeats_the_run(straight, tmp_path):
    run = config.load(str(straight[3] / "run.toml"))
    assert fit(run, tmp_path) == 0
    assert losses(tmp_path) == losses(straight[3])


def test_another_number_of_ranks_continues_with_the_same_data_and_losses_to_rounding(corpora, straight, tmp_path):
    half = dataclasses.replace(TRAIN, steps=4)
    assert fit(run_of(corpora, train=half, parallel=Parallel(data=2, zero_stage=3)), tmp_path) == 0
    rest = run_of(corpora, parallel=Parallel(data=1, zero_stage=1))
    assert fit(rest, tmp_path) == 0
    expected = [loss for _, loss, _ in losses(straight[3])]
    assert [loss for _, loss, _ in losses(tmp_path)] == pytest.approx(expected, rel=1e-6)


def test_every_step_is_recorded_with_what_a_reader_needs(straight):
    for number, record in enumerate(records(straight[1]), start=1):
        assert record["step"] == number
        assert record["tokens"] == number * 4 * 32
        for name in ("loss", "grad_norm", "lr", "tokens_per_s", "mfu"):
            assert record[name] > 0
    evaluated = records(straight[1], "evaluations")
    assert [(record["step"], record["corpus"]) for record in evaluated] == [
        (step, corpus) for step in (4, 8) for corpus in ("prose", "code")
    ]


def test_a_growing_batch_is_followed_and_survives_a_kill(corpora, tmp_path):
    ramp = dataclasses.replace(
        TRAIN, tokens=16 * 32 * 2, global_batch=8, ramp_start=2, ramp_increment=2, ramp_tokens=20 * 32, micro_batch=1
    )
    run = run_of(corpora, train=ramp)
    assert fit(run, tmp_path / "straight") == 0
    sizes = [record["batch"] for record in records(tmp_path / "straight")]
    assert sizes[0] == 2
    assert sizes[-1] == 8
    assert sizes == sorted(sizes)
    assert fit(run, tmp_path / "killed", before=kill_at(4, rank=0)) != 0
    assert fit(run, tmp_path / "killed") == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")


def test_a_setting_that_decides_what_was_read_cannot_change_in_mid_run(corpora, straight, capfd):
    run = dataclasses.replace(run_of(corpora), seed=2)
    assert fit(run, straight[1]) == 2
    assert "seed = 2 differs from the 1 that the run began with" in capfd.readouterr().err


def test_a_diverged_run_stops_with_the_step_and_the_remedy(corpora, tmp_path, capfd):
    run = run_of(corpora, optim=Optim(lr=1e30, clip_norm=0.0), parallel=Parallel(data=1))
    assert fit(run, tmp_path) == 1
    assert "the run has diverged" in capfd.readouterr().err
