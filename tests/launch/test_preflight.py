"""Which nodes a preflight leaves out."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megagpt.launch.preflight import MOST_ROUNDS, rounds
from megagpt.launch.preflight_step import judge, slow_nodes

NODES = ["n1", "n2", "n3", "n4"]


def report(**values: Any) -> dict[str, Any]:
    return {"checks": [], "clock_ahead_seconds": 0.1, "complete": True, **values}


def rates(slow: dict[frozenset[str], float]) -> dict[tuple[str, str], float]:
    return {(a, b): slow.get(frozenset((a, b)), 1000.0) for a, b in itertools.permutations(NODES, 2)}


@pytest.mark.parametrize("nodes", [2, 3, 4, 7, 16])
def test_every_pair_meets_once_and_nobody_twice_in_a_round(nodes):
    met = [pair for pairing in rounds(nodes) for pair in pairing]
    assert sorted(met) == list(itertools.combinations(range(nodes), 2))
    assert all(len({place for pair in pairing for place in pair}) == 2 * len(pairing) for pairing in rounds(nodes))


def test_a_large_cluster_takes_a_bounded_number_of_rounds():
    assert len(rounds(512)) == MOST_ROUNDS
    assert all(len(pairing) == 256 for pairing in rounds(512))


def test_alike_nodes_are_all_kept():
    assert slow_nodes(rates({})) == {}
    assert slow_nodes({}) == {}


def test_a_node_that_is_slow_with_all_others_goes_alone():
    found = slow_nodes(rates({frozenset(("n3", other)): 90.0 for other in ("n1", "n2", "n4")}))
    assert found == {"n3": "it is slow with n1, n2, n4: 90 MiB/s, usual are 1,000"}


def test_of_one_slow_link_one_end_goes_and_the_reason_names_the_link():
    assert slow_nodes(rates({frozenset(("n1", "n4")): 90.0})) == {
        "n1": "its link with n4: 90 MiB/s, usual are 1,000",
    }


def test_clocks_versions_silence_and_failed_checks_are_named():
    disk = {"name": "disk", "status": "fail", "finding": "0.2 GiB free", "remedy": ""}
    old = {"torch": "2.11"}
    new = {"torch": "2.13"}
    reports = {
        "n1": report(versions=new),
        "n2": report(versions=new, clock_ahead_seconds=9.1),
        "n3": report(versions=old),
        "n4": report(versions=new, checks=[disk], gpus=["7 GPUs, of 8"]),
    }
    assert judge(reports, [*NODES, "n5"], seconds=60) == {
        "n2": "its clock is +9.0 s off the others'",
        "n3": "torch 2.11, elsewhere 2.13",
        "n4": "disk: 0.2 GiB free; 7 GPUs, of 8",
        "n5": "no answer in 60 s",
    }


def test_a_node_examines_itself_without_torch(tmp_path: Path):
    command = [sys.executable, "-X", "importtime", "-m", "megagpt.launch.preflight", str(tmp_path), "--nodes", "here"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert " torch\n" not in done.stderr
    [path] = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert found["complete"]
    assert found["write_mib_per_s"] > 0
    assert abs(found["clock_ahead_seconds"]) < 60
    assert judge({"here": found}, ["here"], seconds=15) == {}
