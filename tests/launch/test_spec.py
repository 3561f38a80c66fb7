from __future__ import annotations

import subprocess
import sys

import pytest

from megagpt.launch.spec import Cluster, Launch, Retries, read_launch, to_json

NASTY = {"COMMAS": "mlx5_0,mlx5_1", "QUOTES": "a 'b' \"c\"", "LINES": "one\ntwo\t$HOME `id` \\ é", "EMPTY": ""}
LAUNCH = Launch(
    kind="slurm",
    name="gpt",
    out="/shared/runs/gpt",
    folder="/shared",
    command=("python3", "-m", "megagpt.cli", "train", "x"),
    nodes=2,
    gpus_per_node=8,
    cluster=Cluster(environment=NASTY, mounts=("/a", "/b:/c"), ports=(1000, 2000), spares=1),
    retries=Retries(back_off_seconds=2),
)


def test_a_launch_comes_back_from_its_file_equal_whatever_its_values_hold(tmp_path):
    (tmp_path / "launch.json").write_text(to_json(LAUNCH))
    assert read_launch(tmp_path / "launch.json") == LAUNCH
    assert LAUNCH.environment()["LINES"] == NASTY["LINES"]
    assert (LAUNCH.world_size(), LAUNCH.nodes_with_spares()) == (16, 3)


@pytest.mark.parametrize(
    ("was", "becomes", "message"),
    [
        ('"nodes": 2', '"nodes": "2"', "nodes = '2' must be of type int"),
        ('"nodes"', '"notes"', "no setting is called notes"),
        ('"spares"', '"spare"', "no setting is called cluster.spare"),
        ('"pyxis"', '"podman"', "cluster.container = 'podman' is not one of none, pyxis, apptainer"),
        ('"format": 1', '"format": 2', "not a launch of format 1"),
        ("2000\n", "2000, 1\n", r"cluster.ports = \[1000, 2000, 1\] must be of type tuple"),
    ],
)
def test_a_launch_that_is_not_one_is_refused_by_name(was, becomes, message, tmp_path):
    text = to_json(LAUNCH).replace('"none"', '"pyxis"')
    assert was in text
    (tmp_path / "launch.json").write_text(text.replace(was, becomes, 1))
    with pytest.raises(ValueError, match=message):
        read_launch(tmp_path / "launch.json")


def test_the_spec_needs_the_standard_library_alone():
    code = "import sys, megagpt.launch.spec; print(*{n.split('.')[0] for n in sys.modules} - sys.stdlib_module_names)"
    found = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(found.split()) <= {"megagpt", "__main__"}
