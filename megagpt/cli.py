"""The command line: one function a command. Heavy imports happen inside them, so that help is instant."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from megagpt import __version__
from megagpt.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from megagpt.launch.spec import Kind

Options = TypeVar("Options")


@dataclass(frozen=True)
class Command:
    """What `megagpt WORDS ...` runs, and the line that help says of it."""

    run: Callable[[list[str]], int]
    summary: str
    example: str


def main(arguments: list[str] | None = None) -> int:
    """Run the command that `arguments` (or sys.argv) name; returns the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        try:
            return _run(words)
        finally:
            sys.stdout.flush()
    except UserError as error:
        print(f"megagpt: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("megagpt: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone (megagpt ... | head): nothing is left to say, and nobody to say it to
        return 141


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"megagpt {__version__}")
        return 0
    name, rest = _split(words)
    return COMMANDS[name].run(rest)


def _split(words: list[str]) -> tuple[str, list[str]]:
    """The command's name, of one or two words, and its arguments."""
    two = " ".join(words[:2])
    if two in COMMANDS:
        return two, words[2:]
    if words[0] in COMMANDS:
        return words[0], words[1:]
    group = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if group and (len(words) == 1 or words[1] in ("-h", "--help")):
        print(_help(group))
        raise SystemExit(0)
    name = two if group else words[0]
    raise UserError(f"no command is called '{name}'.{did_you_mean(name, COMMANDS)}", "megagpt --help lists them all.")


def _help(names: list[str] | None = None) -> str:
    lines = ["megagpt: pre-train GPT models, from a laptop to a SLURM cluster.", ""]
    for name in names or COMMANDS:
        lines += [f"  megagpt {name:<17} {COMMANDS[name].summary}", f"  {'':<25} {COMMANDS[name].example}"]
    lines += ["", "Every command explains its options with --help; those that report take --json."]
    return "\n".join(lines)


def _parse(kind: type[Options], name: str, words: list[str], default: Options | None = None) -> Options:
    """The options of a command from its dataclass: tyro prints help and mistakes, with suggestions, and exits."""
    import tyro

    arguments: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(kind, prog=f"megagpt {name}", args=words, use_underscores=True, **arguments)


def train(words: list[str]) -> int:
    from megagpt.commands.train import Train, run_train, train_defaults

    if not words or words[0] in ("-h", "--help"):
        words = ["quickstart", *words]
    if words[0].startswith("-"):
        raise UserError(
            f"megagpt train begins with a preset or a run.toml, not with {words[0]}.", COMMANDS["train"].example
        )
    preset, rest = words[0], words[1:]
    return run_train(_parse(Train, f"train {preset}", rest, train_defaults(preset)), preset=preset)


def evaluate(words: list[str]) -> int:
    from megagpt.commands.evaluate import Eval, run_eval

    return run_eval(_parse(Eval, "eval", words))


def generate(words: list[str]) -> int:
    from megagpt.commands.generate import Generate, run_generate

    return run_generate(_parse(Generate, "generate", words))


def export(words: list[str]) -> int:
    from megagpt.commands.transfer import Export, run_export

    return run_export(_parse(Export, "export", words))


def import_(words: list[str]) -> int:
    from megagpt.commands.transfer import Import, run_import

    return run_import(_parse(Import, "import", words))


def checkpoint_ls(words: list[str]) -> int:
    from megagpt.commands.checkpoint import List, run_list

    return run_list(_parse(List, "checkpoint ls", words))


def checkpoint_show(words: list[str]) -> int:
    from megagpt.commands.checkpoint import Show, run_show

    return run_show(_parse(Show, "checkpoint show", words))


def checkpoint_verify(words: list[str]) -> int:
    from megagpt.commands.checkpoint import Verify, run_verify

    return run_verify(_parse(Verify, "checkpoint verify", words))


def checkpoint_diff(words: list[str]) -> int:
    from megagpt.commands.checkpoint import Diff, run_diff

    return run_diff(_parse(Diff, "checkpoint diff", words))


def checkpoint_reshard(words: list[str]) -> int:
    from megagpt.commands.checkpoint import Reshard, run_reshard

    return run_reshard(_parse(Reshard, "checkpoint reshard", words))


def checkpoint_average(words: list[str]) -> int:
    from megagpt.commands.checkpoint import Average, run_average

    return run_average(_parse(Average, "checkpoint average", words))


def verify(words: list[str]) -> int:
    from megagpt.verify.commands import Verify, run_verify

    return run_verify(_parse(Verify, "verify", words))


