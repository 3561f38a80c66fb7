"""Launches that really run: over ssh to an sshd of our own, and under torchrun with a rank that is killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megagpt import cli, outcome
from megagpt.launch import faults
from tests.launch.slurm_login import login, needs_slurm

SIZES = "--model.vocabulary 512 --model.layers 1 --model.width 32 --model.heads 2 --model.context 32"
SETTINGS = f"{SIZES} --train.eval_sequences 4 --train.eval_every 0 --report.samples 0 --gpus-per-node 2 --cpu"
PLANTED = "planted-key-4711"
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


def words(kind: str, corpora: dict[str, Path], out: Path, steps: int, more: str) -> list[str]:
    mixture = f"--data.mixture {corpora['prose']} 1"
    return f"launch {kind} quickstart --out {out} {mixture} {SETTINGS} --train.steps {steps} {more}".split()


def losses(out: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())]


def process_of_rank(rank: int, out: Path) -> int:
    """The process of a rank of the run in `out`: torchrun puts each into a session of its own."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (process / "environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in environment and str(out).encode() in (process / "cmdline").read_bytes():
                return int(process.name)
    raise AssertionError(f"rank {rank} was not found")


def ssh_files(folder: Path, *, server: str, client: str) -> None:
    """Keys of a host and a user, and the files `sshd_config` and `config`, with these lines beside the usual ones."""
    folder.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    files = f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPidFile none\nStrictModes no\n"
    (folder / "sshd_config").write_text(f"{server}\n{files}UsePAM no\n")
    (folder / "config").write_text(
        f"Host *\n{client}\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n"
        "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)


needs_sshd = pytest.mark.skipif(
    not Path(SSHD).exists() or shutil.which("ssh") is None,
    reason="no OpenSSH server is installed (Debian: openssh-server)",
)


@pytest.fixture
def sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An sshd on a loopback port, reached by an `ssh` that knows its key."""
    folder, real = tmp_path / "ssh", shutil.which("ssh")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ssh_files(folder, server=f"Port {port}\nListenAddress 127.0.0.1", client=f"  HostName 127.0.0.1\n  Port {port}")
    (folder / "bin").mkdir()
    (folder / "bin/ssh").write_text(f'#!/bin/sh\nexec {real} -F {folder}/config "$@"\n')
    (folder / "bin/ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield
    finally:
        server.terminate()
        server.wait()


@needs_sshd
def test_two_nodes_over_ssh_train_and_leave_no_secret_anywhere(corpora, tmp_path, monkeypatch, sshd, capfd):
    """Keys reach the ranks; status, logs and why read what the run left."""
    profile = tmp_path / "c.toml"
    profile.write_text('[environment]\nODD = """a, "b" \'c\'\n$HOME"""\n')
    monkeypatch.setenv("WANDB_API_KEY", PLANTED)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "run"
    more = f"--hosts localhost 127.0.0.1 --cluster {profile}".split()
    arguments = words("hostfile", corpora, out, 2, "")
    arguments[arguments.index("--gpus-per-node") + 1] = "1"
    assert cli.main([*arguments, *more]) == 0
    assert [step for step, _ in losses(out)] == [1, 2]
    assert cli.main(["launch", "status", str(out), "--json"]) == 0
    printed = capfd.readouterr().out
    status = json.loads(printed[printed.index("{") :])
    assert (status["step"], status["steps"], status["state"], status["attempts"]) == (2, 2, "finished", 1)
    assert 0 < status["goodput"] <= 1
    assert cli.main(["launch", "why", str(out)]) == 0
    assert cli.main(["launch", "logs", str(out), "--rank", "1"]) == 0
    assert cli.main(["launch", "logs", str(out), "--rank", "7"]) == 2
    assert PLANTED not in printed + capfd.readouterr().out
    held = [path for path in tmp_path.rglob("*") if path.is_file() and PLANTED.encode() in path.read_bytes()]
    assert held == []


