"""`megagpt launch slurm | torchrun | hostfile | kubernetes | local PRESET`: from settings to a job."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

import megagpt
from megagpt import config
from megagpt.checks import checked, costs_of
from megagpt.errors import UserError
from megagpt.launch import hostfile, kubernetes, slurm, submit, sweeps, torchrun
from megagpt.launch.layout import fill_layout
from megagpt.launch.profiles import load_cluster
from megagpt.launch.spec import Kind, Launch, Retries, interpreter, to_json

FILES = {"kubernetes": "jobset.yaml", "hostfile": "plan.txt"}


@dataclass(frozen=True, kw_only=True)
class LaunchRun(config.Run):
    """Launch a run on a cluster; run settings are spelled as for train, or --set SECTION.KEY=VALUE."""

    nodes: int = 1
    """Nodes; parallel.data is filled in so that every GPU has a rank."""
    gpus_per_node: int = 0
    """GPUs of each node. 0: as the cluster's profile says."""
    cluster: str = ""
    """Profile: NAME of ~/.config/megagpt/clusters/NAME.toml, or a TOML file. Empty: default, if there is one."""
    out: Path = Path()
    """Folder of the run, on a file system that all nodes see."""
    dry_run: bool = False
    """Print exactly what would be submitted, and how it differs from the last submission; submit nothing."""
    sweep: tuple[str, ...] = ()
    """slurm: a run for each value, as one job array: optim.lr=1e-4,2e-4; several names give all combinations."""
    hosts: tuple[str, ...] = ()
    """hostfile: the nodes to ssh to, in the order of ranks, the last the spares; or one file with a node a line."""
    chain: int = 0
    """slurm: further jobs, each after the one before, where the cluster does not requeue."""
    cpu: bool = False
    """Ranks on CPUs: ask for no GPU."""


@dataclass(frozen=True, kw_only=True)
class LaunchData:
    """Tokenise raw texts as a SLURM job array, a task a part of the input; any of them may run again."""

    inputs: Positional[tuple[str, ...]]
    """As for megagpt data build: files, folders, or globs in quotes."""
    out: Path
    """Folder of the corpus, on a file system that all nodes see."""
    tokenizer: Path
    """A tokenizer.json, or a folder with one: parts cannot each train their own."""
    tasks: int = 64
    """Parts of the input, and of the array."""
    column: str = "text"
    """Parquet column or JSONL key that holds the text."""
    cluster: str = ""
    """Profile, as for launch slurm."""
    dry_run: bool = False
    """Print exactly what would be submitted, and submit nothing."""


def run_launch_data(options: LaunchData) -> int:
    """Show or submit the array. Raises UserError for what can be refused before."""
    if options.tasks < 1:
        raise UserError(f"tasks = {options.tasks} must be at least 1.")
    cluster = load_cluster(options.cluster)
    out = options.out.absolute()
    build = ["data", "build", *options.inputs, "--out", str(out), "--tokenizer", str(options.tokenizer.absolute())]
    build += ["--column", options.column, "--tasks", str(options.tasks)]
    launch = Launch(
        kind="slurm",
        name=f"{out.name}-data",
        out=str(out),
        folder=str(Path.cwd()),
        command=(interpreter(dataclasses.replace(cluster, container="none"), "slurm"), "-m", "megagpt.cli", *build),
        nodes=1,
        gpus_per_node=1,
        devices=False,
        cluster=dataclasses.replace(cluster, spares=0, container="none"),
        source=str(Path(megagpt.__file__).absolute().parents[1]),
    )
    text, script = slurm.data_script(launch, tasks=options.tasks), launch.launch_folder() / "data.sh"
    if options.dry_run:
        print(text, end="")
        return 0
    submit.check_slurm(launch)
    submit.write_files({script: text})
    print(f"{out}: job {' '.join(submit.submit_slurm(script))}.")
    return 0


def launch_defaults(preset: str) -> LaunchRun:
    """The options of `megagpt launch KIND PRESET` before any flag."""
    from megagpt.commands.train import train_defaults

    train = train_defaults(preset)
    fields = {spec.name: getattr(train, spec.name) for spec in dataclasses.fields(config.Run)}
    return LaunchRun(**fields, out=train.out)


