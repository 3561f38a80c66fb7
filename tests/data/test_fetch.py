from __future__ import annotations

import dataclasses
import errno
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import trustme

from megagpt.config import Data
from megagpt.data import order, pack
from megagpt.data.corpus import Corpus, open_corpus, verify_remote
from megagpt.data.loader import train_steps
from megagpt.data.store import Patience, Store, Unreachable
from megagpt.errors import UserError
from megagpt.heal.stores import StoreTimes
from tests.data.conftest import MakeCorpus, random_documents
from tests.data.stores import Faults, allow_anyone, gs_server, proxy, s3_server, upload, use_server

T = 16
MODES = ("shards", "blocks")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def local(make_corpus: MakeCorpus, port: int) -> Corpus:
    corpus = make_corpus("corpus", random_documents(5, 300, 60), random_documents(6, 12, 30), a_shard=30)
    upload(port, corpus.folder, "bucket", "corpus")
    return corpus


def settings(tmp_path: Path, mode: str = "blocks", **others: object) -> Data:
    return dataclasses.replace(Data(cache=str(tmp_path / "cache"), remote=mode, patience=20.0), **others)  # type: ignore[arg-type]


def read(corpus: Corpus, steps: int, packing: order.Packing = "chunk") -> list[torch.Tensor]:
    """What a rank's micro-batches hold."""
    source = pack.source(corpus, context=T, packing=packing)
    cursor = order.start(seed=3, context=T, packing=packing, weights={source: 1})
    stream = train_steps(
        [corpus],
        cursor,
        global_batch=lambda _consumed: 8,
        micro_batch=4,
        data_rank=0,
        data_ranks=1,
        document_mask=True,
        pin=False,
    )
    found = []
    for batches in islice(stream, steps):
        for batch in batches:
            assert batch.cu_seqlens_S is not None
            found.append(torch.cat([batch.tokens_BT.flatten(), batch.targets_BT.flatten(), batch.cu_seqlens_S]))
    return found


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("packing", ["chunk", "best_fit"])
def test_a_corpus_in_a_store_gives_the_batches_of_the_same_corpus_in_a_folder(
    local: Corpus, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, packing: order.Packing
) -> None:
    use_server(monkeypatch, f"http://127.0.0.1:{port}")
    remote = open_corpus("s3://bucket/corpus", settings(tmp_path, mode))
    assert remote.fingerprint == local.fingerprint
    assert remote.name == "corpus"
    assert same(read(remote, 100, packing), read(local, 100, packing))


