from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagpt.data import pack
from megagpt.data.corpus import Corpus
from megagpt.data.order import Packing
from megagpt.data.pack import Sequences, best_fit_plan, open_sequences, verify_plans
from megagpt.errors import UserError
from tests.data.conftest import MakeCorpus, random_documents

T = 16
DOCUMENTS = random_documents(seed=5, count=50, longest=2 * T + 5)
TOKENS = np.concatenate(DOCUMENTS)


@pytest.fixture
def corpus(make_corpus: MakeCorpus) -> Corpus:
    return make_corpus("corpus", DOCUMENTS)


def rows(sequences: Sequences) -> list[list[int]]:
    """The tokens of every sequence: up to T inputs and one more."""
    found = []
    for sequence in range(sequences.count):
        row = np.full(T + 1, 999)
        found.append(row[: sequences.fill(sequence, row)].tolist())
    return found


def open_train(corpus: Corpus, packing: Packing) -> Sequences:
    return open_sequences(corpus, "train", context=T, packing=packing)


def test_chunks_hold_every_target_once_and_the_tail_is_kept(corpus: Corpus) -> None:
    found = rows(open_train(corpus, "chunk"))
    assert [token for row in found for token in row[:-1]] + [found[-1][-1]] == TOKENS.tolist()
    assert {len(row) for row in found[:-1]} == {T + 1}
    assert 2 <= len(found[-1]) <= T + 1


@pytest.mark.parametrize(("tokens", "count"), [(2, 1), (T, 1), (T + 1, 1), (T + 2, 2), (2 * T + 1, 2), (2 * T + 2, 3)])
def test_a_chunk_is_begun_only_where_there_is_a_target(make_corpus: MakeCorpus, tokens: int, count: int) -> None:
    corpus = make_corpus("corpus", [np.arange(tokens, dtype=np.uint16)])
    found = rows(open_train(corpus, "chunk"))
    assert len(found) == count
    assert sum(len(row) - 1 for row in found) == tokens - 1


def test_seams_are_where_a_document_begins_inside_a_chunk(corpus: Corpus) -> None:
    sequences = open_train(corpus, "chunk")
    for sequence, row in enumerate(rows(sequences)):
        assert sequences.seams(sequence) == [place + 1 for place, token in enumerate(row[:-1]) if token == 0]


def test_best_fit_has_every_token_once_as_an_input_and_whole_documents(corpus: Corpus) -> None:
    sequences = open_train(corpus, "best_fit")
    pieces: list[list[int]] = []
    for sequence, row in enumerate(rows(sequences)):
        bounds = [0, *sequences.seams(sequence), len(row)]
        pieces += [row[a:b] for a, b in pairwise(bounds)]
        assert len(row) <= T or (len(row) == T + 1 and len(bounds) == 2)
    cut = [document.tolist()[first : first + T + 1] for document in DOCUMENTS for first in range(0, len(document), T)]
    assert sorted(pieces) == sorted(cut)
    inputs = sorted(token for piece in pieces for token in piece[:T])
    assert inputs == sorted(TOKENS.tolist())


def plain_best_fit(lengths: list[int], context: int) -> list[int]:
    """Best fit, one length after another: the fullest row with room, the first of equals as the plan orders them."""
    room: list[int] = []
    for length in lengths:
        fitting = [free for free in room if free >= length]
        if fitting:
            room[room.index(min(fitting))] -= length
        else:
            room.append(context - length)
    return sorted(room)


@given(st.integers(1, 40), st.data())
def test_the_plan_fills_rows_as_placing_one_piece_at_a_time_would(context: int, data: st.DataObject) -> None:
    lengths = sorted(data.draw(st.lists(st.integers(1, context), min_size=1, max_size=60)), reverse=True)
    row = pack._best_fit_rows(np.array(lengths), context)
    used = np.bincount(row, weights=lengths).astype(int)
    assert (used > 0).all()
    assert sorted((context - used).tolist()) == plain_best_fit(lengths, context)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(window=st.integers(1, 30))
def test_planning_in_windows_still_covers_every_token_once(corpus: Corpus, window: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "_WINDOW", window)
        plan = best_fit_plan(corpus.split("train"), T)
    covered = np.concatenate(
        [
            np.arange(start, start + min(length, T))
            for start, length in zip(plan["piece_start"].tolist(), plan["piece_length"].tolist(), strict=True)
        ]
    )
    assert sorted(covered.tolist()) == list(range(len(TOKENS)))
    assert plan["row_first"][-1] == len(plan["piece_start"])


def test_the_plan_is_stored_beside_the_corpus_and_read_again(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    first = rows(open_train(corpus, "best_fit"))
    assert (corpus.folder / f"train.best_fit-{T}.plan").is_file()
    monkeypatch.delattr(pack, "best_fit_plan")
    assert rows(open_train(corpus, "best_fit")) == first


@pytest.mark.parametrize("damage", ["broken", "of another corpus"])
def test_a_plan_that_does_not_belong_here_is_made_again(make_corpus: MakeCorpus, corpus: Corpus, damage: str) -> None:
    expected = rows(open_train(corpus, "best_fit"))
    path = corpus.folder / f"train.best_fit-{T}.plan"
    if damage == "broken":
        path.write_bytes(path.read_bytes()[:50])
    else:
        other = make_corpus("other", DOCUMENTS[:9])
        open_train(other, "best_fit")
        (other.folder / path.name).replace(path)
    assert rows(open_train(corpus, "best_fit")) == expected
    assert verify_plans(corpus.folder, repair=False) == []


def test_verify_finds_a_changed_plan_and_repairs_it(corpus: Corpus) -> None:
    expected = rows(open_train(corpus, "best_fit"))
    path = corpus.folder / f"train.best_fit-{T}.plan"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert verify_plans(corpus.folder, repair=False) == [f"{path} is not this corpus's plan; --repair makes it again."]
    assert verify_plans(corpus.folder, repair=True) == verify_plans(corpus.folder, repair=False) == []
    assert rows(open_train(corpus, "best_fit")) == expected


def test_a_corpus_that_cannot_be_written_is_packed_in_memory(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, content: object) -> None:
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(pack, "write_whole", refuse)
    assert sum(len(row) for row in rows(open_train(corpus, "best_fit"))) > 0
    assert list(corpus.folder.glob("*.plan")) == []


def test_the_data_order_knows_a_corpus_by_content_and_count(corpus: Corpus) -> None:
    source = pack.source(corpus, context=T, packing="chunk")
    assert (source.fingerprint, source.sequences) == (corpus.fingerprint, -(-(len(TOKENS) - 1) // T))
    with pytest.raises(UserError, match="empty heldout split"):
        open_sequences(corpus, "heldout", context=T, packing="chunk")
