"""Against a real slurmctld: what it refuses, arrays for data and for sweeps, and where a secret ends up."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megagpt import cli, stop
from megagpt.launch import sweeps
from megagpt.launch.named_slurm import NamedCluster
from tests.launch.slurm_login import Login, login, needs_slurm

pytestmark = [pytest.mark.slurm, needs_slurm]
SIZES = "--model.vocabulary 512 --model.layers 1 --model.width 32 --model.heads 2 --model.context 32"
SETTINGS = f"{SIZES} --train.steps 2 --train.eval_sequences 4 --train.eval_every 0 --report.samples 0"
ONE = "--nodes 1 --gpus-per-node 1 --cpu --train.global_batch 4 --train.micro_batch 2"
SECRET = "planted-key-4712"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Login]:
    with login(tmp_path_factory.mktemp("shared")) as found:
        yield found


def holding(folder: Path, text: str) -> list[Path]:
    """The files under `folder` that hold `text`; a file that goes away meanwhile holds nothing any more."""
    found = []
    for path in folder.rglob("*"):
        try:
            found += [path] if path.is_file() and text.encode() in path.read_bytes() else []
        except FileNotFoundError:
            continue
    return found


def steps(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_what_slurm_itself_refuses_is_shown_before_anything_is_submitted(here, corpora, capsys):
    profile = here.folder / "picky.toml"
    profile.write_text(here.profile.read_text() + 'constraint = "liquid-cooled"\n')
    out = here.folder / "refused"
    words = f"launch slurm quickstart --out {out} --data.mixture {corpora['prose']} 1 {SETTINGS} {ONE}"
    assert cli.main([*words.split(), "--cluster", str(profile)]) == 2
    said = capsys.readouterr().err
    assert "megagpt: sbatch --test-only refused: " in said
    assert "Invalid feature specification" in said
    assert not (out / "launch" / "jobs.jsonl").exists()


def test_a_job_array_builds_the_corpus_that_one_build_makes_byte_for_byte(here, corpora):
    raw, tokenizer = corpora["prose"].parent / "prose.jsonl", corpora["prose"] / "tokenizer.json"
    array, alone = here.folder / "by-array", here.folder / "alone"
    words = f"{raw} --tokenizer {tokenizer} --tasks 2"
    assert cli.main(f"launch data {words} --out {array} --cluster {here.profile}".split()) == 0
    assert cli.main(f"data build {words} --out {alone} --processes 1".split()) == 0
    here.wait_for_queue()
    files = sorted(path.relative_to(alone) for path in alone.rglob("*") if path.is_file())
    assert any(path.suffix == ".tar" for path in files)
    assert {path: (array / path).read_bytes() for path in files} == {
        path: (alone / path).read_bytes() for path in files
    }
    shutil.rmtree(array / "launch")
    assert sorted(path.relative_to(array) for path in array.rglob("*") if path.is_file()) == files


def test_a_sweep_is_told_of_and_resumed_as_a_whole_and_leaves_no_secret(here, corpora, monkeypatch, capsys):
    """One of its runs is cancelled as it starts, and resumed while the other goes on."""
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    out = here.folder / "sweep"
    words = f"launch slurm quickstart --out {out} --data.mixture {corpora['prose']} 1 {SETTINGS} {ONE}"
    assert cli.main([*words.split(), "--cluster", str(here.profile), "--sweep", "optim.lr=1e-3,2e-3"]) == 0
    cancelled, job = out / "optim.lr=2e-3", sweeps.newest_job(out / "optim.lr=2e-3").split("_")[0]
    here.run("scancel", f"{job}_1")
    shown = here.run("scontrol", "show", "job", job) + here.run("scontrol", "write", "batch_script", job, "-")
    assert "megagpt.launch.supervise" in shown
    assert SECRET not in shown
    kept = holding(here.slurm.folder, SECRET)
    assert {path.name for path in kept} == {"environment"}  # SLURM's own, readable by its user alone
    assert {path.stat().st_mode & 0o077 for path in kept} == {0}
    while here.run("squeue", "--noheader", f"--jobs={job}_1", check=False):
        pass
    assert cli.main(["launch", "resume", str(out)]) == 0
    assert sweeps.newest_job(cancelled).endswith("_1")
    assert cli.main(["launch", "resume", str(out)]) == 2  # all are in the queue
    here.wait_for_queue()
    capsys.readouterr()
    assert cli.main(["launch", "status", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(Path(one["run"]).name, one["state"], one["step"]) for one in told] == [
        ("optim.lr=1e-3", "finished", 2),
        ("optim.lr=2e-3", "finished", 2),
    ]
    assert cli.main(["launch", "status", str(out)]) == 0
    assert "a sweep of 2 runs" in capsys.readouterr().out
    assert len({steps(run)[-1]["loss"] for run in sweeps.runs_of(out)}) == 2
    assert cli.main(["launch", "resume", str(out)]) == 2  # all are done
    assert holding(here.folder, SECRET) == []
    (cancelled / "events.jsonl").write_text("")
    shutil.rmtree(cancelled / "attempts")
    assert cli.main(["launch", "stop", str(out)]) == 0
    assert [stop.asked(run) for run in sweeps.runs_of(out)] == [None, "asked"]  # one is done, and stays so


def test_a_blow_on_a_real_cluster_hits_the_ranks_of_its_job_on_that_node_and_nothing_else(here):
    program = here.folder / "rank.sh"
    rank = f"{sys.executable} -c 'import time; time.sleep(600)' megagpt.cli"
    program.write_text(f"#!/bin/bash\nsrun --nodes=2 --ntasks=2 {rank}\necho over >{here.folder}/over-$SLURM_JOB_ID\n")
    jobs = [here.run("sbatch", "--parsable", "-N2", "--output=/dev/null", str(program)) for _ in range(2)]
    cluster = NamedCluster(str(Path(cli.__file__).parents[1]))
    nodes = here.run("squeue", "--noheader", "--format=%B", f"--jobs={jobs[0]}")
    while not nodes.startswith("n") or not here.run("squeue", "--steps", "--noheader", f"--steps={jobs[0]}.0"):
        nodes = here.run("squeue", "--noheader", "--format=%B", f"--jobs={jobs[0]}")
    while not cluster.signal_ranks(jobs[0], nodes, signal.SIGCONT):
        pass  # its ranks are being started
    assert cluster.signal_ranks(jobs[0], nodes, signal.SIGKILL) == 1
    here.run("scancel", "--signal=KILL", f"{jobs[0]}.0", check=False)
    while not (here.folder / f"over-{jobs[0]}").exists():
        pass
    assert not (here.folder / f"over-{jobs[1]}").exists()
    here.run("scancel", *jobs)
    here.wait_for_queue()
