"""Every finding of the doctor, on made-up machines."""

import json
import os
import resource
import threading
import time
from pathlib import Path

import pytest

from megagpt import doctor
from megagpt.doctor import GIB, REQUIRED, Check, Doctor, Lookup

ALL = dict.fromkeys(REQUIRED, "1.0") | {"deepspeed": "0.19.8", "torch": "2.13.0+cpu"}


@pytest.mark.parametrize(
    ("version", "status"), [((3, 9), "fail"), ((3, 10), "ok"), ((3, 13), "ok"), ((3, 14), "warn"), ((2, 7), "fail")]
)
def test_python_3_10_to_3_13_is_fit(version, status):
    assert doctor.check_python(version).status == status


def test_all_packages_with_optional_ones_missing_are_fit():
    check = doctor.check_packages(ALL | {"wandb": None})
    assert check.status == "ok"
    assert "torch 2.13.0+cpu" in check.finding
    assert "wandb" not in check.finding


def test_a_missing_package_fails_with_the_command_that_installs_it():
    check = doctor.check_packages(ALL | {"pyarrow": None})
    assert (check.status, check.remedy) == ("fail", "pip install pyarrow")


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("0.19.7", "fail"),
        ("0.9.9", "fail"),
        ("0.19.8", "ok"),
        ("0.19.10", "ok"),
        ("0.20.0+local", "ok"),
        ("1.0", "ok"),
    ],
)
def test_a_deepspeed_with_wrong_pipeline_gradients_fails(version, status):
    assert doctor.check_packages(ALL | {"deepspeed": version}).status == status


def test_gpus_are_counted_by_their_name():
    check = doctor.check_devices(["H100"] * 8 + ["L4"], gpu_build="CUDA 12.8", cpu="x86_64, 2 cores")
    assert (check.status, check.finding) == ("ok", "8 x H100, 1 x L4 (CUDA 12.8)")


def test_a_torch_for_gpus_that_sees_none_warns_and_a_cpu_torch_does_not():
    assert doctor.check_devices([], gpu_build="CUDA 12.8", cpu="x").status == "warn"
    assert doctor.check_devices([], gpu_build=None, cpu="x").status == "ok"


def test_a_c_compiler_is_asked_for_on_gpus_alone():
    assert doctor.check_compiler(None, gpus=0).status == "ok"
    assert doctor.check_compiler("/usr/bin/cc", gpus=1).status == "ok"
    assert doctor.check_compiler(None, gpus=1).status == "warn"


def test_a_stale_lock_is_named_with_its_remedy():
    check = doctor.check_locks({Path("a/lock"): 3600.0, Path("b/lock"): 5.0}, compiling=False)
    assert (check.status, check.remedy) == ("fail", "rm a/lock")
    assert "a/lock" in check.finding


@pytest.mark.parametrize(
    ("ages", "compiling"), [({}, False), ({Path("lock"): 5.0}, False), ({Path("lock"): 9999.0}, True)]
)
def test_a_young_lock_or_one_beside_a_compiler_at_work_is_left_alone(ages, compiling):
    assert doctor.check_locks(ages, compiling=compiling).status == "ok"


def test_locks_are_found_at_any_depth_of_the_cache_and_none_is_deleted(tmp_path, monkeypatch):
    lock = tmp_path / "py311_cpu" / "comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(doctor, "_compiling", lambda: False)
    (check,) = [check for check in doctor.checks(tmp_path) if check.name == "locks"]
    assert check.status == "fail"
    assert str(lock) in check.remedy
    assert lock.exists()


def test_a_slow_or_missing_name_warns_with_the_line_for_etc_hosts():
    quick, slow = Lookup(answer="10.0.0.7", seconds=0.01), Lookup(answer=None, seconds=10.0)
    assert doctor.check_names("node7", quick, Lookup(answer="node7", seconds=0.01)).status == "ok"
    unanswered = doctor.check_names("node7", quick, slow)
    assert (unanswered.status, unanswered.remedy) == ("warn", "Add a line to /etc/hosts: 10.0.0.7 node7")
    assert doctor.check_names("node7", slow, None).remedy.endswith("ADDRESS node7")


def test_an_address_without_a_name_is_fine_if_the_answer_is_quick():
    check = doctor.check_names("node7", Lookup(answer="10.0.0.7", seconds=0.0), Lookup(answer=None, seconds=0.01))
    assert check.status == "ok"
    assert "no known name" in check.finding


def test_a_lookup_gives_up_after_its_time():
    hanging = threading.Event()
    found = doctor.lookup(lambda _: str(hanging.wait(30)), "node7", seconds=0.01)
    hanging.set()
    assert found.answer is None


def test_a_lookup_gives_the_answer_or_none_for_an_unknown_name():
    def unknown(_):
        raise OSError("no such host")

    assert doctor.lookup(lambda name: name + "!", "a").answer == "a!"
    assert doctor.lookup(unknown, "a").answer is None


@pytest.mark.parametrize(("gib", "status"), [(0.5, "fail"), (5, "warn"), (50, "ok")])
def test_a_full_disk_fails(tmp_path, gib, status):
    assert doctor.check_disk(tmp_path, int(gib * GIB)).status == status


@pytest.mark.parametrize(("gib", "status"), [(0, "warn"), (1 / 16, "warn"), (1, "ok")])
def test_docker_s_small_shared_memory_warns(gib, status):
    assert doctor.check_shared_memory(int(gib * GIB)).status == status


@pytest.mark.parametrize(
    ("limits", "status", "remedy"),
    [
        ((256, 4096), "warn", "ulimit -n 4096"),
        ((256, resource.RLIM_INFINITY), "warn", "ulimit -n 65536"),
        ((1024, 1024), "ok", ""),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), "ok", ""),
    ],
)
def test_few_open_files_warn_with_a_limit_that_can_be_set(limits, status, remedy):
    check = doctor.check_open_files(limits)
    assert (check.status, check.remedy) == (status, remedy)


@pytest.mark.parametrize(("status", "exit_status"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_the_exit_status_is_1_if_a_check_fails(monkeypatch, capsys, status, exit_status):
    found = [Check(name="disk", status=status, finding="x [bold]", remedy="do y")]
    monkeypatch.setattr(doctor, "checks", lambda _: found)
    assert doctor.run_doctor(Doctor()) == exit_status
    assert capsys.readouterr().out.split("\n")[:2] == [f"{status:<6}disk           x [bold]", " " * 21 + "do y"]
    assert doctor.run_doctor(Doctor(json=True)) == exit_status
    assert json.loads(capsys.readouterr().out) == [
        {"name": "disk", "status": status, "finding": "x [bold]", "remedy": "do y"}
    ]


def test_everything_but_ok_has_a_remedy_on_this_machine(tmp_path):
    found = doctor.checks(tmp_path)
    assert len({check.name for check in found}) == 9
    assert all((check.status == "ok") == (check.remedy == "") for check in found)
