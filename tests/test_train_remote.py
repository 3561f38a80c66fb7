"""A run whose corpora lie in an S3 bucket is the run whose corpora lie in folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megagpt.commands.train import prepare
from megagpt.config import Data
from tests.data.stores import KEY, SECRET, s3_server, upload, use_server
from tests.test_train import fit, kill_at, losses, run_of


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
