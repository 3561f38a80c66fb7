"""A real SLURM cluster on this machine, thrown away after use: to rehearse on, and to test with.

    with cluster(nodes=4) as slurm:
        slurm.run("sbatch", "job.sh")
        slurm.crash("n2")

Needs Linux, root (or the capabilities that namespaces ask for) and Debian's slurm-wlm, munge and iproute2. Nothing on
the machine is changed, and two clusters do not meet: everything lives in namespaces of its own.

    the lab      a pid, network, mount and uts namespace, with this module as its first process, slurmctld and a bridge
    a node       the same again inside the lab, with its own slurmd, host name, address and pretended GPUs

The first process of the lab ends when its input does, which is when whoever made the cluster is gone, however it went;
the kernel then ends every process of the lab and takes the network away. No list of process ids can go stale.
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
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAMS = ("slurmctld", "slurmd", "munged", "ip", "nsenter", "unshare", "sbatch")
NETWORK = "10.77.0"
START_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the cluster looks like."""

    nodes: int = 4
    gpus: int = 2
    """Pretended GPUs of each node: device files that hold nothing."""
    cpus: int = 4
    memory_mib: int = 32_000
    down_seconds: int = 10
    """After which a silent node counts as down; SLURM's default is 300."""
    requeue_seconds: int = 6
    """Before which a requeued job does not start again; SLURM's default is 120."""
    grace_seconds: int = 30
    """Between the word to a preempted job and its end."""