def test_the_agent_hands_its_ranks_every_value_and_ends_them_when_its_input_ends(tmp_path):
    program = "import os, sys, time; print(os.environ['RANK'], repr(os.environ['ODD']), flush=True); time.sleep(60)"
    odd = "a, 'b'\n$HOME"
    work = {
        "command": [sys.executable, "-c", program],
        "folder": str(tmp_path),
        "logs": str(tmp_path),
        "first_rank": 4,
        "ranks": 2,
        "environment": {"ODD": odd},
    }
    agent = subprocess.Popen([sys.executable, "-m", "megagpt.launch.node"], stdin=subprocess.PIPE, text=True)
    assert agent.stdin is not None
    agent.stdin.write(json.dumps(work) + "\n")
    agent.stdin.flush()
    logs = [tmp_path / f"rank-{rank}.log" for rank in (4, 5)]
    for _ in range(200):
        if all(log.is_file() and log.read_text() for log in logs):
            break
        time.sleep(0.05)
    agent.stdin.close()
    assert agent.wait(20) == 128 + signal.SIGKILL
    assert [log.read_text() for log in logs] == [f"4 {odd!r}\n", f"5 {odd!r}\n"]


@pytest.mark.slow
def test_torchrun_starts_a_killed_rank_again_and_the_losses_go_on_bit_for_bit(corpora, tmp_path):
    command = [sys.executable, "-m", "megagpt.cli"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    subprocess.run([*command, *words("torchrun", corpora, straight, 60, "--checkpoint.every 5")], check=True)
    arguments = words("torchrun", corpora, killed, 60, "--checkpoint.every 5")
    run = subprocess.Popen([*command, *arguments], start_new_session=True)
    deadline = time.monotonic() + 120
    while not any((killed / "checkpoints").rglob("manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process_of_rank(1, killed), signal.SIGKILL)
    assert run.wait(180) == 0
    assert losses(killed) == losses(straight)
    events = [json.loads(line)["event"] for line in (killed / "events.jsonl").read_text().splitlines()]
    assert "resumed" in events


@pytest.mark.slow
@pytest.mark.slurm
@needs_slurm
@needs_sshd
def test_over_ssh_a_node_that_dies_is_replaced_by_a_spare_and_the_losses_go_on_bit_for_bit(corpora, tmp_path):
    with login(tmp_path / "shared") as here:
        ssh_files(here.folder / "ssh", server="Port 2222", client="  Port 2222")
        here.offer("ssh", "-F", str(here.folder / "ssh/config"))
        serve = [SSHD, "-D", "-e", "-f", str(here.folder / "ssh/sshd_config")]
        hosts = ("n1", "n2", "n3")
        jobs = [here.slurm.command("srun", f"--nodelist={host}", *serve) for host in hosts]  # no one dies of another
        servers = [subprocess.Popen(job, env=here.inside, stderr=subprocess.DEVNULL) for job in jobs]
        here.profile.write_text(here.profile.read_text() + "spares = 1\n")
        command = [sys.executable, "-m", "megagpt.cli"]
        more = f"--cluster {here.profile} --checkpoint.every 5 --hosts n1 n2 n3"

        def start(out: Path) -> subprocess.Popen[bytes]:
            arguments = words("hostfile", corpora, out, 60, more)
            arguments[arguments.index("--gpus-per-node") + 1] = "1"
            return subprocess.Popen([*command, *arguments])

        for node in hosts:
            while here.run("ssh", "-F", str(here.folder / "ssh/config"), node, "echo up", check=False) != "up":
                time.sleep(0.1)
        straight, struck = here.folder / "straight", here.folder / "struck"
        assert start(straight).wait(180) == 0
        run = start(struck)
        while not any((struck / "checkpoints").rglob("manifest.json")):
            assert run.poll() is None
            time.sleep(0.02)
        here.slurm.crash("n2")
        assert run.wait(180) == 0
        for server in servers:
            server.kill()
            server.wait()
    assert losses(struck) == losses(straight)
    first = outcome.read(struck / "attempts/0001/outcome.json")
    assert first is not None
    assert (first.cause, first.host) == ("node", "n2")
    assert {path.name for path in (struck / "attempts/0002/logs").iterdir()} == {"rank-0.log", "rank-1.log"}
    assert list(faults.excluded(here.folder / ".local/state/megagpt/faults/rehearsal")) == ["n2"]