def spelled(words: Sequence[str]) -> list[str]:
    """--set optim.lr=2e-4 is --optim.lr 2e-4."""
    found, rest = [], iter(words)
    for word in rest:
        setting = (
            next(rest, "") if word == "--set" else word.removeprefix("--set=") if word.startswith("--set=") else ""
        )
        if word == "--set" or setting:
            name, equals, value = setting.partition("=")
            if not equals:
                raise UserError(f"--set {setting} has no value.", "Write --set SECTION.KEY=VALUE.")
            found += [f"--{name}", *(shlex.split(value) if name == "data.mixture" else [value])]
        else:
            found.append(word)
    return found


def run_launch(options: LaunchRun, *, kind: Kind, preset: str) -> int:
    """Check, show or submit. Raises UserError for whatever can be refused before anything is submitted."""
    runs = _swept(options) if kind == "slurm" else {"": options}
    launches, files, layouts = [], {}, []
    for name, chosen in runs.items():
        run, launch = make_launch(chosen, kind=kind, name=name)
        launches.append(launch)
        layouts.append(_layout_words(run))
        files[launch.launch_folder() / "run.toml"] = config.to_toml(run)
        files[launch.launch_folder() / "launch.json"] = to_json(launch)
    out = options.out.absolute()
    if kind == "slurm" and options.sweep:
        text, script = slurm.sweep_script(launches, out=out, layout=layouts[0]), out / "launch" / sweeps.SCRIPT
    else:
        text, script = render(launches[0], layout=layouts[0]), out / "launch" / FILES.get(kind, "job.sh")
    if options.dry_run:
        _show(text, script, files, options)
        return 0
    for chosen in runs.values():
        _check_data(chosen, preset)
    if kind == "slurm":
        submit.check_slurm(launches[0])
    submit.write_files({**files, script: text})
    return _hand_over(launches, script, chain=options.chain)


def make_launch(options: LaunchRun, *, kind: Kind, name: str = "") -> tuple[config.Run, Launch]:
    """The filled-in run and its launch; `name` is that of one run of a sweep."""
    cluster = load_cluster(options.cluster)
    hosts = read_hosts(options.hosts) if kind == "hostfile" else ()
    nodes = len(hosts) - cluster.spares if hosts else options.nodes
    if hosts and nodes < 1:
        raise UserError(f"{len(hosts)} hosts are none without {cluster.spares} spares.", "Name more --hosts.")
    gpus = options.gpus_per_node or cluster.gpus_per_node
    if not gpus:
        raise UserError(
            "gpus_per_node is not set.", "Add --gpus-per-node N, or gpus_per_node = N to the cluster's profile."
        )
    if kind == "local" and nodes > 1:
        raise UserError(
            f"launch local is this machine alone, not --nodes {nodes}.", "Use hostfile, torchrun or slurm."
        )
    run = config.Run(**{spec.name: getattr(options, spec.name) for spec in dataclasses.fields(config.Run)})
    run = fill_layout(run, nodes=nodes, gpus_per_node=gpus, gpu_memory_gib=cluster.gpu_memory_gib)
    out = options.out.absolute()
    settings = out / "launch" / "run.toml"
    launch = Launch(
        kind=kind,
        name=options.out.name if not name else f"{options.out.parent.name}-{name}",
        out=str(out),
        folder=cluster.claim_path if kind == "kubernetes" else str(Path.cwd()),
        command=(interpreter(cluster, kind), "-m", "megagpt.cli", "train", str(settings), "--out", str(out)),
        nodes=nodes,
        gpus_per_node=gpus,
        devices=not options.cpu,
        cluster=cluster if kind in ("slurm", "hostfile") else dataclasses.replace(cluster, spares=0),
        cluster_name=Path(options.cluster or "default").stem,
        retries=Retries(chain=options.chain),
        hosts=hosts,
        source=str(Path(megagpt.__file__).absolute().parents[1]),
    )
    return run, launch


def render(launch: Launch, *, layout: str) -> str:
    """The text of a launch: a script, a manifest, or a list of commands."""
    texts = {
        "slurm": slurm.batch_script,
        "torchrun": torchrun.torchrun_script,
        "local": torchrun.local_script,
        "kubernetes": kubernetes.job_set,
        "hostfile": hostfile.plan_text,
    }
    return texts[launch.kind](launch, layout=layout)


