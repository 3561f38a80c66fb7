"""A run whose corpora lie in an S3 bucket is the run whose corpora lie in folders."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megagpt.commands.data import Which, run_which
from megagpt.commands.train import prepare
from megagpt.config import Data, Report, Run
from megagpt.data.corpus import open_corpus
from megagpt.parallel import ranks
from tests.data.stores import KEY, SECRET, s3_server, upload, use_server
from tests.test_train import fit, kill_at, losses, records, run_of


def test_a_run_from_a_bucket_has_the_losses_of_a_local_one_also_when_killed_and_keeps_no_secret(
    corpora: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = run_of(corpora)
    assert fit(local, tmp_path / "local") == 0
    with s3_server() as port:
        for name, folder in corpora.items():
            upload(port, folder, "bucket", name)
        use_server(monkeypatch, f"http://127.0.0.1:{port}")
        mixture = {"s3://bucket/prose": 1, "s3://bucket/code": 2}
        remote = dataclasses.replace(local, data=Data(mixture=mixture, cache=str(tmp_path / "cache"), remote="blocks"))
        out = tmp_path / "remote"
        assert fit(remote, out, before=kill_at(5, rank=1)) != 0
        assert fit(remote, out) == 0
        prepare(remote, out, write=True)
    assert losses(out) == losses(tmp_path / "local")
    for path in (path for folder in (out, tmp_path / "cache") for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert KEY.encode() not in content, path
        assert SECRET.encode() not in content, path


def broken_on(rank: int, fingerprint: str, then: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """Have this rank alone find every block of one shard of a corpus broken."""

    def plant() -> None:
        from megagpt.data.cache import Corrupt
        from megagpt.data.fetch import Remote

        read = Remote.block

        def refuse(self: Remote, entry, *place):  # type: ignore[no-untyped-def]
            if self.fingerprint == fingerprint and entry.name == "train-00001-00":
                self.cache.faults += 1
                raise Corrupt("planted", Path("planted"))
            return read(self, entry, *place)

        if ranks.rank() == rank:
            Remote.block = refuse  # type: ignore[method-assign]
        then()

    return plant


def which(out: Path, step: int, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    run_which(Which(run=out, step=step, json=True))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def from_files(corpora: dict[str, Path], tmp_path: Path, bad_block: str) -> Run:
    mixture = {f"file://{corpora['prose']}": 1, f"file://{corpora['code']}": 2}
    data = Data(mixture=mixture, cache=str(tmp_path / "cache"), remote="blocks", bad_block=bad_block)  # type: ignore[arg-type]
    return run_of(corpora, data=data, report=Report(every=2))


def test_a_block_that_one_rank_finds_broken_is_replaced_on_all_and_again_after_a_kill(
    corpora: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, code = from_files(corpora, tmp_path, "substitute"), open_corpus(corpora["code"])
    out, again = tmp_path / "out", tmp_path / "again"
    out.mkdir()
    prepare(run, out, write=True)
    assert fit(run, out, before=kill_at(5, rank=0)) != 0
    shutil.copytree(out, again)
    assert fit(run, out, before=broken_on(1, code.fingerprint)) == 0
    assert fit(run, again, before=broken_on(1, code.fingerprint, kill_at(5, rank=0))) != 0
    assert fit(run, again) == 0  # the block is whole again, and is not gone back to
    assert losses(out) == losses(again)
    (event,) = (record for record in records(out, "events") if record["event"] == "bad_block")
    shard = code.manifest.shards_of("train")[0].tokens
    assert (event["step"], event["rank"], event["shard"], event["block"]) == (4, 1, "train-00001-00", 0)
    assert event["tokens"] == [shard, shard + code.manifest.shards_of("train")[1].tokens]
    (told,) = (record for record in records(out, "events") if record["event"] == "store")
    assert (told["step"], told["corpus"]) == (4, f"file://{code.location}")
    assert told["cause"].startswith("downloads that failed their check: ")
    rows = [row for step in range(1, 9) for row in which(out, step, capsys)]
    replaced = [row["position"] for row in rows if "in_place_of" in row]
    assert replaced[0] == event["positions"][0] == min(event["positions"])
    assert set(event["positions"]) <= set(replaced)
    assert min(replaced) >= 12  # those of three steps had been read before


def test_a_block_that_is_broken_stops_the_run_unless_it_is_told_otherwise(
    corpora: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, code = from_files(corpora, tmp_path, "stop"), open_corpus(corpora["code"])
    assert fit(run, tmp_path / "out", before=broken_on(0, code.fingerprint)) == 2
    assert "block 0 of file://" in capfd.readouterr().err