def data_build(words: list[str]) -> int:
    from megagpt.data.commands import Build, run_build

    run_build(_parse(Build, "data build", words))
    return 0


def data_convert(words: list[str]) -> int:
    from megagpt.data.commands import Convert, run_convert

    run_convert(_parse(Convert, "data convert", words))
    return 0


def data_inspect(words: list[str]) -> int:
    from megagpt.data.commands import Inspect, run_inspect

    run_inspect(_parse(Inspect, "data inspect", words))
    return 0


def data_which(words: list[str]) -> int:
    from megagpt.commands.data import Which, run_which

    run_which(_parse(Which, "data which", words))
    return 0


def data_replay(words: list[str]) -> int:
    from megagpt.commands.data import Replay, run_replay

    run_replay(_parse(Replay, "data replay", words))
    return 0


def data_mix(words: list[str]) -> int:
    from megagpt.commands.data import Mix, run_mix

    run_mix(_parse(Mix, "data mix", words))
    return 0


def data_stats(words: list[str]) -> int:
    from megagpt.commands.data import Stats, run_stats

    run_stats(_parse(Stats, "data stats", words))
    return 0


def data_verify(words: list[str]) -> int:
    from megagpt.data.commands import Verify, run_verify

    run_verify(_parse(Verify, "data verify", words))
    return 0


def launch_as(kind: Kind) -> Callable[[list[str]], int]:
    """`megagpt launch KIND PRESET ...`"""

    def launch(words: list[str]) -> int:
        from megagpt.launch.commands import LaunchRun, launch_defaults, run_launch, spelled

        if not words or words[0] in ("-h", "--help"):
            words = ["quickstart", *words]
        if words[0].startswith("-"):
            raise UserError(
                f"megagpt launch {kind} begins with a preset or a run.toml, not with {words[0]}.",
                COMMANDS[f"launch {kind}"].example,
            )
        preset, rest = words[0], spelled(words[1:])
        return run_launch(
            _parse(LaunchRun, f"launch {kind} {preset}", rest, launch_defaults(preset)), kind=kind, preset=preset
        )

    return launch


def launch_data(words: list[str]) -> int:
    from megagpt.launch.commands import LaunchData, run_launch_data

    return run_launch_data(_parse(LaunchData, "launch data", words))


def launch_status(words: list[str]) -> int:
    from megagpt.launch.watch import Status, run_status

    return run_status(_parse(Status, "launch status", words))


def launch_logs(words: list[str]) -> int:
    from megagpt.launch.watch import Logs, run_logs

    return run_logs(_parse(Logs, "launch logs", words))


def launch_why(words: list[str]) -> int:
    from megagpt.launch.watch import Why, run_why

    return run_why(_parse(Why, "launch why", words))


def launch_stop(words: list[str]) -> int:
    from megagpt.launch.watch import Stop, run_stop

    return run_stop(_parse(Stop, "launch stop", words))


def launch_drill(words: list[str]) -> int:
    from megagpt.launch.drill import Drill, run_drill

    preset, rest = (words[0], words[1:]) if words and not words[0].startswith("-") else ("quickstart", words)
    return run_drill(_parse(Drill, "launch drill", rest), preset=preset)


def launch_resume(words: list[str]) -> int:
    from megagpt.launch.watch import Resume, run_resume

    return run_resume(_parse(Resume, "launch resume", words))


def report(words: list[str]) -> int:
    from megagpt.report.commands import Report, run_report

    return run_report(_parse(Report, "report", words))


def doctor(words: list[str]) -> int:
    from megagpt.doctor import Doctor, run_doctor

    return run_doctor(_parse(Doctor, "doctor", words))


def demo(words: list[str]) -> int:
    from megagpt.commands.demo import Demo, run_demo

    return run_demo(_parse(Demo, "demo", words))


