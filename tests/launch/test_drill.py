"""The drill: presets keep their kinds when they shrink, and a real SLURM is disturbed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megagpt import config
from megagpt.checks import checked
from megagpt.launch import local_slurm
from megagpt.launch.drill import ALL, EVERY, STEPS, base_launch, play
from megagpt.launch.shrink import VOCABULARY, shrink

LACKING = local_slurm.missing()
needs_slurm = pytest.mark.skipif(bool(LACKING), reason=f"no SLURM can be brought up here: {LACKING}")


@pytest.mark.parametrize("preset", sorted(path.stem for path in config.PRESETS.glob("*.toml")))
def test_every_preset_shrinks_to_a_legal_run_of_the_same_kinds(preset):
    run = config.load(preset)
    small = shrink(run, steps=60, every=10)
    checked(dataclasses.replace(small, data=dataclasses.replace(small.data, mixture={"corpus": 1})))
    assert small.parallel.world_size() <= 4
    for name in ("norm", "positions", "feed_forward", "qk_norm", "biases", "kernels"):
        assert getattr(small.model, name) == getattr(run.model, name)
    assert (small.model.window is None) == (run.model.window is None)
    assert small.parallel.zero_stage == run.parallel.zero_stage
    assert small.train.precision == run.train.precision
    assert config.steps_of(small) == 60


def test_a_cut_layout_stays_cut_when_it_shrinks():
    run = config.load("gpt3-125m")
    cut = dataclasses.replace(run, parallel=dataclasses.replace(run.parallel, tensor=8, pipeline=4, data=16))
    assert shrink(cut, steps=60, every=10).parallel == dataclasses.replace(cut.parallel, tensor=2, pipeline=2, data=1)


@pytest.fixture
def rehearsed(corpora: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> config.Run:
    monkeypatch.setenv("HOME", str(tmp_path))  # where the faults of nodes are remembered
    run = shrink(config.load("quickstart"), steps=40, every=10)
    mixture = {str(corpora["prose"]): 1, str(corpora["code"]): 1}
    assert run.model.vocabulary == VOCABULARY
    return dataclasses.replace(run, data=dataclasses.replace(run.data, mixture=mixture))


@pytest.mark.slurm
@needs_slurm
def test_a_job_on_a_real_slurm_survives_the_death_of_a_rank_bit_for_bit(rehearsed, tmp_path):
    verdicts = play(rehearsed, base_launch(tmp_path / "drill"), ("rank_kill",))
    assert [(verdict.scene, verdict.passed, verdict.finding) for verdict in verdicts] == [
        ("submit", True, "40 steps"),
        ("rank_kill", True, "rank lost, then bit for bit"),
    ]
    assert verdicts[1].steps_repeated <= 10 + 1


@pytest.mark.slurm
@needs_slurm
def test_a_cluster_leaves_nothing_behind_even_if_its_maker_is_killed():
    code = """
import time
from megagpt.launch.local_slurm import Shape, cluster
with cluster(Shape(nodes=2)) as slurm:
    slurm.run("srun", "-N2", "true")
    print(slurm.folder, slurm._inside, flush=True)
    time.sleep(600)
"""
    maker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    folder, lab = maker.stdout.readline().split()
    maker.kill()
    maker.wait()
    maker.stdout.close()
    while Path(folder).exists() or Path("/proc", lab).exists():
        time.sleep(0.05)  # the test hangs if the cluster stays


@pytest.mark.slow
@pytest.mark.slurm
@needs_slurm
def test_every_scene_of_the_drill_passes(rehearsed, tmp_path):
    run = shrink(config.load("quickstart"), steps=STEPS, every=EVERY)
    verdicts = play(dataclasses.replace(run, data=rehearsed.data), base_launch(tmp_path / "drill"), ALL)
    print(json.dumps([dataclasses.asdict(verdict) for verdict in verdicts], indent=1))
    assert [verdict.scene for verdict in verdicts if not verdict.passed] == []