def test_a_corpus_in_google_cloud_storage_gives_the_batches_of_the_same_corpus_in_a_folder(
    make_corpus: MakeCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = make_corpus("corpus", random_documents(5, 300, 60), random_documents(6, 12, 30), a_shard=30)
    with gs_server(monkeypatch, local.folder, "bucket", "corpus"):
        for mode in MODES:
            remote = open_corpus("gs://bucket/corpus", settings(tmp_path / mode, mode))
            assert same(read(remote, 100), read(local, 100))
        with pytest.raises(UserError, match=r"there is no gs://bucket/elsewhere/manifest\.json"):
            open_corpus("gs://bucket/elsewhere", settings(tmp_path))


@pytest.mark.parametrize("mode", MODES)
def test_a_corpus_behind_plain_http_is_read_by_ranges_whatever_the_network_does(
    local: Corpus, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr("megagpt.data.corpus.Patience", partial(Patience, first_pause=0.002, longest_pause=0.02))
    allow_anyone(port, "bucket")
    faults = Faults(share=0.8, most=60)
    with proxy(port, faults) as endpoint:
        remote = open_corpus(f"{endpoint}/bucket/corpus", settings(tmp_path, mode))
        assert same(read(remote, 100), read(local, 100))
        with pytest.raises(UserError, match=r"there is no http://.*/bucket/elsewhere/manifest\.json"):
            open_corpus(f"{endpoint}/bucket/elsewhere", settings(tmp_path))
    assert set(faults.injected) == {"truncate", "flip", "reset", "error"}


def test_a_corpus_behind_https_is_read_once_its_authority_is_trusted(
    local: Corpus, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_anyone(port, "bucket")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    with proxy(port, Faults(), authority=authority) as endpoint:
        with pytest.raises(
            UserError, match=r"the server of https://.*/manifest\.json is not trusted (?s:.*)SSL_CERT_FILE"
        ):
            open_corpus(f"{endpoint}/bucket/corpus", settings(tmp_path))
        use_server(monkeypatch, endpoint)
        with pytest.raises(
            UserError, match=r"the server of s3://.*/manifest\.json is not trusted (?s:.*)AWS_CA_BUNDLE"
        ):
            open_corpus("s3://bucket/corpus", settings(tmp_path))
        for name in ("AWS_CA_BUNDLE", "SSL_CERT_FILE"):
            monkeypatch.setenv(name, str(tmp_path / "authority.pem"))
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        assert same(read(open_corpus("s3://bucket/corpus", settings(tmp_path)), 20), read(local, 20))
        # The client of https looks for authorities when it is imported: in a process of its own.
        command = [sys.executable, "-m", "megagpt.cli", "data", "verify", f"{endpoint}/bucket/corpus"]
        assert subprocess.run(command, check=False).returncode == 0


def test_stores_in_trouble_are_told_of_once_and_others_never(local: Corpus, tmp_path: Path) -> None:
    remote = open_corpus(f"file://{local.folder}", settings(tmp_path))
    assert remote.remote is not None
    assert StoreTimes([local]).compare() == []
    times, traffic, cache = StoreTimes([local, remote]), remote.remote.store.traffic, remote.remote.cache
    traffic.reads, traffic.retries, traffic.hedged = traffic.reads + 400, 10, 10
    assert times.compare() == []  # an everyday network
    traffic.reads, traffic.retries, traffic.hedged, cache.faults = traffic.reads + 400, 21, 2021, 2
    (trouble,) = times.compare()
    words = (
        "downloads that failed their check: 2, 11 tries of 400 reads failed, 2,011 of 400 reads had no answer in 4 s"
    )
    assert (trouble.corpus, trouble.cause) == (f"file://{local.folder}", words)
    assert trouble.action == f"fetched again; what was broken lies in {tmp_path}/cache/files, as *.bad"
    assert times.compare() == []


@pytest.mark.parametrize(("mode", "wanted"), [("shards", 100), ("blocks", 900)])
def test_every_batch_is_the_same_whatever_the_network_does(
    local: Corpus, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, wanted: int
) -> None:
    monkeypatch.setattr("megagpt.data.corpus.Patience", partial(Patience, first_pause=0.002, longest_pause=0.02))
    expected = read(local, 100)
    faults = Faults(share=0.8, most=wanted)
    with proxy(port, faults) as endpoint:
        use_server(monkeypatch, endpoint)
        for number in range(20):
            remote = open_corpus("s3://bucket/corpus", settings(tmp_path / str(number), mode))
            assert same(read(remote, 100), expected)
            if sum(faults.injected.values()) == wanted:
                break
    assert sum(faults.injected.values()) == wanted
    assert min(faults.injected.values()) > wanted / 10
    assert set(faults.injected) == {"truncate", "flip", "reset", "error"}


@pytest.mark.parametrize("mode", MODES)
def test_a_block_that_is_broken_in_the_store_stops_the_run_by_its_name(
    local: Corpus, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    tar = local.folder / "train-00003-00.tar"
    content = bytearray(tar.read_bytes())
    content[1024 + 512 + 130] ^= 1
    tar.write_bytes(content)
    upload(port, local.folder, "bucket", "corpus")
    use_server(monkeypatch, f"http://127.0.0.1:{port}")
    remote = open_corpus("s3://bucket/corpus", settings(tmp_path, mode))
    assert remote.split("train").read(0, 100).tolist() == local.split("train").read(0, 100).tolist()
    start = sum(entry.tokens for entry in local.manifest.shards[:3])
    with pytest.raises(UserError, match=r"block 0 of s3://bucket/corpus/train-00003-00\.tar is broken in the store"):
        remote.split("train").read(start, start + 5)
    assert remote.split("train").read(start + 100, start + 300).any()
    assert verify_remote(remote) == ["s3://bucket/corpus/train-00003-00.tar does not have the sha256 of the manifest."]


def test_a_corpus_that_is_not_whole_or_not_for_us_is_refused_before_anything_is_read(
    local: Corpus, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_server(monkeypatch, f"http://127.0.0.1:{port}")
    with pytest.raises(UserError, match=r"there is no s3://bucket/elsewhere/manifest\.json"):
        open_corpus("s3://bucket/elsewhere", settings(tmp_path))
    (local.folder / "train-00002-00.tar").write_bytes(b"short")
    upload(port, local.folder, "bucket", "short")
    with pytest.raises(UserError, match=r"s3://bucket/short/train-00002-00\.tar has 5 bytes where the manifest says"):
        open_corpus("s3://bucket/short", settings(tmp_path))
    with pytest.raises(UserError, match=r"data\.cache_gib = 1e-06 does not hold 2 shards"):
        open_corpus("s3://bucket/corpus", settings(tmp_path, "shards", cache_gib=1e-6))


def test_a_store_that_does_not_answer_ends_the_run_within_the_patience_and_without_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("megagpt.data.corpus.Patience", partial(Patience, first_pause=0.01, longest_pause=0.05))
    with proxy(1, Faults(share=1.0, most=10**6, everything=True, kinds=("error",))) as endpoint:
        use_server(monkeypatch, endpoint)
        with pytest.raises(
            Unreachable, match=r"s3://bucket/corpus/manifest\.json could not be read in 1 s, \d+ tries"
        ):
            open_corpus("s3://bucket/corpus", settings(tmp_path, patience=1.0))
    assert "try 3 failed" in capsys.readouterr().err


def test_a_slow_answer_is_overtaken_by_a_second_request(
    local: Corpus, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with proxy(port, Faults(share=1.0, most=1, kinds=("stall",))) as endpoint:
        use_server(monkeypatch, endpoint)
        store = Store("s3://bucket/corpus", Patience(hedge=0.05))
        content = store.read_range("train-00000-00.tar", 5, 50)
        assert content == (local.folder / "train-00000-00.tar").read_bytes()[5:50]
        assert (store.traffic.hedged, store.traffic.retries) == (1, 0)


@pytest.mark.parametrize(
    "url", ["s3://key:secret@bucket/corpus", "https://token@host/corpus", "https://host/corpus?X-Amz-Signature=secret"]
)
def test_a_url_with_a_secret_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UserError, match="has a password, a key or a query in its URL") as caught:
        open_corpus(url)
    assert not {"secret", "token"} & set(str(caught.value).replace("@", " ").replace("=", " ").split())


def test_a_command_is_no_store() -> None:
    with pytest.raises(UserError, match="corpora are read from stores only"):
        open_corpus("pipe:cat /etc/passwd")


def test_any_file_system_of_fsspec_is_a_store(local: Corpus, tmp_path: Path) -> None:
    remote = open_corpus(f"file://{local.folder}", settings(tmp_path))
    assert same(read(remote, 5), read(local, 5))


def test_a_file_is_read_where_it_cannot_be_mapped(local: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read(local, 20)

    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(np, "memmap", refuse)
    assert same(read(open_corpus(local.folder), 20), expected)
