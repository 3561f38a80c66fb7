from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data import sources
from megagpt.data.sources import Slice
from megagpt.errors import UserError

TEXTS = ["one", "zwei\nzeilen", "", "vier é \U0001f600"]


def jsonl(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": n, "text": text}).encode() + b"\n" for n, text in enumerate(texts))


def zstd(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)


def write(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def read_all(*inputs: str, column: str = "text", tasks: int = 1) -> list[str]:
    cuts = sources.cut(sources.find_files(inputs), column=column, tasks=tasks, largest=1 << 30)
    return [text for task in cuts for text in sources.texts(task, column)]


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("a.jsonl", lambda content: content),
        ("a.ndjson", lambda content: content),
        ("a.json", lambda content: content),
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.gz", lambda content: gzip.compress(content[:20]) + gzip.compress(content[20:])),
        ("a.json.zst", zstd),
        ("a.JSONL.ZST", lambda content: zstd(content[:20]) + zstd(content[20:])),
        ("a.jsonl", lambda content: b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n\n")),
    ],
)
def test_jsonl_is_read_plain_and_compressed(tmp_path: Path, name: str, packed) -> None:
    assert read_all(write(tmp_path / name, packed(jsonl(TEXTS)))) == TEXTS


@pytest.mark.parametrize(
    ("name", "packed"), [("a.txt", bytes), ("a.md.gz", gzip.compress), ("a.py.zst", zstd), ("a.cc", bytes)]
)
def test_any_other_file_is_one_document(tmp_path: Path, name: str, packed) -> None:
    assert read_all(write(tmp_path / name, packed("ein\r\nText é".encode()))) == ["ein\r\nText é"]


def write_parquet(path: Path, texts: pa.Array, row_group_size: int = 2) -> str:
    pq.write_table(pa.table({"id": list(range(len(texts))), "body": texts}), path, row_group_size=row_group_size)
    return str(path)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_is_read_by_row_groups_and_null_is_an_empty_text(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [*TEXTS, None, "last"]
    path = write_parquet(tmp_path / "a.parquet", pa.array(texts).cast(kind))
    whole = [text or "" for text in texts]
    assert read_all(path, column="body") == whole
    assert read_all(path, column="body", tasks=1000) == whole
    cuts = sources.cut([path], column="body", tasks=1000, largest=1 << 30)
    assert [(piece.start, piece.stop) for task in cuts for piece in task] == [(0, 1), (1, 2), (2, 3)]


def test_a_parquet_file_that_is_broken_inside_a_row_group_is_named_with_the_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = pa.table({"body": [hashlib.sha256(bytes([number])).hexdigest() for number in range(40)]})
    pq.write_table(texts, path, row_group_size=10, compression="zstd", use_dictionary=False, write_page_checksum=True)
    start = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start + 300] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet cannot be read from row (0|10|20) on: "):
        read_all(str(path), column="body")


def test_a_folder_is_walked_in_order_without_hidden_and_unknown_files(tmp_path: Path) -> None:
    for name in ("b/x.py", "a/y.txt.gz", "a/x.md", "c.rst", ".git/z.txt", "a/.z.txt", "a/data.json", "a/x.png"):
        content = gzip.compress(name.encode()) if name.endswith("gz") else name.encode()
        write(tmp_path / name, content)
    assert read_all(str(tmp_path)) == ["c.rst", "a/x.md", "a/y.txt.gz", "b/x.py"]
    assert read_all(str(tmp_path / "**/*.p*")) == ["a/x.png", "b/x.py"]
    assert read_all(str(tmp_path / "c.rst"), str(tmp_path / "*")) == ["c.rst"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=12), st.integers(1, 60), st.booleans())
def test_ranges_of_bytes_give_every_line_once(tmp_path_factory, texts: list[str], size: int, ends: bool) -> None:
    content = jsonl(texts)
    content = content if ends else content.removesuffix(b"\n")
    path = write(tmp_path_factory.mktemp("jsonl") / "a.jsonl", content)
    pieces = [
        Slice(path, "jsonl", start, min(start + size, len(content)), size) for start in range(0, len(content), size)
    ]
    assert list(sources.texts(pieces, "text")) == texts