def read_hosts(hosts: Sequence[str]) -> tuple[str, ...]:
    """Host names as given, or the first word of each line of a file; DeepSpeed's `slots=8` may follow."""
    if len(hosts) == 1 and Path(hosts[0]).is_file():
        lines = (line.split("#")[0].split() for line in Path(hosts[0]).read_text(encoding="utf-8").splitlines())
        hosts = [words[0] for words in lines if words]
    if not hosts:
        raise UserError(
            "launch hostfile needs the nodes.", "Add --hosts NODE NODE ..., or --hosts FILE with a node a line."
        )
    for host in hosts:
        if host.startswith("-"):
            raise UserError(f"--hosts {host}: a host's name does not begin with a dash.")
    return tuple(hosts)


def _swept(options: LaunchRun) -> dict[str, LaunchRun]:
    """Name -> options of each run of the sweep; just the options themselves without one."""
    axes = []
    for word in options.sweep:
        name, equals, values = word.partition("=")
        if not equals or not all(values.split(",")):
            raise UserError(f"--sweep {word} names no values.", "Write --sweep optim.lr=1e-4,2e-4.")
        axes.append([(name, value) for value in values.split(",")])
    found = {}
    for choices in itertools.product(*axes):
        label = ",".join(f"{name}={value}" for name, value in choices)
        chosen = options
        for name, value in choices:
            chosen = _with_setting(chosen, name, value)
        found[label] = dataclasses.replace(chosen, out=options.out / label if label else options.out)
    return found


def _with_setting(options: LaunchRun, name: str, value: str) -> LaunchRun:
    import tyro

    words = [f"--{name}", value]
    return tyro.cli(LaunchRun, args=words, default=options, use_underscores=True)


def _layout_words(run: config.Run) -> str:
    parallel = run.parallel
    return f"data {parallel.data} x pipeline {parallel.pipeline} x tensor {parallel.tensor}"


def _show(text: str, script: Path, files: dict[Path, str], options: LaunchRun) -> None:
    """The text itself on stdout, alone, so that it can be piped; everything else on stderr."""
    print(text, end="")
    print(f"megagpt: dry run; this would be {script}.", file=sys.stderr)
    if not options.data.mixture:
        print("megagpt: warning: data.mixture names no corpus; a submission will ask for one.", file=sys.stderr)
    changed = submit.differences({**files, script: text})
    if changed:
        print(f"megagpt: differences from the last submission:\n{changed}", file=sys.stderr)
    elif script.exists():
        print("megagpt: the same as the last submission.", file=sys.stderr)


def _check_data(options: LaunchRun, preset: str) -> None:
    """The run with its corpora, as train will check them again."""
    from megagpt.commands.train import ensure_quickstart_corpora, prepare

    run = config.Run(**{spec.name: getattr(options, spec.name) for spec in dataclasses.fields(config.Run)})
    single = dataclasses.replace(run, parallel=config.Parallel())
    checked(dataclasses.replace(single, train=dataclasses.replace(run.train, ramp_start=None)))
    if preset == "quickstart":
        ensure_quickstart_corpora(run)
    prepare(run, options.out, write=False)
    for cost in costs_of(run):
        print(f"megagpt: warning: {cost}", file=sys.stderr)


def _hand_over(launches: Sequence[Launch], script: Path, *, chain: int) -> int:
    """Submit or run; returns the exit status."""
    first = launches[0]
    if first.kind == "slurm":
        jobs = submit.submit_slurm(script, chain=chain)
        for place, launch in enumerate(launches):
            for job in jobs:
                submit.record(launch, f"{job}_{place}" if script.name == sweeps.SCRIPT else job)
            print(f"{launch.out}: job {' '.join(jobs)}. megagpt launch status {launch.out}")
        return 0
    submit.record(first, "")
    if first.kind == "kubernetes":
        print(submit.submit_kubernetes(script))
        return 0
    if first.kind == "torchrun" and first.nodes > 1:
        print(f"{script}: run it on every node, with MASTER_ADDR and NODE_RANK set.")
        return 0
    return submit.run_here(first, script)