def missing() -> str:
    """Why no cluster can be made here; empty if one can."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None and not Path("/usr/sbin", name).exists()]
    if lacking:
        return f"{', '.join(lacking)} not installed (Debian: slurm-wlm munge iproute2)"
    tried = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount", "--uts", "true"], capture_output=True)  # noqa: S607
    return "" if tried.returncode == 0 else f"no namespaces: {tried.stderr.decode().strip()}"


@dataclass
class Cluster:
    """A cluster that is up. Nodes are called n1, n2, ..."""

    shape: Shape
    folder: Path
    """Its configuration and logs; removed with it."""
    _lab: subprocess.Popen[str] = field(repr=False)
    _inside: int = 0

    def run(self, *command: str, check: bool = True, **values: Any) -> str:
        """Run a command where SLURM's commands find this cluster, and return what it printed."""
        done = subprocess.run(self.command(*command), capture_output=True, text=True, **{"env": self.env(), **values})  # noqa: S603
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def command(self, *command: str) -> list[str]:
        """The argument list that runs a command inside the lab."""
        return ["nsenter", f"--target={self._inside}", "--mount", "--net", "--pid", "--uts", "--", *command]

    def env(self) -> dict[str, str]:
        """The environment of this process, for a command inside the lab."""
        outer = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        return {**outer, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def crash(self, node: str) -> None:
        """Power loss: the node falls silent, and all its processes end."""
        self._tell("crash", node)

    def boot(self, node: str) -> None:
        """Start a node that crashed."""
        self._tell("boot", node)

    def pull_cable(self, node: str) -> None:
        """Its processes stay, and nobody hears of them."""
        self._tell("cable", node, "down")

    def plug_in(self, node: str) -> None:
        self._tell("cable", node, "up")

    def kill(self, node: str, pattern: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to the node's processes whose command line contains `pattern`; how many there were."""
        return int(self._tell("kill", node, pattern, str(int(number))))

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, by field."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def _tell(self, *words: str) -> str:
        assert self._lab.stdin is not None
        assert self._lab.stdout is not None
        self._lab.stdin.write(json.dumps(words) + "\n")
        self._lab.stdin.flush()
        answer = self._lab.stdout.readline()
        if not answer:
            raise RuntimeError(f"the cluster has ended; its logs were in {self.folder}")
        return answer.strip()


@contextlib.contextmanager
def cluster(shape: Shape = Shape()) -> Iterator[Cluster]:
    """Bring a cluster up, and take it down whatever happens. Raises RuntimeError if it does not come up."""
    folder = Path(tempfile.mkdtemp(prefix="megagpt-slurm-"))
    command = [sys.executable, str(Path(__file__).resolve()), str(folder), json.dumps(shape.__dict__)]
    namespaces = ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc"]
    lab = subprocess.Popen(  # noqa: S603
        [*namespaces, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        found = Cluster(shape, folder, lab)
        assert lab.stdout is not None
        if lab.stdout.readline().strip() != "up":
            raise RuntimeError(_last_words(folder))
        children = Path(f"/proc/{lab.pid}/task/{lab.pid}/children").read_text().split()
        found._inside = int(children[0])
        yield found
    finally:
        with contextlib.suppress(BrokenPipeError):
            lab.communicate()
        shutil.rmtree(folder, ignore_errors=True)


def _last_words(folder: Path) -> str:
    texts = [f"{path.name}: {path.read_text()[-500:]}" for path in sorted((folder / "log").glob("*"))]
    return "the SLURM cluster did not come up.\n" + "\n".join(texts)


class _Lab:
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
        while subprocess.run(["ip", "link", "add", f"to-{node}", *peer], env=self.environment).returncode:  # noqa: S603, S607
            time.sleep(0.02)
        self.call("ip", "link", "set", f"to-{node}", "master", "bridge", "up")

    def first_process(self, node: str) -> int:
        """The process id, in the lab, of the node's first process; its namespaces are ready once it is not ours."""
        outer = self.nodes[node].pid
        own = str(Path("/proc/self/ns/net").readlink())
        while True:
            with contextlib.suppress(FileNotFoundError):
                children = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
                if children and str(Path(f"/proc/{children[0]}/ns/net").readlink()) != own:
                    return int(children[0])
            time.sleep(0.01)

    def obey(self, words: list[str]) -> str:
        match words:
            case ["crash", node]:
                self.call("ip", "link", "set", f"to-{node}", "down")  # first: a dead machine says no good-bye
                os.kill(self.first_process(node), signal.SIGKILL)
                self.nodes.pop(node).wait()
            case ["boot", node]:
                self.boot(node)
            case ["cable", node, state]:
                self.call("ip", "link", "set", f"to-{node}", state)
            case ["kill", node, pattern, number]:
                return str(self.kill(node, pattern, int(number)))
        return "done"

    def kill(self, node: str, pattern: str, number: int) -> int:
        """The node's processes are those of its pid namespace."""
        space, count = Path(f"/proc/{self.first_process(node)}/ns/pid").readlink(), 0
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (folder / "ns/pid").readlink() == space and pattern.encode() in (folder / "cmdline").read_bytes():
                    os.kill(int(folder.name), number)
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


def configuration(folder: Path, shape: Shape) -> dict[str, str]:
    """SLURM's files, and the name services of the lab: reverse look-ups that nobody answers cost ranks 10 s each."""
    names = [f"n{number}" for number in range(1, shape.nodes + 1)]
    half = (shape.nodes + 1) // 2
    leaves = [names[:half], names[half:]] if shape.nodes > 1 else [names]
    switches = [f"SwitchName=leaf{place} Nodes={','.join(leaf)}" for place, leaf in enumerate(leaves, start=1)]
    spine = f"SwitchName=spine Switches={','.join(f'leaf{place + 1}' for place in range(len(leaves)))}"
    hosts = ["127.0.0.1 localhost", f"{NETWORK}.1 control"]
    hosts += [f"{NETWORK}.{10 + number} {name}" for number, name in enumerate(names, start=1)]
    return {
        "hosts": "\n".join(hosts) + "\n",
        "nsswitch.conf": "hosts: files\npasswd: files\ngroup: files\nservices: files\n",
        "resolv.conf": "",
        "slurm.conf": _slurm_conf(folder, shape, names),
        "gres.conf": f"NodeName={','.join(names)} Name=gpu File={folder}/dev/gpu[0-{shape.gpus - 1}]\n",
        "cgroup.conf": f"CgroupPlugin={'cgroup/v1' if _slurm_version() < (23, 2) else 'disabled'}\n",
        "topology.conf": "\n".join([*switches, spine]) + "\n",
    }


def _slurm_conf(folder: Path, shape: Shape, names: list[str]) -> str:
    each = f"CPUs={shape.cpus} RealMemory={shape.memory_mib} Gres=gpu:{shape.gpus} State=UNKNOWN"
    settings = {
        "ClusterName": "rehearsal",
        "SlurmctldHost": f"control({NETWORK}.1)",
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthInfo": f"socket={folder}/munge.sock,cred_expire={shape.requeue_seconds}",
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": f"{folder}/spool/%n",
        "SlurmctldPidFile": f"{folder}/pids/slurmctld",
        "SlurmdPidFile": f"{folder}/pids/%n",
        "SlurmctldLogFile": f"{folder}/log/slurmctld.log",
        "SlurmdLogFile": f"{folder}/log/slurmd.%n.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "SwitchType": "switch/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU_Memory",
        "SlurmdParameters": "config_overrides",
        "DefMemPerCPU": "500",
        "GresTypes": "gpu",
        "TopologyPlugin": "topology/tree",
        "ReturnToService": "2",
        "SlurmdTimeout": str(shape.down_seconds),
        "MessageTimeout": "10",
        "TCPTimeout": "2",
        "InactiveLimit": "0",
        "KillWait": "5",
        "MinJobAge": "600",
        "JobRequeue": "1",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "bf_interval=1,sched_interval=2,sched_min_interval=10000,batch_sched_delay=0",
        "PropagateResourceLimits": "NONE",
        "MailProg": "/bin/true",
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    lines += [f"NodeName={name} NodeAddr={NETWORK}.{int(name[1:]) + 10} NodeHostname={name} {each}" for name in names]
    common = f"Nodes={','.join(names)} MaxTime=INFINITE DefaultTime=30 State=UP GraceTime={shape.grace_seconds}"
    lines += [f"PartitionName=main Default=YES PriorityTier=1 {common}"]
    lines += [f"PartitionName=urgent PriorityTier=10 {common}"]
    return "\n".join(lines) + "\n"


def _slurm_version() -> tuple[int, ...]:
    program = shutil.which("slurmd") or "/usr/sbin/slurmd"
    said = subprocess.run([program, "-V"], capture_output=True, text=True, check=True).stdout  # noqa: S603
    return tuple(int(part) for part in said.split()[-1].split(".")[:2])


def _serve(folder: Path, shape: Shape) -> None:
    lab = _Lab(folder, shape)
    lab.up()
    print("up", flush=True)
    for line in sys.stdin:
        print(lab.obey(json.loads(line)), flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), Shape(**json.loads(sys.argv[2])))
    shutil.rmtree(sys.argv[1], ignore_errors=True)  # whoever made the cluster may not be there to do it