def test_tasks_are_balanced_and_depend_on_sizes_alone(tmp_path: Path) -> None:
    for number in range(40):
        write(tmp_path / f"{number:02d}.txt", b"x" * 100)
    write(tmp_path / "99.jsonl", jsonl(["y" * 100] * 30))
    files = sources.find_files([str(tmp_path)])
    cuts = sources.cut(files, column="text", tasks=8, largest=1 << 30)
    sizes = [sum(piece.text_bytes for piece in task) for task in cuts]
    assert len(cuts) == 8
    assert max(sizes) < 1.5 * sum(sizes) / 8
    assert cuts == sources.cut(files, column="text", tasks=8, largest=1 << 30)
    assert (
        max(sum(piece.text_bytes for piece in t) for t in sources.cut(files, column="text", tasks=1, largest=500))
        < 700
    )


LINE_1 = b'{"text": "fine"}\n\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LINE_1 + b'{"text": "br', r"a\.jsonl:3 is not JSON: .* at column 10"),
        ("a.jsonl.gz", gzip.compress(LINE_1 + b"[]"), r"a\.jsonl\.gz:3 is not a JSON object with a key 'text'"),
        (
            "a.jsonl",
            LINE_1 + b'{"text": "\xff"}',
            r"a\.jsonl:3 is not UTF-8: invalid start byte at byte 11 of the line",
        ),
        ("a.jsonl", LINE_1 + b'{"txt": "a", "b": 1}', r"a\.jsonl:3 has no key 'text'; it has txt, b"),
        ("a.jsonl", LINE_1 + b'{"text": 5}', r"a\.jsonl:3 has a int under 'text' where a text belongs"),
        ("a.jsonl", LINE_1 + b'{"text": "\\ud800"}', r"a\.jsonl:3 holds half of a surrogate pair"),
        ("a.jsonl", LINE_1 + b"[" * 100_000, r"a\.jsonl:3 is "),
        ("a.txt", b"eins\nzw\xe9i\n", r"a\.txt:2 is not UTF-8"),
        ("a.jsonl.gz", gzip.compress(LINE_1 * 1000)[:-20], r"a\.jsonl\.gz cannot be read after line \d{3}: Truncated"),
        ("a.txt.zst", b"no zstd", r"a\.txt\.zst cannot be read"),
        ("a.parquet", b"no parquet", r"a\.parquet is not a Parquet file"),
    ],
)
def test_broken_input_is_named_by_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        read_all(path)


def test_a_broken_line_is_named_by_its_number_in_the_file_from_any_slice(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(["x" * 50] * 20) + b"broken\n")
    with pytest.raises(UserError, match=r"a\.jsonl:21 is not JSON"):
        read_all(path, tasks=10)


def test_a_missing_or_wrong_parquet_column_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", pa.array(TEXTS))
    with pytest.raises(UserError, match=r"a\.parquet has no column 'text'; it has id, body"):
        sources.cut([path], column="text", tasks=1, largest=100)
    with pytest.raises(UserError, match="column 'id' is of type int64, not text"):
        sources.cut([path], column="id", tasks=1, largest=100)


def test_a_parquet_text_that_is_not_utf8_is_named_by_row(tmp_path: Path) -> None:
    broken = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"ab\xff"))
    path = write_parquet(tmp_path / "a.parquet", broken)
    with pytest.raises(UserError, match=r"a\.parquet: row 2 is not UTF-8"):
        read_all(path, column="body")


def test_input_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file matches '.*\*\.jsonl'"):
        sources.find_files([str(tmp_path / "*.jsonl")])
    with pytest.raises(UserError, match=r"the folder .* holds no"):
        sources.find_files([str(tmp_path)])
    with pytest.raises(UserError, match="no input is named"):
        sources.find_files([])
