"""Corpora made of given token documents, without tokenising anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megagpt.data.corpus import Corpus, open_corpus
from megagpt.data.manifest import Counts, Manifest, save_manifest
from megagpt.data.shards import open_shard
from megagpt.data.tokenizer import train_tokenizer

Documents = Sequence[np.ndarray]
MakeCorpus = Callable[..., Corpus]


def random_documents(seed: int, count: int, longest: int) -> list[np.ndarray]:
    """Documents of 2 to `longest` tokens, 0 (the end of text) the last of each and nowhere else."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest, count)
    return [np.append(generator.integers(1, 250, length), 0).astype(np.uint16) for length in lengths]


@pytest.fixture
def make_corpus(tmp_path: Path) -> MakeCorpus:
    """A function that writes a corpus of the given documents, `a_shard` of them a shard."""

    def make(
        name: str, train: Documents, heldout: Documents = (), *, a_shard: int = 7, block_tokens: int = 40
    ) -> Corpus:
        folder = tmp_path / name
        folder.mkdir()
        tokenizer = train_tokenizer([], 257)
        (folder / "tokenizer.json").write_text(tokenizer.definition, encoding="utf-8")
        entries, counts = [], {}
        for split, documents in (("train", train), ("heldout", heldout)):
            for first in range(0, len(documents), a_shard):
                shard_name = f"{split}-{first // a_shard:05d}-00"
                with open_shard(folder, shard_name, dtype=np.dtype("<u2"), block_tokens=block_tokens) as shard:
                    for document in documents[first : first + a_shard]:
                        shard.add(document)
                entries.append(shard.entry(folder, shard_name, split))
            tokens = sum(len(document) for document in documents)
            counts[split] = Counts(documents=len(documents), tokens=tokens)
        manifest = Manifest(
            tokenizer_sha256=tokenizer.sha256(),
            vocabulary=tokenizer.vocabulary,
            end_of_text=tokenizer.end_of_text,
            dtype="uint16",
            options={},
            source_files=1,
            empty_documents=0,
            counts=counts,
            shards=tuple(entries),
        )
        save_manifest(folder, manifest)
        return open_corpus(folder)

    return make


@pytest.fixture
def three_corpora(make_corpus: MakeCorpus) -> list[Corpus]:
    """Small ones, of several shards each."""
    heldout = random_documents(9, 12, 30)
    return [make_corpus(f"c{seed}", random_documents(seed, 30, 40), heldout, a_shard=11) for seed in range(3)]
