"""Documents of a tar in the webdataset world's way, one a sample: read with webdataset itself.

A sample's `npy` member holds the ids of a document, a `txt` member its text, a `json` member an object with the text
under the build's column; a sample with none of them (a picture, say) is passed over. Webdataset never sees a name: it
would run `pipe:rm x`. What a command writes is read only where the user allowed it (sources.py), and with no shell.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from megagpt.errors import UserError

PIPE = "pipe:"
_SECONDS_TO_END = 10.0  # of a command whose output has ended


class Member(NamedTuple):
    """One sample's document: a text, or ids."""

    text: str
    ids: np.ndarray | None
    number: int
    record: Mapping[str, Any]


@contextlib.contextmanager
def command_output(name: str) -> Iterator[BinaryIO]:
    """What the command after `pipe:` writes, its words split as a shell would and no shell asked.

    Raises UserError if it cannot be started, or if it failed.
    """
    try:
        words = shlex.split(name.removeprefix(PIPE))
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)  # noqa: S603 - asked for
    except (OSError, IndexError, ValueError) as error:
        raise UserError(f"the command of {name} cannot be run: {error}.", "Write pipe:COMMAND ARGUMENTS.") from error
    stream = cast(BinaryIO, process.stdout)
    try:
        yield stream
        while stream.read(1 << 20):
            pass  # a command that is not heard out would fail
    except UserError as error:  # of what it wrote; its own failure is the better cause
        stream.close()
        _check_ended(process, name, cause=error)
        raise
    else:
        _check_ended(process, name)
    finally:
        stream.close()
        process.kill()
        process.wait()


def _check_ended(process: subprocess.Popen[bytes], name: str, cause: UserError | None = None) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        status = process.wait(_SECONDS_TO_END)
        if status > 0 or (status and cause is None):  # below 0: perhaps of the pipe that was closed
            remedy = "See what it said above."
            raise UserError(f"the command of {name} ended with status {status}.", remedy) from cause


def read_members(stream: BinaryIO, path: str, column: str, further: Sequence[str]) -> Iterator[Member]:
    """The documents of a tar, in its order. Raises UserError, naming tar and sample, for what cannot be read."""
    samples = _samples(stream, path)
    key = "its beginning"
    number = 0
    while True:
        try:
            sample = next(samples, None)
            if sample is None:
                return
            key = sample["__key__"]
            member = _member(sample, column, further, number)
        except Exception as error:  # webdataset passes on whatever tar, file and member readers raise
            raise UserError(f"{path} cannot be read at the sample '{key}': {error}.") from error
        if member is not None:
            yield member
        number += 1


def _samples(stream: BinaryIO, path: str) -> Iterator[dict[str, Any]]:
    from webdataset.handlers import reraise_exception  # not above: webdataset imports torch, and a build needs none
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    files = ({**file, "__url__": path} for file in tar_file_iterator(cast(Any, stream), handler=reraise_exception))
    yield from group_by_keys(files, handler=reraise_exception)


def _member(sample: Mapping[str, Any], column: str, further: Sequence[str], number: int) -> Member | None:
    contents = {name.rpartition(".")[2]: content for name, content in sample.items() if not name.startswith("__")}
    record = json.loads(contents["json"]) if "json" in contents else {}
    found = {name: record.get(name) for name in further} if isinstance(record, dict) else {}
    if "npy" in contents:
        return Member("", _ids(np.load(io.BytesIO(contents["npy"]), allow_pickle=False)), number, found)
    if "txt" in contents:
        return Member(contents["txt"].decode(), None, number, found)
    if "json" not in contents:
        return None
    if not isinstance(record, dict) or not isinstance(record.get(column), str):
        raise ValueError(f"there is no text under '{column}'")
    return Member(record[column], None, number, found)


def _ids(array: np.ndarray) -> np.ndarray:
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"an array of {array.dtype} {array.shape} is not the ids of one document")
    return array
