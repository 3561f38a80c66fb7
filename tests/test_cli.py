from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt import cli

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SHORT = "--train.steps 2 --model.layers 1 --model.width 32 --model.heads 2 --model.context 32 --train.eval_sequences 4"


def run(*words: str) -> int:
    """The exit status of `megagpt WORDS ...`, in this process."""
    try:
        return cli.main(list(words))
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def folder(corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpora/ and a finished run, runs/mine, from the command line."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "corpora").symlink_to(corpora["prose"].parent)
    words = (
        f"train quickstart --out {folder}/runs/mine --data.mixture {corpora['prose']} 1 --model.vocabulary 512 {SHORT}"
    )
    assert run(*shlex.split(words)) == 0
    return folder


def test_help_imports_nothing_heavy():
    code = "import sys, megagpt.cli; megagpt.cli.main(['--help']); sys.exit(bool({'torch', 'tyro'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("words", ["--help", "launch --help", "train --help"])
def test_a_reader_that_goes_away_is_no_error(words):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "megagpt.cli", *words.split()]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, b"")


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_is_in_the_help_and_explains_itself(name, capsys):
    assert run("--help") == 0
    assert f"megagpt {name} " in capsys.readouterr().out
    assert run(*name.split(), "--help") == 0
    assert len(capsys.readouterr().out.splitlines()) > 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian quickstart", "no command is called 'trian'. Did you mean train?"),
        ("data biuld", "no command is called 'data biuld'. Did you mean data build?"),
        ("train gpt3-1.3", "no preset or file 'gpt3-1.3'. Did you mean gpt3-1.3b?"),
        ("train --out x", "megagpt train begins with a preset or a run.toml, not with --out"),
        ("train gpt3-125m", "data.mixture names no corpus"),
        ("train gpt3-125m --data.mixture nowhere 1", "nowhere is not a corpus"),
        (
            "train quickstart --parallel.zero_stage 2 --parallel.pipeline 2",
            "parallel.zero_stage = 2 does not work with",
        ),
        ("eval nowhere", "nowhere is not a run's folder"),
        ("report nowhere", "nowhere is not a run"),
        ("data which nowhere --step 1", "nowhere is not a run's folder"),
    ],
)
def test_a_mistake_is_one_error_with_exit_status_2(words, message, capsys):
    assert run(*words.split()) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert "Traceback" not in output.err


def test_a_corpus_without_documents_to_evaluate_on_is_refused_at_once_or_trained_on_to_the_end(
    corpora, tmp_path, capsys
):
    raw = tmp_path / "raw.jsonl"
    raw.write_text("".join(json.dumps({"text": f"sentence {number} of many"}) + "\n" for number in range(200)))
    words = f"--tokenizer {corpora['prose']} --heldout 0 --tasks 1 --processes 1"
    assert run("data", "build", str(raw), "--out", str(tmp_path / "all"), *words.split()) == 0
    mixture = f"{tmp_path}/all 1 {corpora['prose']} 1"
    train = f"train quickstart --out {tmp_path}/run --model.vocabulary 512 {SHORT} --data.mixture"
    assert run(*shlex.split(f"{train} {mixture}")) == 2
    assert f"evaluates on held-out documents, and {tmp_path}/all has none" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run(*shlex.split(f"{train} {mixture} --train.eval_every 0")) == 0
    evaluations = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["corpus"] for line in evaluations] == ["prose"]
    assert run(*shlex.split(f"{train} {tmp_path}/all 1 --train.eval_every 0".replace("/run ", "/alone "))) == 0
    assert run("report", str(tmp_path / "alone")) == 0


def test_a_mistyped_flag_gets_a_suggestion(capsys):
    assert run("train", "quickstart", "--train.stesp", "3") == 2
    output = capsys.readouterr()
    assert "--train.steps" in output.err + output.out


def test_a_vocabulary_that_is_too_small_is_refused_with_one_that_fits(folder, corpora, capsys):
    tokens = json.loads((corpora["prose"] / "manifest.json").read_text())["vocabulary"]
    words = f"train quickstart --data.mixture {corpora['prose']} 1 --model.vocabulary {tokens - 1} --dry_run"
    assert run(*words.split()) == 2
    assert f"is less than the {tokens:,} tokens of the tokenizer" in capsys.readouterr().err


