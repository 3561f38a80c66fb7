"""The supervisor hears at once of a rank that ends, and lets no stranger in."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable

import pytest

from megagpt.launch.lifelines import Lifelines
from megagpt.parallel import launcher


def wait(until: Callable[[], object]) -> None:
    for _ in range(1000):
        if until():
            return
        time.sleep(0.01)
    raise TimeoutError


def greet(monkeypatch: pytest.MonkeyPatch, lines: Lifelines, token: str) -> socket.socket:
    port = lines.address.rsplit(":", 1)[1]
    for name, value in {launcher.LIFELINE: f"127.0.0.1:{port}", launcher.TOKEN: token, "RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_STEP_ID", "7")
    line = launcher.hold_lifeline()
    assert line is not None
    return line


def test_a_rank_is_alive_until_its_connection_ends(monkeypatch):
    with Lifelines() as lines:
        line = greet(monkeypatch, lines, lines.token)
        wait(lines.alive)
        assert [(found.rank, found.step_id) for found in lines.alive()] == [(3, "7")]
        assert lines.lost() == []
        line.close()
        wait(lines.lost)
        assert lines.alive() == []
        assert not lines.lost()[0].silent


def test_who_does_not_know_the_token_is_hung_up_on(monkeypatch):
    with Lifelines() as lines:
        with greet(monkeypatch, lines, "guessed") as stranger:
            assert stranger.recv(1) == b""
        with socket.create_connection(("127.0.0.1", int(lines.address.rsplit(":", 1)[1]))) as stranger:
            stranger.sendall(json.dumps(["no greeting"]).encode())
            assert stranger.recv(1) == b""
        assert lines.lines == []


def test_without_a_supervisor_there_is_no_lifeline(monkeypatch):
    monkeypatch.delenv(launcher.LIFELINE, raising=False)
    assert launcher.hold_lifeline() is None


@pytest.mark.parametrize(
    ("nodes", "first"), [("gpu[07-09,11],x1", "gpu07"), ("n1", "n1"), ("a,b", "a"), ("r[1-2]-ib,c", "r1-ib")]
)
def test_the_first_of_slurms_nodes_is_where_ranks_meet(nodes, first):
    assert launcher.first_host(nodes) == first


def test_tasks_of_each_node_are_read_as_slurm_writes_them():
    assert [launcher.tasks_of_node("4(x2),3", node) for node in range(3)] == [4, 4, 3]


SRUN = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "n[3-4]",
}


def place(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> dict[str, str]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", launcher.TOKEN)
    environment = dict(variables)
    monkeypatch.setattr(launcher.os, "environ", environment)
    launcher.adopt_slurm()
    return {name: environment[name] for name in names if name in environment}


def test_a_task_of_srun_takes_its_rank_from_slurm(monkeypatch):
    found = place(monkeypatch, SRUN)
    port = found.pop("MASTER_PORT")
    assert 20_000 <= int(port) < 30_000
    assert found == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n3"}


def test_a_shell_under_srun_and_a_batch_script_are_no_ranks(monkeypatch):
    assert place(monkeypatch, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert place(monkeypatch, {name: value for name, value in SRUN.items() if "STEP" not in name}) == {}
