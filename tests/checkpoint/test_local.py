"""Copies on the nodes themselves: four ranks on two pretended nodes, of which things are lost."""

from __future__ import annotations

import dataclasses
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megagpt.checkpoint import lineage, local, ring
from megagpt.checkpoint.background import HostCopy
from megagpt.checkpoint.folders import folder_at
from megagpt.config import Checkpoint, Parallel, Run
from megagpt.parallel import ranks
from tests.test_train import TRAIN, kill_at, losses, run_of

KILLED = 128 + signal.SIGKILL
LAYOUT = Parallel(data=2, tensor=2, zero_stage=3)


def fit(run: Run, folder: Path, *, nodes: int = 2, before: Callable[[], None] | None = None) -> int:
    """Train in FOLDER/run on this many pretended nodes, whose disks are FOLDER/node-0 and so on."""

    def work() -> None:
        from megagpt import train

        node = ranks.rank() * nodes // run.parallel.world_size()
        ring.node_name = lambda: f"node-{node}"
        checkpoint = dataclasses.replace(run.checkpoint, local=str(folder / f"node-{node}"))
        if before is not None:
            before()
        train.fit(dataclasses.replace(run, checkpoint=checkpoint), folder / "run")

    (folder / "run").mkdir(exist_ok=True)
    return ranks.run_local(work, run.parallel.world_size(), folder / "run")


@pytest.fixture(scope="module")
def killed(corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path, Path]:
    """A run; where it went undisturbed; and where it was killed after step 6, of which 5 is the newest on the nodes,
    and 3 the newest checkpoint.
    """
    folder = tmp_path_factory.mktemp("local")
    train = dataclasses.replace(TRAIN, eval_every=0)
    run = run_of(corpora, parallel=LAYOUT, train=train, checkpoint=Checkpoint(every=3, local_every=1))
    for name in ("straight", "killed"):
        (folder / name).mkdir()
    assert fit(run, folder / "straight") == 0
    assert fit(run, folder / "killed", before=kill_at(6, rank=1)) == KILLED
    return run, folder / "straight" / "run", folder / "killed"


@pytest.fixture
def trial(killed: tuple[Run, Path, Path], tmp_path: Path) -> Path:
    shutil.copytree(killed[2], tmp_path / "trial")
    return tmp_path / "trial"


def copies(node: Path) -> list[Path]:
    """The newest step's folder, and the one before it."""
    return [path for path in sorted(node.glob("*/gen-*/step-*"), reverse=True) if any(path.glob("*.json"))]


def kept_on(node: Path, rank: int) -> Path:
    return copies(node)[0] / f"rank-{rank:05d}.safetensors"


def lose_a_node(trial: Path) -> None:
    shutil.rmtree(trial / "node-1")


def damage_a_file(trial: Path) -> None:
    path = kept_on(trial / "node-0", 0)
    content = bytearray(path.read_bytes())
    content[-5] ^= 8
    path.write_bytes(content)


def swap_the_nodes(trial: Path) -> None:
    """The nodes have changed places, and each has lost what it kept for the other."""
    for node, ranks_there in ((0, (0, 1)), (1, (2, 3))):
        for path in (trial / f"node-{node}").rglob("rank-*"):
            if int(path.name[5:10]) not in ranks_there:
                path.unlink()
    (trial / "node-0").rename(trial / "x")
    (trial / "node-1").rename(trial / "node-0")
    (trial / "x").rename(trial / "node-1")


@pytest.mark.parametrize("fault", [lose_a_node, damage_a_file, swap_the_nodes])
def test_the_nodes_own_copies_continue_a_run_bit_for_bit_while_one_of_each_is_left(killed, trial, fault, capfd):
    run, straight, _ = killed
    fault(trial)
    assert fit(run, trial) == 0
    assert "loaded the nodes' own copies of step 5" in capfd.readouterr().out
    assert losses(trial / "run") == losses(straight)


def test_copies_made_in_the_background_continue_a_run_bit_for_bit(killed, tmp_path, capfd):
    run, straight, _ = killed
    saving = dataclasses.replace(run.checkpoint, asynchronous=True)
    run = dataclasses.replace(run, checkpoint=saving)

    def plant() -> None:
        kill_at(6, rank=1)()
        take = HostCopy.take

        def late(self: HostCopy, state: Any) -> Any:
            time.sleep(0.1)  # the next update has to wait
            return take(self, state)

        HostCopy.take = late  # type: ignore[method-assign]

    assert fit(run, tmp_path, before=plant) == KILLED
    shutil.rmtree(tmp_path / "node-1")
    assert fit(run, tmp_path) == 0
    said = capfd.readouterr().out
    assert re.search("loaded the nodes' own copies of step [45]", said)
    assert losses(tmp_path / "run") == losses(straight)
    assert [path.name for path in copies(tmp_path / "node-1")] == ["step-000000007", "step-000000005"]


