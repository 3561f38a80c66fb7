"""Checkpoints on s3://, against a server on this machine: the same commits, faults and lineage as in a folder."""

from __future__ import annotations

import pytest

from megagpt.checkpoint import lineage
from megagpt.checkpoint.folders import Folder, folder_at
from megagpt.checkpoint.load import load_checked, newest_valid
from megagpt.errors import UserError
from tests.checkpoint.test_faults import holds
from tests.checkpoint.tiny import counting_bytes, equal, run_with_commits, state


@pytest.fixture(scope="module")
def bucket():
    """URL of an empty bucket."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem().mkdir("runs")
        yield "s3://runs"
    server.stop()


@pytest.fixture
def root(bucket: str, request: pytest.FixtureRequest) -> Folder:
    return run_with_commits(f"{bucket}/{request.node.name}", (10, 20, 30))


def test_commits_on_an_object_store_load_and_retention_deletes_the_old_ones(root):
    assert [commit.step for commit in lineage.commits(root)] == [30, 20, 10]
    manifest, faults = newest_valid(root)
    assert not faults
    assert holds(manifest, 30)
    lineage.retain(root, keep=1, always={10})
    assert [commit.step for commit in lineage.commits(root)] == [30, 10]


def test_damage_on_an_object_store_is_found_and_the_commit_before_used(root):
    folder = lineage.commit_folder(root, 2, 30)
    content = bytearray(folder.read("rank-00000.safetensors"))
    content[-1] ^= 1
    folder.write("rank-00000.safetensors", [bytes(content)])
    manifest, faults = newest_valid(root)
    assert "rank-00000.safetensors has changed" in faults[0]
    assert holds(manifest, 20)


def test_a_load_downloads_each_file_once(root):
    manifest, _ = newest_valid(root)
    assert manifest is not None
    found = state(0)
    with counting_bytes(root) as read:
        assert load_checked(manifest, found) is None
    assert equal(found, state(30))
    assert read == {part["file"]: part["bytes"] for part in manifest.header["files"]}


def test_of_two_attempts_on_an_object_store_one_gets_the_number(root):
    assert not (root / "gen-0001").create("start.json", b"mine")
    assert [lineage.begin(root, None), lineage.begin(root, None)] == [3, 4]


def test_an_upload_that_fails_leaves_nothing(root):
    def chunks():
        yield b"half"
        raise OSError("the source is gone")

    with pytest.raises(OSError, match="the source is gone"):
        (root / "x").write("file", chunks())
    assert (root / "x").names() == []


def test_a_store_that_cannot_be_reached_or_is_unknown_says_so(bucket):
    with pytest.raises(UserError, match="nowhere://x cannot be opened"):
        folder_at("nowhere://x")
    with pytest.raises(OSError):
        folder_at("s3://no-such-bucket/x").write("file", [b"content"])
