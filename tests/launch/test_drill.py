"""The drill: presets keep their kinds when they shrink, and a real SLURM is disturbed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megagpt import config
from megagpt.checks import checked
from megagpt.errors import UserError
from megagpt.launch.drill import ALL, ANYWHERE, EVERY, STEPS, Drill, base_launch, play, run_drill
from megagpt.launch.shrink import VOCABULARY, shrink
from tests.launch.slurm_login import login, needs_slurm


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
    run = shrink(config.load("quickstart"), steps=30, every=10)
    mixture = {str(corpora["prose"]): 1, str(corpora["code"]): 1}
    assert run.model.vocabulary == VOCABULARY
    return dataclasses.replace(run, data=dataclasses.replace(run.data, mixture=mixture))


@pytest.mark.slurm
@needs_slurm
def test_a_job_on_a_real_slurm_survives_the_death_of_a_rank_bit_for_bit(rehearsed, tmp_path):
    verdicts = play(rehearsed, base_launch(tmp_path / "drill"), ("rank_kill",))
    assert [(verdict.scene, verdict.passed, verdict.finding) for verdict in verdicts] == [
        ("submit", True, "30 steps"),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Drill(scenes=("rank_kil",)), "no scene is called rank_kil. Did you mean rank_kill?"),
        (Drill(scenes=("cable_pull",), cluster="ours"), "the scene cable_pull breaks machines"),
        (Drill(cluster="ours"), "a drill on a real cluster needs --out"),
    ],
)
def test_what_cannot_be_played_is_refused_with_the_reason(options, message):
    with pytest.raises(UserError) as error:
        run_drill(options)
    assert str(error.value).startswith(message)


@pytest.mark.slow
@pytest.mark.slurm
@needs_slurm
def test_what_breaks_no_machine_is_rehearsed_on_a_cluster_that_is_known_by_its_profile(corpora, tmp_path, capsys):
    with login(tmp_path / "shared") as here:
        out = here.folder / "drill"
        for name, corpus in corpora.items():
            shutil.copytree(corpus, out / "corpora" / name)
        status = run_drill(Drill(cluster=str(here.profile), out=out, steps=150, json=True))
    told = json.loads(capsys.readouterr().out)
    print(json.dumps(told, indent=1))
    assert [verdict["scene"] for verdict in told] == list(ANYWHERE)
    assert [verdict["finding"] for verdict in told if not verdict["passed"]] == []
    assert status == 0