def test_with_both_copies_of_a_file_lost_the_copies_before_are_used(killed, trial, capfd):
    for node in (0, 1):
        kept_on(trial / f"node-{node}", 2).unlink()
    assert fit(killed[0], trial) == 0
    assert "loaded the nodes' own copies of step 4" in capfd.readouterr().out
    assert losses(trial / "run") == losses(killed[1])


def test_with_all_copies_lost_the_checkpoint_is_used(killed, trial, capfd):
    for node in (0, 1):
        shutil.rmtree(trial / f"node-{node}")
    assert fit(killed[0], trial) == 0
    said = capfd.readouterr().out
    assert "step-000000003: " in said
    assert "proven equal" in said
    assert losses(trial / "run") == losses(killed[1])


def lose_the_checkpoints(trial: Path) -> None:
    shutil.rmtree(trial / "run" / "checkpoints")


def lose_the_shared_folder(trial: Path) -> None:
    """All of the run's folder; who starts anew in another one names the copies by the folder that they are in."""
    shutil.rmtree(trial / "run")
    (trial / "run").mkdir()
    (kept,) = (trial / "node-0").iterdir()
    (trial / "run" / "local-copies.id").write_text(kept.name)


@pytest.mark.parametrize("fault", [lose_the_checkpoints, lose_the_shared_folder])
def test_without_any_checkpoints_the_nodes_go_on_and_save_in_another_folder(killed, trial, fault, capfd):
    run, straight, _ = killed
    fault(trial)
    elsewhere = dataclasses.replace(run.checkpoint, folder=str(trial / "elsewhere"))
    run = dataclasses.replace(run, checkpoint=elsewhere)
    assert fit(run, trial, before=kill_at(7, rank=2)) == KILLED
    assert "loaded the nodes' own copies of step 5" in capfd.readouterr().out
    for node in (0, 1):
        shutil.rmtree(trial / f"node-{node}")
    assert fit(run, trial) == 0
    said = capfd.readouterr().out
    assert f"{trial}/elsewhere/gen-0002/step-000000006: " in said
    assert "proven equal" in said
    known = losses(trial / "run")
    assert known == losses(straight)[-len(known) :]
    assert len(known) == (8 if fault is lose_the_checkpoints else 3)


def test_two_states_are_kept_and_those_of_another_run_are_left_alone(killed, trial):
    run, straight, _ = killed
    for node in (0, 1):
        assert [path.name for path in copies(trial / f"node-{node}")] == ["step-000000005", "step-000000004"]
        assert len(list(copies(trial / f"node-{node}")[0].iterdir())) == 8  # a file and its description for each rank
    shutil.rmtree(trial / "run")
    assert fit(run, trial) == 0
    assert losses(trial / "run") == losses(straight)
    assert [event for event in (trial / "run" / "events.jsonl").read_text().splitlines() if '"resumed"' in event] == []


def test_copies_that_an_abandoned_attempt_makes_are_never_used(killed, trial, capfd):
    run, straight, _ = killed
    root = folder_at(trial / "run" / "checkpoints")
    lineage.begin(root, next(lineage.commits(root)))  # another attempt goes on from step 3, on other nodes
    assert fit(run, trial) == 0
    assert "step-000000003: " in capfd.readouterr().out
    assert losses(trial / "run") == losses(straight)


def test_another_layout_does_not_fit_and_reads_the_checkpoint(killed, trial, capfd):
    run = dataclasses.replace(killed[0], parallel=Parallel(data=2, zero_stage=1))
    assert fit(run, trial) == 0
    assert "step-000000003: " in capfd.readouterr().out


def test_a_full_disk_of_one_node_is_told_and_training_goes_on(killed, tmp_path, capfd):
    run, straight, _ = killed

    def full() -> None:
        write = local.write_tensors

        def fails(folder: Any, rank: int, held: Any) -> Any:
            if rank == 2 and str(folder).endswith("5"):
                raise OSError(28, "No space left on device")
            return write(folder, rank, held)

        local.write_tensors = fails

    assert fit(run, tmp_path, before=full) == 0
    said = capfd.readouterr()
    assert "the nodes keep no copies of step 5: rank 2 failed" in said.out
    assert "the nodes keep no copies of step 5: [Errno 28] No space left on device" in said.err
    assert losses(tmp_path / "run") == losses(straight)
    assert "step-000000005" not in [path.name for path in (tmp_path / "node-0").glob("*/gen-*/step-*")]
