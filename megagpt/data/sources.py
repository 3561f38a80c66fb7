"""Raw documents: where they are, and how to read them as a stream of texts.

| file                                                  | documents                                   |
|-------------------------------------------------------|---------------------------------------------|
| .parquet                                              | one a row: a string column                  |
| .jsonl .ndjson, .json.gz, .json.zst (and .json named) | one a line: a string under a key            |
| .tar, where it is named                               | one a sample (members.py)                   |
| .txt .md .rst .py, and any other file that is named   | the whole file                              |
Each but Parquet also as .gz or .zst. With leave to run commands, `pipe:COMMAND` is a tar that a command writes. A
folder is walked in sorted order, hidden names left out, and yields the kinds above; globs and single files are taken
whatever their name. The input is cut into slices that can be read independently: some row groups, a range of bytes of
an uncompressed JSONL file, or a whole file.
"""

from __future__ import annotations

import glob
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megagpt.data.members import PIPE, command_output, read_members
from megagpt.errors import UserError

Kind = Literal["parquet", "jsonl", "text", "tar", "command"]
_COMPRESSED = (".gz", ".zst")
_JSONL = (".jsonl", ".ndjson")
_TEXT = (".txt", ".md", ".rst", ".py")
_BOM = b"\xef\xbb\xbf"
_EXPANSION = 4  # bytes of text that a byte of .gz or .zst holds, roughly: only for progress and balance
_COMMAND_BYTES = 1 << 26  # of text that a command is taken to write: nothing tells
_PARQUET_ROWS = 1024
_BUFFER = 1 << 20  # three times faster than Python's own 8 KiB for lines of that size
_INPUTS = "Name files, folders, or globs in quotes, such as 'corpus/**/*.jsonl.zst'."


@dataclass(frozen=True)
class Slice:
    """A part of one file. `start` and `stop` count row groups (Parquet) or bytes; `text_bytes` is an estimate."""

    path: str
    kind: Kind
    start: int
    stop: int
    text_bytes: int


class Document(NamedTuple):
    """One text, its UTF-8 bytes, its row or line in the file, from 0, and the further columns that were asked for.

    Of a document that is ids already, `utf8` are their bytes as little-endian uint32: enough to tell it from others.
    """

    text: str
    utf8: bytes
    row: int
    record: Mapping[str, Any]
    ids: np.ndarray | None = None


