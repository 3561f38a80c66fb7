"""`megagpt launch status | logs | why | stop | resume RUN`: a run, watched from any machine that sees its folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from megagpt import outcome, stop
from megagpt.config import load, steps_of
from megagpt.errors import UserError
from megagpt.heal.goodput import goodput
from megagpt.launch import submit, sweeps
from megagpt.launch.spec import Launch, read_launch
from megagpt.launch.why import first_cause
from megagpt.report.metrics import read_records
from megagpt.report.text import count, duration, share

RECENT = 20  # steps that speed is told of
LOG_BYTES = 4 << 20  # the end of each log, where causes stand


@dataclass(frozen=True, kw_only=True)
class Status:
    """State, step, loss, speed, goodput, time left and nodes of a launched run, or a line a run of a sweep."""

    run: Positional[Path]
    """Folder of the run, or of the sweep."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Logs:
    """Print the end of a rank's log."""

    run: Positional[Path]
    """Folder of the run."""
    rank: int = 0
    """Whose log."""
    attempt: int = 0
    """Of which attempt; 0: the newest."""
    lines: int = 40
    """How many lines."""


@dataclass(frozen=True, kw_only=True)
class Why:
    """Name the first failing rank, its node and the cause, from outcome files and all logs of an attempt."""

    run: Positional[Path]
    """Folder of the run."""
    attempt: int = 0
    """Which attempt; 0: the newest."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Ask all ranks to save after the step they are in, and to stop. The run can be resumed."""

    run: Positional[Path]
    """Folder of the run, or of the sweep."""


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Submit a run again as it was submitted last; it goes on from its newest checkpoint."""

    run: Positional[Path]
    """Folder of the run, or of the sweep: then all of its runs that are not done."""


def run_status(options: Status) -> int:
    """Print the state of the run, or of each run of a sweep; exit status 0 whatever it is."""
    if sweeps.is_sweep(options.run):
        each = [status_of(run) for run in sweeps.runs_of(options.run)]
        print(json.dumps(each, indent=2) if options.json else "\n".join(_table(options.run, each)))
        return 0
    found = status_of(options.run)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    number = {"loss": lambda v: f"{v:.4f}", "tokens_per_s": count, "mfu": share, "goodput": share}
    for name, value in found.items():
        if value in (None, "", []):
            continue
        text = number[name](value) if name in number else duration(value) if name == "seconds_left" else value
        print(f"  {name.replace('_', ' '):<14} {f'{text:,}' if isinstance(text, int) else text}")
    return 0


def status_of(out: Path) -> dict[str, Any]:
    """The run in `out` in a few numbers; None where they are not known."""
    launch = launch_of(out)
    jobs = read_records(out / "launch" / "jobs.jsonl")
    steps, events = read_records(out / "metrics.jsonl"), read_records(out / "events.jsonl")
    run = load(str(out / "launch" / "run.toml"))
    total = steps_of(run)
    recent = steps[-RECENT:]
    seconds = sum(record["seconds"] for record in recent)
    pace = seconds / len(recent) if recent else None
    job = jobs[-1]["job"] if jobs else ""
    queue = queued(job) if launch.kind == "slurm" and job else {}
    attempts = attempt_folders(out)
    ended = _outcome(attempts[-1]) if attempts else None
    done = steps[-1]["step"] if steps else 0
    split = goodput(out, mtbf_hours=run.checkpoint.mtbf_hours)
    return {
        "run": str(out),
        "state": queue.get("state") or (ended.result if ended else _last_event(events)),
        "job": job,
        "nodes": queue.get("nodes") or f"{launch.nodes}",
        "reason": queue.get("reason", ""),
        "attempts": len(attempts),
        "outcome": str(ended) if ended else "",
        "step": done,
        "steps": total,
        "loss": steps[-1]["loss"] if steps else None,
        "tokens_per_s": sum(r["tokens_per_s"] * r["seconds"] for r in recent) / seconds if seconds else None,
        "mfu": recent[-1]["mfu"] if recent else None,
        "goodput": split.share() if split else None,
        "seconds_left": pace * (total - done) if pace is not None else None,
    }


def _table(sweep: Path, each: list[dict[str, Any]]) -> list[str]:
    """A line a run of a sweep, under their titles."""
    rows: list[tuple[str, ...]] = [("run", "state", "step", "loss", "tokens/s", "goodput")]
    for one in each:
        name, loss, speed, good = Path(one["run"]).name, one["loss"], one["tokens_per_s"], one["goodput"]
        known = [f"{loss:.4f}" if loss is not None else "", count(speed) if speed else "", share(good) if good else ""]
        rows.append((name, one["state"], f"{one['step']:,} of {one['steps']:,}", *known))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = ("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return [f"{sweep}, a sweep of {len(each)} runs:", *(f"  {line}" for line in lines)]


def queued(job: str) -> dict[str, str]:
    """What squeue says of a job; empty if it knows it no more, or is not there."""
    if shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T|%N|%r"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603 - ours
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {}
    state, nodes, reason = lines[0].split("|", 2)
    return {"state": state.lower(), "nodes": nodes, "reason": "" if reason == "None" else reason}


def run_logs(options: Logs) -> int:
    """Print the end of the log, and where it stands. Raises UserError if there is none."""
    folder = _attempt(options.run, options.attempt)
    path = folder / "logs" / f"rank-{options.rank}.log"
    if not path.is_file():
        there = ", ".join(sorted(log.name for log in (folder / "logs").glob("*.log"))) or "none"
        raise UserError(f"{path} is not there.", f"Logs of this attempt: {there}.")
    print("\n".join([f"{path}:", *path.read_text(encoding="utf-8", errors="replace").splitlines()[-options.lines :]]))
    return 0


def run_why(options: Why) -> int:
    """Print the first cause; exit status 1 if there is one, 0 if nothing failed."""
    folder = _attempt(options.run, options.attempt)
    paths = [*sorted((folder / "logs").glob("*.log")), *_newest_job_log(options.run)]
    found = first_cause(outcome.words(folder), {path.name: _end(path) for path in paths})
    if options.json:
        print(json.dumps(None if found is None else dataclasses.asdict(found), indent=2))
    elif found is None:
        print(f"{folder}: nothing failed, as far as {len(paths)} logs and the ranks' outcomes say.")
    else:
        who = "no single rank" if found.rank is None else f"rank {found.rank}"
        place = f" on {found.host}" if found.host else ""
        print(f"{who}{place}: {found.cause.replace('_', ' ')}: {found.message}\n  {found.source} of {folder}")
    return int(found is not None)


def run_stop(options: Stop) -> int:
    """Leave the stop file for the run, or for each unfinished one of a sweep. Raises UserError if it is neither."""
    sweep = sweeps.is_sweep(options.run)
    for run in sweeps.runs_of(options.run) if sweep else [options.run]:
        launch_of(run)
        if not sweep or status_of(run)["state"] != "finished":
            stop.ask(run)
    print(f"{options.run}: asked to save and stop. megagpt launch resume {options.run} goes on.")
    return 0


def run_resume(options: Resume) -> int:
    """Submit or start the run, or what is left of a sweep, again. Raises UserError if it is still in the queue."""
    if sweeps.is_sweep(options.run):
        return _resume_sweep(options.run)
    launch = launch_of(options.run)
    jobs = read_records(options.run / "launch" / "jobs.jsonl")
    if launch.kind == "slurm" and jobs and queued(jobs[-1]["job"]):
        raise UserError(f"job {jobs[-1]['job']} of {options.run} is still in the queue.", "Stop it first, or wait.")
    stop.forget(options.run)
    script = launch.launch_folder() / "job.sh"
    if launch.kind == "slurm":
        if not script.is_file():
            raise UserError(
                f"{options.run} is one run of a sweep.",
                f"megagpt launch resume {options.run.parent} resumes them all.",
            )
        submit.check_slurm(launch)
        job = submit.submit_slurm(script)[-1]
        submit.record(launch, job)
        print(f"{options.run}: job {job}.")
        return 0
    submit.record(launch, "")
    if launch.kind == "kubernetes":
        print(submit.submit_kubernetes(launch.launch_folder() / "jobset.yaml"))
        return 0
    return submit.run_here(launch, script)


def _resume_sweep(sweep: Path) -> int:
    """Submit the runs that are not done and not in the queue, as an array of their own."""
    left = [run for run in sweeps.runs_of(sweep) if status_of(run)["state"] != "finished"]
    left = [run for run in left if not queued(sweeps.newest_job(run))]
    if not left:
        raise UserError(f"every run of {sweep} is done, or still in the queue.", f"megagpt launch status {sweep}")
    launches = [launch_of(run) for run in left]
    submit.check_slurm(launches[0])
    places = [sweeps.place_of(run) for run in left]
    for run in left:
        stop.forget(run)
    array = f"--array={','.join(map(str, places))}"
    job = submit.submit_slurm(sweep / "launch" / sweeps.SCRIPT, options=(array,))[-1]
    for launch, place in zip(launches, places, strict=True):
        submit.record(launch, f"{job}_{place}")
    print(f"{sweep}: job {job}, {len(left)} runs.")
    return 0


def launch_of(out: Path) -> Launch:
    """The launch that was last submitted in the folder. Raises UserError if there is none."""
    path = out / "launch" / "launch.json"
    if not path.is_file():
        raise UserError(f"{out} was not launched: it holds no launch/launch.json.", "Give the --out of a launch.")
    try:
        return read_launch(path)
    except ValueError as error:
        raise UserError(f"{error}", "Launch the run again with this version.") from error


def attempt_folders(out: Path) -> list[Path]:
    """The folders of all attempts, the oldest first."""
    root = out / "attempts"
    found = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return sorted(found, key=lambda path: (path.stat().st_mtime if not path.name.isdecimal() else 0, path.name))


def _attempt(out: Path, number: int) -> Path:
    launch_of(out)
    if number:
        folder = out / "attempts" / f"{number:04d}"
        if not folder.is_dir():
            raise UserError(f"{out} has no attempt {number}.", f"It has {len(attempt_folders(out))}.")
        return folder
    folders = attempt_folders(out)
    if not folders:
        raise UserError(f"{out} has not started yet: there is no attempt.", f"megagpt launch status {out}")
    return folders[-1]


def _outcome(folder: Path) -> outcome.Outcome | None:
    return outcome.read(folder / "outcome.json") or outcome.verdict(outcome.words(folder))


def _last_event(events: list[dict[str, Any]]) -> str:
    return (
        {"finished": "finished", "stopped": "stopped"}.get(events[-1]["event"], "started") if events else "submitted"
    )


def _newest_job_log(out: Path) -> list[Path]:
    return sorted((out / "launch").glob("slurm-*.out"), key=lambda path: path.stat().st_mtime)[-1:]


def _end(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_BYTES))
        return file.read().decode(errors="replace")
