"""What is read in place of a block that is broken in its store."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from megagpt.data import order, pack
from megagpt.data.corpus import Corpus
from megagpt.data.order import Cursor, Packing
from megagpt.data.substitute import with_substitutes
from megagpt.errors import UserError
from tests.data.test_loader import PACKINGS, T, cursor_of, read


@pytest.mark.parametrize("packing", PACKINGS)
def test_no_token_of_a_lost_block_is_read_from_there_on_and_all_else_stays(
    three_corpora: list[Corpus], packing: Packing
) -> None:
    corpora, first, stop = three_corpora, 40, 95
    cursor = cursor_of(corpora, packing).advanced(36)
    losing = Cursor.from_dict(cursor.losing(0, first, stop).to_dict())
    table = pack.open_sequences(corpora[0], "train", context=T, packing=packing)
    touching = [any(at < stop and at + size > first for at, size in table.pieces(n)) for n in range(table.count)]
    assert table.holding(first, stop).tolist() == np.flatnonzero(touching).tolist()

    positions = np.arange(240)
    tables = {n: pack.open_sequences(corpus, "train", context=T, packing=packing) for n, corpus in enumerate(corpora)}
    which, planned = order.sequences(losing, positions)
    found = with_substitutes(losing, tables, positions, which, planned)
    replaced = (which == 0) & (positions >= 36) & np.array(touching)[planned * (which == 0)]
    assert replaced.sum() > 10
    assert (found[~replaced] == planned[~replaced]).all()
    assert not np.array(touching)[found[replaced]].any()
    assert len(np.unique(found[replaced])) > replaced.sum() // 3  # spread over the corpus

    rows = torch.cat(read(corpora, losing, 17, ranks=2))
    for row, corpus, number in zip(rows, which[36:].tolist(), found[36:].tolist(), strict=True):
        expected = np.zeros(T + 1, dtype=np.uint16)
        tables[corpus].fill(number, expected)
        assert row[1 : 1 + T].tolist() == expected[:T].tolist()


def test_a_run_that_loses_block_after_block_ends(three_corpora: list[Corpus]) -> None:
    cursor = cursor_of(three_corpora)
    for number in range(16):
        cursor = cursor.losing(1, number * 40, number * 40 + 40)
    assert len(json.dumps(cursor.to_dict())) < 2048
    with pytest.raises(UserError, match="16 blocks of this run's corpora are broken already, and now one more"):
        cursor.losing(1, 640, 680)


def test_a_corpus_of_which_all_is_lost_ends_the_run(three_corpora: list[Corpus]) -> None:
    corpora = three_corpora
    cursor = cursor_of(corpora).losing(0, 0, corpora[0].split("train").tokens)
    with pytest.raises(UserError, match="has hardly a sequence that is not broken"):
        read(corpora, cursor, 1)