def find_files(inputs: Sequence[str], *, commands: bool = False) -> list[str]:
    """Files that `inputs` (files, folders, globs) name, in order, each once. Raises UserError if one has none.

    Where `commands` are allowed, a name such as `pipe:cat shard.tar` is taken as it is.
    """
    if not inputs:
        raise UserError("no input is named.", _INPUTS)
    found: dict[str, None] = {}
    for name in inputs:
        if Path(name).is_dir():
            matches = list(_walk(name))
            rule = f"the folder {name} holds no .parquet, .jsonl, .txt, .md, .rst or .py file."
        elif Path(name).is_file():
            matches, rule = [name], ""
        elif is_command(name):
            if not commands:
                raise UserError(
                    f"{name} is a command, and commands are not run.",
                    "If it comes from nobody but you, 'megagpt data convert --allow-commands' runs it.",
                )
            matches, rule = [name], ""
        else:
            found_names = glob.glob(name, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
            matches = sorted(path for path in found_names if Path(path).is_file())
            rule = f"no file matches '{name}'."
        if not matches:
            raise UserError(rule, _INPUTS)
        found.update(dict.fromkeys(matches))
    return list(found)


def is_command(path: str) -> bool:
    """Whether the input is what a command writes; a file of such a name is a file."""
    return path.startswith(PIPE) and not Path(path).exists()


def _walk(folder: str) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            stem, compressed = _uncompressed(name)
            known = stem.endswith((".parquet", *_JSONL, *_TEXT)) or (compressed and stem.endswith(".json"))
            if known and not name.startswith("."):
                yield str(Path(parent) / name)


def _uncompressed(name: str) -> tuple[str, bool]:
    lower = name.lower()
    for suffix in _COMPRESSED:
        if lower.endswith(suffix):
            return lower.removesuffix(suffix), True
    return lower, False


def cut(files: Sequence[str], *, column: str, tasks: int, largest: int) -> list[list[Slice]]:
    """Tasks of consecutive slices: about `tasks` of equal size, more where one would exceed `largest` bytes of text.

    A function of the files and arguments alone. Raises UserError if a Parquet file lacks `column` or is broken.
    """
    total = sum(_estimated_bytes(path) for path in files)
    size = max(1, min(largest, -(-total // tasks)))
    cuts: list[list[Slice]] = []
    held = size
    for piece in (piece for path in files for piece in _slices(path, column=column, size=size)):
        if held >= size:
            cuts.append([])
            held = 0
        cuts[-1].append(piece)
        held += piece.text_bytes
    return cuts


def _estimated_bytes(path: str) -> int:
    if is_command(path):
        return _COMMAND_BYTES
    return Path(path).stat().st_size * (_EXPANSION if _uncompressed(path)[1] else 1)


def _slices(path: str, *, column: str, size: int) -> Iterator[Slice]:
    stem, compressed = _uncompressed(path)
    if is_command(path):
        yield Slice(path, "command", 0, 0, _COMMAND_BYTES)
        return
    if stem.endswith(".parquet"):
        yield from _parquet_slices(path, column=column, size=size)
        return
    length = Path(path).stat().st_size
    kind: Kind = "tar" if stem.endswith(".tar") else "jsonl" if stem.endswith((*_JSONL, ".json")) else "text"
    if kind == "tar" and compressed:
        raise UserError(f"{path} is a compressed tar.", "Decompress it first.")
    if kind == "jsonl" and not compressed:
        for start in range(0, length, size):
            stop = min(start + size, length)
            yield Slice(path, kind, start, stop, stop - start)
    else:
        yield Slice(path, kind, 0, length, _estimated_bytes(path))


def _parquet_slices(path: str, *, column: str, size: int) -> Iterator[Slice]:
    with _open_parquet(path) as file:
        names = [field.name for field in file.schema_arrow]
        if column not in names:
            raise UserError(
                f"{path} has no column '{column}'; it has {', '.join(names)}.",
                "Name the column of texts with --column.",
            )
        kind = file.schema_arrow.field(column).type
        if not _is_text(kind.value_type if pa.types.is_dictionary(kind) else kind):
            raise UserError(f"{path}: column '{column}' is of type {kind}, not text.")
        metadata = file.metadata
        leaf = next(i for i in range(len(file.schema)) if file.schema.column(i).path == column)
        start = held = 0
        for group in range(metadata.num_row_groups):
            held += metadata.row_group(group).column(leaf).total_uncompressed_size
            if held >= size or group + 1 == metadata.num_row_groups:
                yield Slice(path, "parquet", start, group + 1, held)
                start, held = group + 1, 0


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _open_parquet(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)  # where there are any
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file: {error}.") from error


def read(piece: Slice, column: str, further: Sequence[str] = ()) -> Iterator[Document]:
    """The documents of a slice, in order; a missing text (null) is an empty one. `further` columns come along.

    Raises UserError, with file and line or row, for what is not UTF-8, not JSON, not a text, or cannot be read.
    """
    tar = {"tar": _read_tar, "command": _read_tar}
    readers = {"parquet": _read_parquet, "jsonl": _read_jsonl, "text": _read_text, **tar}
    try:
        yield from readers[piece.kind](piece, column, further)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{piece.path} cannot be read: {error}.") from error


def texts(slices: Iterable[Slice], column: str) -> Iterator[str]:
    """The texts of several slices, in order: what train_tokenizer takes."""
    for piece in slices:
        for document in read(piece, column):
            yield document.text


def _read_parquet(piece: Slice, column: str, further: Sequence[str]) -> Iterator[Document]:
    with _open_parquet(piece.path) as file:
        missing = [name for name in further if name not in file.schema_arrow.names]
        if missing:
            raise UserError(f"{piece.path} has no column '{missing[0]}', which --where names.")
        row = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        groups = range(piece.start, piece.stop)
        batches = file.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=[column, *further], use_threads=False)
        try:
            for batch in batches:
                records = batch.select(further).to_pylist() if further else [{}] * len(batch)
                for scalar, record in zip(batch.column(column), records, strict=True):
                    try:
                        text = cast(str, scalar.as_py() or "")
                    except UnicodeDecodeError as error:
                        raise UserError(f"{piece.path}: row {row:,} is not UTF-8: {error.reason}.") from error
                    yield Document(text, text.encode(), row, record)
                    row += 1
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{piece.path} cannot be read from row {row:,} on: {error}.") from error


def _read_text(piece: Slice, _column: str, further: Sequence[str]) -> Iterator[Document]:
    if further:
        raise UserError(f"{piece.path} is a text file and has no column '{further[0]}', which --where names.")
    with _open_stream(piece.path) as file:
        content = file.read().removeprefix(_BOM)
    try:
        yield Document(content.decode(), content, 0, {})
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{piece.path}:{line} is not UTF-8: {error.reason}.") from error


def _read_tar(piece: Slice, column: str, further: Sequence[str]) -> Iterator[Document]:
    with command_output(piece.path) if piece.kind == "command" else Path(piece.path).open("rb") as stream:
        for member in read_members(stream, piece.path, column, further):
            content = member.text.encode() if member.ids is None else member.ids.astype("<u4").tobytes()
            yield Document(member.text, content, member.number, member.record, member.ids)


def _open_stream(path: str) -> BinaryIO:
    """A file's bytes, decompressed as its suffix says."""
    if not _uncompressed(path)[1]:
        return Path(path).open("rb", buffering=_BUFFER)
    compression = "gzip" if path.lower().endswith(".gz") else "zstd"
    return io.BufferedReader(cast(io.RawIOBase, pa.input_stream(path, compression=compression)))


def _read_jsonl(piece: Slice, column: str, further: Sequence[str]) -> Iterator[Document]:
    """Documents of the lines that begin inside the slice; a compressed file is one slice.

    Their rows count from the slice's first line: `line_of` counts those before it.
    """
    compressed = _uncompressed(piece.path)[1]
    with _open_stream(piece.path) as file:
        position = 0
        if piece.start > 0:
            file.seek(piece.start - 1)
            position = piece.start - 1 + len(file.readline())
        read = 0
        try:
            for number, line in enumerate(file):
                if position >= piece.stop and not compressed:
                    return
                try:
                    document = _parse(line, column, further, number)
                except ValueError as error:
                    number = number if compressed else _lines_before(piece.path, position)
                    raise UserError(f"{piece.path}:{number + 1} {error}.") from error
                if document is not None:
                    yield document
                position += len(line)
                read = number + 1
        except (pa.ArrowException, OSError) as error:
            where = f" after line {read:,}" if compressed else ""
            raise UserError(f"{piece.path} cannot be read{where}: {error}.") from error


def line_of(piece: Slice, row: int) -> int:
    """The line or row in the whole file, from 0, of a document's `row`."""
    within = piece.kind == "jsonl" and piece.start > 0
    return row + (_lines_before(piece.path, _first_line(piece)) if within else 0)


def _first_line(piece: Slice) -> int:
    with Path(piece.path).open("rb") as file:
        file.seek(piece.start - 1)
        return piece.start - 1 + len(file.readline())


def _parse(line: bytes, column: str, further: Sequence[str], row: int) -> Document | None:
    """The text of one line, None if the line is blank. Raises ValueError, worded to follow the line's number."""
    if line.isspace():
        return None
    try:
        record: Any = json.loads(line.removeprefix(_BOM).decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8: {error.reason} at byte {error.start + 1} of the line") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError(f"is not a JSON object with a key '{column}'")
    if column not in record:
        raise ValueError(f"has no key '{column}'; it has {', '.join(record) or 'none'}")
    text = "" if record[column] is None else record[column]
    if not isinstance(text, str):
        raise ValueError(f"has a {type(text).__name__} under '{column}' where a text belongs")
    try:
        return Document(text, text.encode(), row, {name: record.get(name) for name in further})
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half of a surrogate pair under '{column}', which is no character") from error


def _lines_before(path: str, position: int) -> int:
    """Newlines in the first `position` bytes: read again only to word an error."""
    count = 0
    with Path(path).open("rb") as file:
        while position > 0 and (chunk := file.read(min(position, 1 << 20))):
            count += chunk.count(b"\n")
            position -= len(chunk)
    return count
