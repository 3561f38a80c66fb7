"""Peers of the loader, in an environment of their own: `python _data_peers.py FOLDER`, driven by benchmarks/data.py.

FOLDER holds flat.bin (uint16 tokens), lengths.npy (of the documents) and blocks/ (a corpus of ours). Each line on
stdin, `NAME SECONDS`, is answered by a line on stdout: million tokens a second of that reader, or what went wrong.
"""

from __future__ import annotations

import io
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import numpy as np

CONTEXT = 2048
SAMPLE = CONTEXT + 1


def documents(folder: Path) -> Iterator[np.ndarray]:
    tokens, stop = np.fromfile(folder / "flat.bin", dtype=np.uint16), 0
    for length in np.load(folder / "lengths.npy").tolist():
        start, stop = stop, stop + length
        yield tokens[start:stop]


def packed(arrays: Iterator[np.ndarray]) -> Iterator[int]:
    """Rows of SAMPLE tokens, eight a batch of int64, out of documents or blocks end to end."""
    held: list[np.ndarray] = []
    size = 0
    for array in arrays:
        held.append(array)
        size += len(array)
        if size >= 8 * SAMPLE:
            joined = np.concatenate(held)
            count = len(joined) // (8 * SAMPLE)
            for number in range(count):
                part = joined[number * 8 * SAMPLE : (number + 1) * 8 * SAMPLE]
                part.reshape(8, SAMPLE).astype(np.int64)
                yield 8 * CONTEXT
            held = [joined[count * 8 * SAMPLE :]]
            size = len(held[0])


def mosaic(folder: Path) -> Iterator[int]:
    from streaming import MDSWriter, StreamingDataset  # pyright: ignore[reportMissingImports]

    out = folder / "mds"
    if not out.exists():
        tokens = np.fromfile(folder / "flat.bin", dtype=np.uint16)
        with MDSWriter(out=str(out), columns={"tokens": f"ndarray:uint16:{SAMPLE}"}) as writer:
            for start in range(0, len(tokens) - SAMPLE, CONTEXT):
                writer.write({"tokens": tokens[start : start + SAMPLE]})
    dataset = StreamingDataset(local=str(out), shuffle=True, batch_size=8)
    while True:
        for _ in dataset:
            yield CONTEXT


def litdata(folder: Path) -> Iterator[int]:
    from litdata import StreamingDataset, TokensLoader  # pyright: ignore[reportMissingImports]
    from litdata.streaming.writer import BinaryWriter  # pyright: ignore[reportMissingImports]

    out = folder / "litdata"
    if not out.exists():
        import torch

        out.mkdir()
        writer = BinaryWriter(str(out), chunk_bytes="64MB", item_loader=TokensLoader())
        for number, document in enumerate(documents(folder)):
            writer.add_item(number, torch.from_numpy(document))
        writer.done()
        writer.merge()
    dataset = StreamingDataset(str(out), item_loader=TokensLoader(block_size=SAMPLE), shuffle=True)
    while True:
        for _ in dataset:
            yield CONTEXT


def webdataset_documents(folder: Path) -> Iterator[int]:
    from webdataset.compat import WebDataset

    path = folder / "documents.tar"
    if not path.exists():
        with tarfile.open(path, "w") as archive:
            for number, document in enumerate(documents(folder)):
                content = document.tobytes()
                member = tarfile.TarInfo(f"{number:09d}.bin")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    while True:
        dataset = WebDataset(str(path), shardshuffle=False).shuffle(2000)
        yield from packed(np.frombuffer(sample["bin"], dtype=np.uint16) for sample in cast("Iterator[dict]", dataset))


def webdataset_blocks(folder: Path) -> Iterator[int]:
    from webdataset.compat import WebDataset

    tars = sorted(str(path) for path in (folder / "blocks").glob("train-*.tar"))
    while True:
        dataset = WebDataset(tars, shardshuffle=len(tars)).shuffle(100).decode()
        yield from packed(sample["tokens.npy"] for sample in cast("Iterator[dict]", dataset))


READERS: dict[str, Callable[[Path], Iterator[int]]] = {
    "mosaicml-streaming": mosaic,
    "litdata": litdata,
    "webdataset-documents": webdataset_documents,
    "webdataset-blocks": webdataset_blocks,
}


def declare_image_operators() -> object:
    """MosaicML Streaming imports torchvision, which a torch without CUDA leaves without operators; text needs none.

    The library that declares them, which must be kept.
    """
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    return library


def main() -> None:
    _kept = declare_image_operators()
    folder, open_readers = Path(sys.argv[1]), {}
    answers, sys.stdout = sys.stdout, sys.stderr  # what the peers print themselves is no answer
    for line in sys.stdin:
        name, seconds = line.split()
        try:
            reader = open_readers.get(name) or open_readers.setdefault(name, READERS[name](folder))
            next(reader)
            done, began = 0, time.perf_counter()
            while time.perf_counter() - began < float(seconds):
                done += next(reader)
            answer = f"{done / (time.perf_counter() - began) / 1e6:.3f}"
        except Exception as error:  # a peer that fails is reported, and the others go on
            answer = f"failed: {error!r}".replace("\n", " ")
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    main()
