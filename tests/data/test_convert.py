from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.writer import TarWriter

from megagpt.data import sources
from megagpt.data.commands import Convert, run_convert
from megagpt.data.corpus import open_corpus, verify
from megagpt.data.tokenizer import Tokenizer, train_tokenizer
from megagpt.errors import UserError
from tests.data.test_build import texts


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    tokenizer = train_tokenizer(texts(1, 20), 300)
    (tmp_path / "tokenizer.json").write_text(tokenizer.definition)
    return tokenizer


def write(path: Path, samples: list[dict[str, Any]]) -> None:
    with TarWriter(str(path)) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{number:05d}", **sample})


def convert(tmp_path: Path, name: str = "*.tar", **options: Any) -> None:
    run_convert(
        Convert(
            tars=(str(tmp_path / name),),
            out=tmp_path / "out",
            tokenizer=tmp_path / "tokenizer.json",
            heldout=0.2,
            processes=1,
            json=True,
            **options,
        )
    )


def test_texts_json_and_ids_of_foreign_tars_become_a_corpus(tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = texts(4, 60)
    write(tmp_path / "a.tar", [{"txt": text, "png": b"picture"} for text in documents[:20]] + [{"png": b"alone"}])
    write(tmp_path / "b.tar", [{"json": json.dumps({"text": text})} for text in documents[20:40]])
    ids = [np.array(tokenizer.encode(text), dtype=np.int64) for text in documents[40:]]
    ids[3] = np.append(ids[3], tokenizer.end_of_text)
    write(tmp_path / "c.tar", [{"npy": array} for array in ids])
    convert(tmp_path)
    corpus = open_corpus(tmp_path / "out")
    found = []
    for name in ("train", "heldout"):
        split = corpus.split(name)
        found += tokenizer.decode(split.read(0, split.tokens)).split("<|endoftext|>")[:-1]
    assert sorted(found) == sorted(documents)
    assert sum(counts.text_bytes for counts in corpus.manifest.counts.values()) == sum(map(len, documents))
    assert verify(tmp_path / "out", repair=False) == []


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"npy": npy(np.array([5, 0, 6]))}, r"a\.tar: document 2 has the end of text inside it"),
        ({"npy": npy(np.array([5, 999]))}, r"a\.tar: document 2 has ids from 5 to 999; the tokenizer has 2\d\d"),
        (
            {"npy": npy(np.zeros((2, 2), np.int64))},
            r"at the sample '00001': an array of int64 \(2, 2\) is not the ids",
        ),
        ({"npy": npy(np.array([0.5]))}, "an array of float64"),
        ({"npy": b"nothing"}, r"a\.tar cannot be read at the sample '00001'"),
        ({"txt": b"\xff"}, r"a\.tar cannot be read at the sample '00001'"),
        ({"json": b'{"body": "x"}'}, "there is no text under 'text'"),
        ({"json": b"{"}, r"a\.tar cannot be read at the sample '00001'"),
    ],
)
def test_a_broken_sample_is_named(tokenizer: Tokenizer, tmp_path: Path, sample: dict, message: str) -> None:
    with TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        writer.write({"__key__": "00000", "txt": b"alpha beta"})
        writer.write({"__key__": "00001", **sample})
    with pytest.raises(UserError, match=message):
        convert(tmp_path)
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_broken_tar_a_compressed_one_and_other_files_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "a.tar", [{"txt": "x" * 2000}] * 5)
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[:7000])
    with pytest.raises(UserError, match=r"cut\.tar cannot be read"):
        convert(tmp_path, "cut.tar")
    (tmp_path / "b.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"b\.tar\.gz is not a tar"):
        convert(tmp_path, "b.tar.gz")
    with pytest.raises(UserError, match=r"b\.tar\.gz is a compressed tar"):
        sources.cut([str(tmp_path / "b.tar.gz")], column="text", tasks=1, largest=1000)


def test_a_name_that_begins_with_pipe_is_a_file_and_otherwise_refused(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pipe:touch forged; cat a.tar", [{"txt": text} for text in texts(1, 9)])
    (tmp_path / "pipe:touch forged; cat a.tar").rename(tmp_path / "pipe:touch forged; #.tar")
    run_convert(
        Convert(
            tars=("pipe:touch forged; #.tar",),
            out=tmp_path / "out",
            tokenizer=tmp_path / "tokenizer.json",
            heldout=0.0,
            processes=1,
            json=True,
        )
    )
    assert not (tmp_path / "forged").exists()
    assert open_corpus(tmp_path / "out").manifest.counts["train"].documents == 9
    with pytest.raises(UserError, match="pipe:touch forged is a command, and commands are not run"):
        run_convert(Convert(tars=("pipe:touch forged",), out=tmp_path / "x", tokenizer=tmp_path / "tokenizer.json"))
    assert not (tmp_path / "forged").exists()


def test_what_a_command_writes_is_the_same_corpus_where_commands_are_allowed(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write(tmp_path / "a b.tar", [{"txt": text} for text in texts(1, 9)])
    manifests = []
    for out, tar in (("file", str(tmp_path / "a b.tar")), ("command", f"pipe:cat '{tmp_path}/a b.tar'")):
        options = Convert(
            tars=(tar,),
            out=tmp_path / out,
            tokenizer=tmp_path / "tokenizer.json",
            processes=1,
            allow_commands=True,
            json=True,
        )
        run_convert(options)
        run_convert(options)  # a finished one is left as it is
        manifests.append(open_corpus(tmp_path / out).manifest)
    assert manifests[0].shards == manifests[1].shards


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("pipe:false", "the command of pipe:false ended with status 1"),
        ("pipe:no-such-command", "the command of pipe:no-such-command cannot be run: .*No such file"),
        ("pipe:cat 'a.tar", "cannot be run: No closing quotation"),
        ("pipe:", "the command of pipe: cannot be run"),
        ("pipe:echo not a tar; touch forged", "cannot be read at the sample 'its beginning'"),
    ],
)
def test_a_command_that_fails_leaves_no_corpus(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options = Convert(
        tars=(command,), out=tmp_path / "out", tokenizer=tmp_path / "tokenizer.json", processes=1, allow_commands=True
    )
    with pytest.raises(UserError, match=message):
        run_convert(options)
    assert not (tmp_path / "out/manifest.json").exists()
    assert not (tmp_path / "forged").exists()  # no shell was asked