def test_a_folder_with_another_model_is_refused_by_the_first_tensor(folder, corpora, capsys):
    words = (
        f"train quickstart --out {folder}/runs/mine --data.mixture {corpora['prose']} 1 --model.vocabulary 512 {SHORT}"
    )
    assert run(*words.replace("--model.width 32", "--model.width 64").split()) == 2
    assert "embedding.token.weight is [512, 32] there and [512, 64] in this run" in capsys.readouterr().err


def test_a_dry_run_shows_the_plan_and_writes_nothing(folder, corpora, tmp_path, capsys):
    words = f"train gpt3-125m --out {tmp_path}/run --data.mixture {corpora['prose']} 1 --parallel.data 8 --dry_run"
    assert run(*words.split()) == 0
    assert "data 8 x pipeline 1 x tensor 1" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_run_leaves_its_settings_records_samples_and_report(folder):
    names = {path.name for path in (folder / "runs/mine").iterdir()}
    expected = {
        "run.toml",
        "metrics.jsonl",
        "evaluations.jsonl",
        "events.jsonl",
        "checkpoints",
        "attempts",
        "report.html",
    }
    assert expected | {"samples.json", "tokenizer.json"} == names


def test_generate_gives_the_same_text_for_the_same_seed(folder, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert (
            run("generate", f"{folder}/runs/mine", "--prompt", "the", "--tokens", "12", "--seed", seed, "--json") == 0
        )
        texts.append(json.loads(capsys.readouterr().out)["texts"])
    assert texts[0] == texts[1] != texts[2]


def test_a_model_that_went_to_hugging_face_and_back_has_the_same_loss(folder, corpora, tmp_path, capsys):
    assert run("export", f"{folder}/runs/mine", "--to", f"{tmp_path}/hf") == 0
    assert run("import", f"{tmp_path}/hf", "--out", f"{tmp_path}/back") == 0
    capsys.readouterr()
    losses = []
    for where in (f"{folder}/runs/mine", f"{tmp_path}/back"):
        assert run("eval", where, "--corpus", str(corpora["prose"]), "--sequences", "4", "--json") == 0
        losses.append(json.loads(capsys.readouterr().out)["evaluations"][0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    words = f"train {tmp_path}/back/run.toml --out {tmp_path}/back --data.mixture {corpora['prose']} 1 --train.steps 1"
    assert run(*words.split(), "--train.precision", "fp32", "--train.global_batch", "8") == 0


def test_the_readmes_commands_run(folder, tmp_path, monkeypatch, capsys):
    """Every megagpt command of the README's shell blocks, in order, with sizes that take seconds."""
    (tmp_path / "text").mkdir()
    source = json.loads((folder / "corpora/prose.jsonl").read_text().splitlines()[0])["text"]
    for number in range(60):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{source[number:]} {number}")
    monkeypatch.chdir(tmp_path)
    blocks = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    commands = [shlex.split(line, comments=True) for line in blocks.splitlines() if line.startswith("megagpt ")]
    assert len(commands) > 8
    for _, *words in commands:
        if words[0] == "train" and "--dry_run" not in words:
            words += SHORT.split()
        if words[0] == "doctor":
            words += ["--json"]
        replaced = [{"4096": "512"}.get(word, word) for word in words]
        assert run(*replaced) == 0 or words[0] == "doctor", f"megagpt {' '.join(words)}: {capsys.readouterr().err}"


def test_a_corpus_of_another_tokenizer_is_refused(folder, tmp_path, capsys):
    raw = f"{folder}/corpora/prose.jsonl"
    assert run(*f"data build {raw} --out {tmp_path}/other --vocabulary 300 --heldout 0.1 --processes 1".split()) == 0
    assert run("eval", f"{folder}/runs/mine", "--corpus", f"{tmp_path}/other") == 2
    assert "was built with another tokenizer than the run" in capsys.readouterr().err
