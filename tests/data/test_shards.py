from __future__ import annotations

import io
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from megagpt.data.shards import Shard, ShardEntry, open_shard, rebuilt_index
from megagpt.data.tables import read_table, sha256_of
from tests.data.conftest import random_documents

U2 = np.dtype("<u2")
DOCUMENTS = [*random_documents(seed=3, count=25, longest=30), np.arange(70, dtype=np.uint16)]
TOKENS = np.concatenate(DOCUMENTS)


def write(folder: Path, name: str = "train-00000-00", dtype: np.dtype = U2, block_tokens: int = 40) -> ShardEntry:
    with open_shard(folder, name, dtype=dtype, block_tokens=block_tokens) as shard:
        for document in DOCUMENTS:
            shard.add(document)
    return shard.entry(folder, name, "train")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file open
@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_stock_webdataset_reads_the_same_tokens(tmp_path: Path, dtype: str) -> None:
    entry = write(tmp_path, dtype=np.dtype(dtype))
    dataset = WebDataset(str(tmp_path / f"{entry.name}.tar"), shardshuffle=False)
    blocks: list[dict[str, Any]] = list(dataset.decode())  # type: ignore[call-overload]
    assert len(blocks) == entry.blocks
    assert [block["__key__"] for block in blocks] == [f"{number:09d}" for number in range(len(blocks))]
    assert blocks[0]["tokens.npy"].dtype == dtype
    np.testing.assert_array_equal(np.concatenate([block["tokens.npy"] for block in blocks]), TOKENS)
    lengths = np.concatenate([block["doclens.npy"] for block in blocks])
    assert lengths.tolist() == [len(document) for document in DOCUMENTS]


def test_the_tar_has_the_bytes_of_webdatasets_own_writer(tmp_path: Path) -> None:
    tar = tmp_path / f"{write(tmp_path).name}.tar"
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tar) as archive:
        for member in archive:
            key, _, suffix = member.name.partition(".")
            samples.setdefault(key, {})[suffix] = archive.extractfile(member).read()  # type: ignore[union-attr]
    theirs = io.BytesIO()
    with TarWriter(theirs, encoder=False, user="megagpt", group="megagpt", mtime=0) as writer:
        for key, members in samples.items():
            writer.write({"__key__": key, **members})
    assert tar.read_bytes() == theirs.getvalue()


def test_a_block_holds_whole_documents_and_a_longer_one_has_its_own(tmp_path: Path) -> None:
    entry = write(tmp_path)
    with tarfile.open(tmp_path / f"{entry.name}.tar") as archive:
        lengths = [
            np.load(io.BytesIO(archive.extractfile(member).read())).tolist()  # type: ignore[union-attr]
            for member in archive
            if member.name.endswith("doclens.npy")
        ]
    assert lengths[-1] == [70]
    assert all(sum(block) <= 40 for block in lengths[:-1])
    assert all(sum(block) + following[0] > 40 for block, following in pairwise(lengths))


def test_the_tar_is_plain_ustar_with_fixed_times_and_owners(tmp_path: Path) -> None:
    entry = write(tmp_path)
    with tarfile.open(tmp_path / f"{entry.name}.tar", "r:") as archive:
        for member in archive:
            assert (member.mtime, member.uname, member.uid, member.mode) == (0, "megagpt", 0, 0o444)
            assert member.offset_data % 512 == 0
    again = write(tmp_path, "other")
    assert (again.tar_sha256, again.index_sha256) == (entry.tar_sha256, entry.index_sha256)
    assert sha256_of((tmp_path / f"{entry.name}.tar").read_bytes()) == entry.tar_sha256


def test_the_index_points_at_the_bytes_that_its_documentation_says(tmp_path: Path) -> None:
    entry = write(tmp_path)
    content = (tmp_path / f"{entry.name}.tar").read_bytes()
    index, metadata = read_table(tmp_path / f"{entry.name}.index")
    assert metadata == {"format": "megagpt index 1", "dtype": "uint16"}
    starts = index["block_start"]
    for block, offset in enumerate(index["block_offset"].tolist()):
        count = int(starts[block + 1] - starts[block])
        assert offset % 64 == 0
        found = np.frombuffer(content, "<u2", count, offset)
        np.testing.assert_array_equal(found, TOKENS[starts[block] : starts[block + 1]])
    ends = np.cumsum([len(document) for document in DOCUMENTS])
    np.testing.assert_array_equal(index["document_end"], ends)
    np.testing.assert_array_equal(ends[index["block_document"][1:] - 1], starts[1:])


def test_a_lost_index_is_rebuilt_from_the_tar_byte_for_byte(tmp_path: Path) -> None:
    entry = write(tmp_path, dtype=np.dtype("<u4"))
    assert rebuilt_index(tmp_path / f"{entry.name}.tar") == (tmp_path / f"{entry.name}.index").read_bytes()


def test_no_index_is_made_of_a_tar_that_is_cut_or_of_another_kind(tmp_path: Path) -> None:
    entry = write(tmp_path)
    tar = tmp_path / f"{entry.name}.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(ValueError, match="is not a shard of whole blocks"):
        rebuilt_index(tar)
    with TarWriter(str(tmp_path / "other.tar")) as writer:
        writer.write({"__key__": "0", "txt": "text"})
    with pytest.raises(ValueError, match=r"member 0\.txt stands where a \.doclens\.npy belongs"):
        rebuilt_index(tmp_path / "other.tar")


def test_any_range_of_tokens_is_read_across_blocks(tmp_path: Path) -> None:
    shard = Shard(tmp_path, write(tmp_path), U2)
    for start in range(0, len(TOKENS), 7):
        for size in (1, 2, 39, 200):
            out = np.empty(min(size, len(TOKENS) - start), dtype=np.int64)
            shard.copy(start, out)
            np.testing.assert_array_equal(out, TOKENS[start : start + size])


def test_a_flipped_bit_is_found_in_its_block(tmp_path: Path) -> None:
    entry = write(tmp_path)
    assert list(Shard(tmp_path, entry, U2).bad_blocks()) == []
    index, _ = read_table(tmp_path / f"{entry.name}.index")
    tar = tmp_path / f"{entry.name}.tar"
    content = bytearray(tar.read_bytes())
    content[int(index["block_offset"][2]) + 5] ^= 16
    tar.write_bytes(content)
    assert list(Shard(tmp_path, entry, U2).bad_blocks()) == [2]


def test_a_shard_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> None:
        with open_shard(tmp_path, "train-00000-00", dtype=U2, block_tokens=40) as shard:
            shard.add(DOCUMENTS[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