COMMANDS = {
    "demo": Command(demo, "the whole pipeline at small size, in three minutes", "megagpt demo"),
    "train": Command(
        train,
        "train a preset, or a run.toml; on the same folder again, continue",
        "megagpt train gpt3-125m --out runs/first --data.mixture corpora/web 3 corpora/code 1 --parallel.data 8",
    ),
    "eval": Command(evaluate, "loss, perplexity and bits per byte on any corpus", "megagpt eval runs/first"),
    "generate": Command(generate, "continue a prompt", 'megagpt generate runs/first --prompt "Once upon"'),
    "data build": Command(
        data_build,
        "tokenise Parquet, JSONL or text into a corpus of shards",
        "megagpt data build web/*.parquet --out corpora/web --tokenizer tokenizer.json",
    ),
    "data convert": Command(
        data_convert,
        "take over a corpus of one document a tar member",
        "megagpt data convert 'old/*.tar' --out corpora/old --tokenizer tokenizer.json",
    ),
    "data inspect": Command(data_inspect, "what a corpus holds", "megagpt data inspect corpora/web"),
    "data verify": Command(data_verify, "check every hash of a corpus", "megagpt data verify corpora/web"),
    "data stats": Command(data_stats, "what each raw file gave to a corpus", "megagpt data stats corpora/web"),
    "data mix": Command(
        data_mix, "what a run would read of each corpus", "megagpt data mix gpt3-125m --mixture corpora/web 3"
    ),
    "data which": Command(data_which, "documents that a step reads", "megagpt data which runs/first --step 1200"),
    "data replay": Command(data_replay, "a step's exact batch", "megagpt data replay runs/first --step 1200"),
    "export": Command(export, "write a Hugging Face folder", "megagpt export runs/first --to hf/first"),
    "import": Command(import_, "start a run from a Hugging Face folder", "megagpt import hf/gpt2 --out runs/gpt2"),
    "checkpoint ls": Command(checkpoint_ls, "a run's checkpoints", "megagpt checkpoint ls runs/first"),
    "checkpoint show": Command(checkpoint_show, "what one holds", "megagpt checkpoint show runs/first"),
    "checkpoint verify": Command(
        checkpoint_verify, "check every byte of them", "megagpt checkpoint verify runs/first"
    ),
    "checkpoint diff": Command(
        checkpoint_diff,
        "compare two, tensor by tensor, whatever their layouts",
        "megagpt checkpoint diff runs/a runs/b",
    ),
    "checkpoint reshard": Command(
        checkpoint_reshard,
        "write one in another number of files",
        "megagpt checkpoint reshard runs/first --to copies/first --files 64",
    ),
    "checkpoint export": Command(export, "the same as export", "megagpt checkpoint export runs/first --to hf/first"),
    "checkpoint average": Command(
        checkpoint_average,
        "a new run whose weights are the mean of several",
        "megagpt checkpoint average runs/a runs/b --out runs/mean",
    ),
    "verify": Command(verify, "prove that every layout computes the same", "megagpt verify gpt3-125m --world 8"),
    "launch slurm": Command(
        launch_as("slurm"),
        "submit a run to SLURM, or show the script with --dry-run",
        "megagpt launch slurm gpt3-6.7b --nodes 16 --gpus-per-node 8 --data.mixture corpora/web 1",
    ),
    "launch torchrun": Command(
        launch_as("torchrun"), "torchrun, here or on every node", "megagpt launch torchrun gpt3-125m --gpus-per-node 8"
    ),
    "launch hostfile": Command(
        launch_as("hostfile"),
        "ranks over ssh, without a scheduler",
        "megagpt launch hostfile gpt3-1.3b --hosts node1 node2 --gpus-per-node 8",
    ),
    "launch kubernetes": Command(
        launch_as("kubernetes"),
        "a Kubernetes JobSet",
        "megagpt launch kubernetes gpt3-6.7b --nodes 16 --gpus-per-node 8 --cluster k8s.toml",
    ),
    "launch local": Command(
        launch_as("local"), "this machine's GPUs, as a launch", "megagpt launch local gpt3-125m --gpus-per-node 8"
    ),
    "launch data": Command(
        launch_data,
        "tokenise on SLURM, as a job array",
        "megagpt launch data 'web/*.parquet' --out corpora/web --tokenizer tokenizer.json --tasks 64",
    ),
    "launch status": Command(
        launch_status, "state, step, loss, speed, goodput, time left", "megagpt launch status runs/first"
    ),
    "launch logs": Command(launch_logs, "a rank's log of any attempt", "megagpt launch logs runs/first --rank 3"),
    "launch why": Command(launch_why, "the first failing rank, node and cause", "megagpt launch why runs/first"),
    "launch stop": Command(launch_stop, "save after this step and stop", "megagpt launch stop runs/first"),
    "launch drill": Command(
        launch_drill, "rehearse a run's bad days on a throw-away SLURM", "megagpt launch drill gpt3-1.3b"
    ),
    "launch resume": Command(launch_resume, "submit a stopped run again", "megagpt launch resume runs/first"),
    "report": Command(report, "write a run's report.html again", "megagpt report runs/first"),
    "doctor": Command(doctor, "check this machine, with a remedy for each finding", "megagpt doctor"),
}


if __name__ == "__main__":
    sys.exit(main())
