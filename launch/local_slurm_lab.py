"""The inside of a throw-away SLURM cluster: the first process of its namespaces (local_slurm.py).

    python -m megagpt.launch.local_slurm_lab FOLDER SHAPE

Starts the daemons, says `up`, obeys one line of JSON after the other, and ends with its input.
"""

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
from pathlib import Path

from megagpt.launch.local_slurm_conf import NETWORK, Shape, configuration
from megagpt.launch.strike import ranks_of

START_SECONDS = 60.0
DISK_BYTES = 4 << 30  # of memory, as far as they are used


class Lab:
    """Inside: starts the daemons and obeys, as the first process of its namespaces."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        self.folder, self.shape = folder, shape
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PATH"] += ":/usr/sbin:/sbin"

    def up(self) -> None:
        for name in ("log", "state", "spool", "dev", "pids"):
            (self.folder / name).mkdir()
        for gpu in range(self.shape.gpus):
            os.mknod(self.folder / f"dev/gpu{gpu}", 0o20666, os.makedev(1, 3))
        for name, text in configuration(self.folder, self.shape).items():
            (self.folder / name).write_text(text)
        (self.folder / "munge.key").touch(mode=0o600)
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        socket.sethostname("control")
        for name in ("hosts", "nsswitch.conf", "resolv.conf"):
            self.call("mount", "--bind", str(self.folder / name), str(Path("/etc", name).resolve()))
        (self.folder / "disk").mkdir()
        self.call("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "disk", str(self.folder / "disk"))
        self.call("ip", "link", "set", "lo", "up")
        self.call("ip", "link", "add", "bridge", "type", "bridge")
        self.call("ip", "addr", "add", f"{NETWORK}.1/24", "dev", "bridge")
        self.call("ip", "link", "set", "bridge", "up")
        paths = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "pids/munged", "seed-file": "munge.seed"}
        options = [f"--{name}={self.folder / path}" for name, path in paths.items()]
        self.start("munged", "--foreground", "--force", f"--log-file={self.folder}/log/munged.log", *options)
        self.wait_for("munge", "-n", f"--socket={self.folder / 'munge.sock'}")
        self.start("slurmctld", "-D")
        for node in range(1, self.shape.nodes + 1):
            self.boot(f"n{node}")
        self.wait_for("scontrol", "ping")
        self.wait_idle()

    def boot(self, node: str) -> None:
        number = int(node[1:])
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        script = f"""
            hostname {node}
            until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
            ip link set lo up; ip addr add {NETWORK}.{10 + number}/24 dev eth0; ip link set eth0 up
            slurmd -D -N {node} & wait $!; while :; do sleep 60; done"""
        options = ["--net", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc"]
        process = self.start("unshare", *options, "bash", "-c", script, log=f"node.{node}")
        self.nodes[node] = process
        inside = self.first_process(node)
        peer = ["type", "veth", "peer", "name", "eth0", "netns", str(inside)]
        self.wait_for("ip", "link", "add", f"to-{node}", *peer)
        self.call("ip", "link", "set", f"to-{node}", "master", "bridge", "up")

    def first_process(self, node: str) -> int:
        """The process id, in the lab, of the node's first process; its namespaces are ready once it is not ours."""
        outer = self.nodes[node].pid
        own = Path("/proc/self/ns/net").readlink()
        while True:
            with contextlib.suppress(FileNotFoundError):
                children = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
                if children and Path(f"/proc/{children[0]}/ns/net").readlink() != own:
                    return int(children[0])
            time.sleep(0.01)

    def obey(self, words: list[str]) -> str:
        match words:
            case ["crash", node]:
                self.call("ip", "link", "set", f"to-{node}", "down")  # first: a dead machine says no good-bye
                os.kill(self.first_process(node), signal.SIGKILL)
                self.nodes.pop(node).wait()
                self.call("ip", "link", "del", f"to-{node}")
            case ["boot", node]:
                self.boot(node)
            case ["cable", node, state]:
                self.call("ip", "link", "set", f"to-{node}", state)
            case ["disk", state]:
                found = os.statvfs(self.folder / "disk")
                size = (found.f_blocks - found.f_bfree) * found.f_frsize if state == "full" else DISK_BYTES
                self.call("mount", "-o", f"remount,size={size}", str(self.folder / "disk"))
            case ["repair", node] if node not in self.nodes:
                self.boot(node)
            case ["repair", node]:
                self.call("ip", "link", "set", f"to-{node}", "up")
                self.call("tc", "qdisc", "replace", "dev", f"to-{node}", "root", "pfifo")
            case ["slow", node, ""]:
                self.call("tc", "qdisc", "del", "dev", f"to-{node}", "root")
            case ["slow", node, rate]:
                shaped = ["root", "tbf", "rate", rate, "burst", "64kb", "latency", "200ms"]
                self.call("tc", "qdisc", "replace", "dev", f"to-{node}", *shaped)
            case ["signal", node, job, number]:
                return str(self.signal_ranks(node, job, int(number)))
        return "done"

    def signal_ranks(self, node: str, job: str, number: int) -> int:
        """The node's processes are those of its pid namespace."""
        space, count = Path(f"/proc/{self.first_process(node)}/ns/pid").readlink(), 0
        for process in ranks_of(job):
            with contextlib.suppress(OSError):  # it has ended
                if Path(f"/proc/{process}/ns/pid").readlink() == space:
                    os.kill(process, number)
                    count += 1
        return count

    def start(self, *command: str, log: str = "") -> subprocess.Popen[bytes]:
        with (self.folder / "log" / f"{log or command[0]}.out").open("ab") as output:
            return subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment
            )

    def call(self, *command: str) -> None:
        subprocess.run(command, check=True, env=self.environment, stdout=subprocess.DEVNULL)  # noqa: S603

    def wait_for(self, *command: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while subprocess.run(command, env=self.environment, capture_output=True).returncode:  # noqa: S603
            if time.monotonic() > deadline:
                raise TimeoutError(f"{' '.join(command)} does not answer")
            time.sleep(0.05)

    def wait_idle(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        command = ["sinfo", "--noheader", "--Node", "--format=%t", "--partition=urgent"]
        while True:
            said = subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout.split()  # noqa: S603
            if said.count("idle") == self.shape.nodes:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"nodes are {said}")
            time.sleep(0.1)


def _serve(folder: Path, shape: Shape) -> None:
    lab = Lab(folder, shape)
    lab.up()
    print("up", flush=True)
    for line in sys.stdin:
        print(lab.obey(json.loads(line)), flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), Shape(**json.loads(sys.argv[2])))
    subprocess.run(["umount", "--lazy", f"{sys.argv[1]}/disk"])  # noqa: S603, S607
    shutil.rmtree(sys.argv[1], ignore_errors=True)  # whoever made the cluster may not be there to do it
