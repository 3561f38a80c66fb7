from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor

from megagpt.data import order, pack
from megagpt.data.batch import IGNORE, Batch, document_starts
from megagpt.data.corpus import Corpus
from megagpt.data.loader import heldout_batches, train_batches, train_steps
from megagpt.data.order import Cursor, Packing
from megagpt.data.prefetch import Prefetched
from megagpt.errors import UserError
from tests.data.conftest import MakeCorpus, random_documents

T = 16
PACKINGS: tuple[Packing, ...] = ("chunk", "best_fit")


@pytest.fixture
def corpora(three_corpora: list[Corpus]) -> list[Corpus]:
    return three_corpora


def cursor_of(corpora: list[Corpus], packing: Packing = "chunk", weights: tuple[int, ...] = (3, 2, 1)) -> Cursor:
    sources = [pack.source(corpus, context=T, packing=packing) for corpus in corpora]
    return order.start(seed=3, context=T, packing=packing, weights=dict(zip(sources, weights, strict=False)))


def read(
    corpora: list[Corpus],
    cursor: Cursor,
    steps: int,
    *,
    batch: int = 12,
    micro_batch: int = 2,
    ranks: int = 1,
    mask: bool = False,
) -> list[Tensor]:
    """Rows of [sample, tokens, targets] of some steps, all ranks together, in the order of the stream."""
    found: list[list[Tensor]] = [[] for _ in range(steps)]
    for rank in range(ranks):
        stream = train_steps(
            corpora,
            cursor,
            global_batch=lambda _consumed: batch,
            micro_batch=micro_batch,
            data_rank=rank,
            data_ranks=ranks,
            document_mask=mask,
            pin=False,
        )
        for step, micro_batches in enumerate(islice(stream, steps)):
            assert len(micro_batches) == batch // ranks // micro_batch
            assert all(len(part.tokens_BT) == micro_batch for part in micro_batches)
            found[step] += [
                torch.cat([part.samples_B[:, None], part.tokens_BT, part.targets_BT], 1) for part in micro_batches
            ]
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_step_has_the_same_rows_on_any_number_of_ranks_and_micro_batches(
    corpora: list[Corpus], packing: Packing
) -> None:
    cursor = cursor_of(corpora, packing)
    alone = read(corpora, cursor, 5)
    assert alone[1][:, 0].tolist() == list(range(12, 24))
    for ranks, micro_batch in ((1, 12), (2, 3), (2, 2), (4, 1), (4, 3), (12, 1)):
        again = read(corpora, cursor, 5, ranks=ranks, micro_batch=micro_batch)
        assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))


def test_the_rows_are_those_that_the_order_names(corpora: list[Corpus]) -> None:
    cursor = cursor_of(corpora)
    rows = torch.cat(read(corpora, cursor, 8))
    which, sequence = order.sequences(cursor, np.arange(len(rows)))
    for row, corpus, number in zip(rows, which.tolist(), sequence.tolist(), strict=True):
        split = corpora[corpus].split("train")
        expected = split.read(number * T, min(number * T + T + 1, split.tokens)).astype(np.int64)
        assert row[1 : 1 + T].tolist() == np.append(expected, [0] * T)[:T].tolist()
        targets = row[1 + T :]
        assert targets[: len(expected) - 1].tolist() == expected[1:].tolist()
        assert (targets[len(expected) - 1 :] == IGNORE).all()


def test_a_restart_anywhere_on_other_ranks_and_batches_continues_the_stream(corpora: list[Corpus]) -> None:
    cursor = cursor_of(corpora)
    whole = torch.cat(read(corpora, cursor, 10))
    parts = read(corpora, cursor, 2)
    parts += read(corpora, cursor.advanced(24), 3, batch=8, ranks=4)
    parts += read(corpora, Cursor.from_dict(cursor.advanced(48).to_dict()), 6, ranks=2)
    assert torch.equal(torch.cat(parts), whole)


def test_a_changed_mixture_goes_on_where_each_corpus_stood(corpora: list[Corpus]) -> None:
    first_two = corpora[:2]
    cursor = cursor_of(first_two, weights=(1, 1)).advanced(24)
    sources = [pack.source(corpus, context=T, packing="chunk") for corpus in corpora]
    changed = cursor.with_mixture({sources[2]: 1, sources[1]: 1})
    rows = torch.cat(read(corpora[1:], changed, 2))
    which, sequence = order.sequences(changed, np.arange(24, 48))
    assert sorted(set(which.tolist())) == [1, 2]
    alone = order.sequences(order.start(seed=3, context=T, packing="chunk", weights={sources[1]: 1}), np.arange(24))[1]
    assert sequence[which == 1].tolist() == alone[12:24].tolist()
    for row, corpus, number in zip(rows, which.tolist(), sequence.tolist(), strict=True):
        expected = corpora[corpus].split("train").read(number * T, number * T + 2)
        assert row[1:3].tolist() == expected.tolist()


def test_a_growing_batch_reads_the_same_stream(corpora: list[Corpus]) -> None:
    cursor = cursor_of(corpora)
    stream = train_steps(
        corpora,
        cursor,
        global_batch=lambda consumed: 4 if consumed < 8 else 8,
        micro_batch=4,
        data_rank=0,
        data_ranks=1,
        document_mask=False,
        pin=False,
    )
    steps = list(islice(stream, 4))
    assert [sum(len(part.samples_B) for part in step) for step in steps] == [4, 4, 8, 8]
    rows = torch.cat([part.tokens_BT for step in steps for part in step])
    assert torch.equal(rows, torch.cat(read(corpora, cursor, 2))[:, 1 : 1 + T])


def batches(corpora: list[Corpus], packing: Packing, *, mask: bool) -> Iterator[Batch]:
    stream = train_steps(
        corpora,
        cursor_of(corpora, packing),
        global_batch=lambda _consumed: 4,
        micro_batch=4,
        data_rank=0,
        data_ranks=1,
        document_mask=mask,
        pin=False,
    )
    for (batch,) in islice(stream, 60):
        yield batch


def test_plain_chunks_predict_the_first_token_of_the_next_document(corpora: list[Corpus]) -> None:
    crossed = 0
    for batch in batches(corpora, "chunk", mask=False):
        assert batch.cu_seqlens_S is None
        inside = batch.tokens_BT[:, :-1] == 0
        crossed += int((batch.targets_BT[:, :-1][inside] != IGNORE).sum())
    assert crossed > 20


@pytest.mark.parametrize(("packing", "mask"), [("chunk", True), ("best_fit", False), ("best_fit", True)])
def test_otherwise_no_target_lies_in_another_document(corpora: list[Corpus], packing: Packing, mask: bool) -> None:
    for batch in batches(corpora, packing, mask=mask):
        assert (batch.targets_BT[batch.tokens_BT == 0] == IGNORE).all()
        told = batch.targets_BT[:, :-1] != IGNORE
        assert torch.equal(batch.targets_BT[:, :-1][told], batch.tokens_BT[:, 1:][told])


@pytest.mark.parametrize("packing", PACKINGS)
def test_document_starts_follow_the_ends_of_text(corpora: list[Corpus], packing: Packing) -> None:
    for batch in batches(corpora, packing, mask=True):
        assert batch.cu_seqlens_S is not None
        assert batch.cu_seqlens_S.dtype == torch.int32
        assert batch.cu_seqlens_S.shape == (4 * T + 1,)
        assert (batch.cu_seqlens_S.diff() >= 0).all()
        starts_BT = document_starts(batch.cu_seqlens_S, 4, T)
        assert starts_BT.dtype == torch.int32
        for tokens, targets, starts in zip(batch.tokens_BT, batch.targets_BT, starts_BT, strict=True):
            padding = next((t for t in range(T) if not tokens[t:].any() and (targets[t:] == IGNORE).all()), T) + 1
            expected, begin = [], 0
            for t, token in enumerate(tokens[:padding].tolist()):
                expected.append(begin)
                begin = t + 1 if token == 0 else begin
            assert starts[:padding].tolist() == expected


def test_every_target_of_an_epoch_is_asked_for_once(make_corpus: MakeCorpus) -> None:
    documents = random_documents(4, 40, 50)
    corpus = make_corpus("corpus", documents)
    modes: tuple[tuple[Packing, bool], ...] = (("chunk", False), ("chunk", True), ("best_fit", True))
    for packing, mask in modes:
        cursor = cursor_of([corpus], packing, (1,))
        steps = cursor.sources[0].sequences
        rows = torch.cat(read([corpus], cursor, steps, batch=1, micro_batch=1, mask=mask))
        targets = rows[:, 1 + T :]
        asked = sorted(targets[targets != IGNORE].tolist())
        skipped = 0 if packing == "chunk" and not mask else 1
        whole = np.concatenate(documents)[1:] if not skipped else np.concatenate([d[1:] for d in documents])
        assert asked == sorted(whole.tolist())


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_evaluation_has_equal_steps_on_every_rank_and_each_sequence_once(
    corpora: list[Corpus], packing: Packing, ranks: int
) -> None:
    count = pack.open_sequences(corpora[0], "heldout", context=T, packing=packing).count
    assert count >= 8
    for wanted in (1, 5, 1000):
        per_rank = [
            list(
                heldout_batches(
                    corpora[0],
                    context=T,
                    sequences=wanted,
                    micro_batch=2,
                    data_rank=rank,
                    data_ranks=ranks,
                    packing=packing,
                    document_mask=True,
                )
            )
            for rank in range(ranks)
        ]
        assert len({len(found) for found in per_rank}) == 1
        everything = [batch for found in per_rank for batch in found]
        assert all(batch.tokens_BT.shape == (2, T) for batch in everything)
        real = [
            int(sample)
            for batch in everything
            for sample, targets in zip(batch.samples_B, batch.targets_BT, strict=True)
            if (targets != IGNORE).any()
        ]
        assert sorted(real) == list(range(min(wanted, count)))


def test_a_short_evaluation_is_spread_over_the_split(corpora: list[Corpus]) -> None:
    split = corpora[0].split("heldout")
    count = pack.open_sequences(corpora[0], "heldout", context=T, packing="chunk").count
    (batch,) = heldout_batches(
        corpora[0],
        context=T,
        sequences=4,
        micro_batch=4,
        data_rank=0,
        data_ranks=1,
        packing="chunk",
        document_mask=False,
    )
    expected = [split.read(T * (count * number // 4), T * (count * number // 4) + 5).tolist() for number in range(4)]
    assert batch.tokens_BT[:, :5].tolist() == expected


def test_the_padding_of_a_short_row_is_a_document_of_its_own(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("corpus", [np.array([5, 6, 0], np.uint16), np.array([7, 0], np.uint16)])
    for packing in PACKINGS:
        (step,) = islice(
            train_steps(
                [corpus],
                cursor_of([corpus], packing, (1,)),
                global_batch=lambda _consumed: 1,
                micro_batch=1,
                data_rank=0,
                data_ranks=1,
                document_mask=True,
                pin=False,
            ),
            1,
        )
        assert step[0].cu_seqlens_S is not None
        assert step[0].cu_seqlens_S.tolist() == [0, 3, 5] + [T] * (T - 2)
        assert step[0].tokens_BT.tolist() == [[5, 6, 0, 7] + [0] * (T - 4)]
        assert step[0].targets_BT.tolist() == [[6, 0, IGNORE, 0] + [IGNORE] * (T - 4)]


def test_a_whole_evaluation_reads_every_held_out_target_once(corpora: list[Corpus]) -> None:
    split = corpora[0].split("heldout")
    found = heldout_batches(
        corpora[0],
        context=T,
        sequences=10**6,
        micro_batch=3,
        data_rank=0,
        data_ranks=1,
        packing="chunk",
        document_mask=False,
    )
    targets = torch.cat([batch.targets_BT.flatten() for batch in found])
    assert targets[targets != IGNORE].tolist() == split.read(1, split.tokens).tolist()


def test_the_thread_yields_what_the_plain_iterator_does_and_close_ends_it(corpora: list[Corpus]) -> None:
    cursor = cursor_of(corpora)
    before = threading.active_count()
    with train_batches(
        corpora,
        cursor,
        global_batch=lambda _consumed: 12,
        micro_batch=2,
        data_rank=0,
        data_ranks=1,
        document_mask=False,
        pin=False,
        prefetch=2,
    ) as stream:
        rows = torch.cat([part.tokens_BT for step in islice(stream, 3) for part in step])
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    assert torch.equal(rows, torch.cat(read(corpora, cursor, 3))[:, 1 : 1 + T])
    with pytest.raises(StopIteration):
        next(stream)


def test_an_error_in_the_thread_is_raised_by_the_consumer_after_what_came_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    with Prefetched(items(), 3) as stream:
        assert next(stream) == 1
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                next(stream)


def test_a_bounded_iterator_ends_and_nothing_is_read_far_ahead() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    with Prefetched(items(), 2) as stream:
        assert list(islice(stream, 50)) == list(range(50))
        assert len(taken) <= 54
    with Prefetched(iter([1, 2]), 2) as stream:
        assert list(stream) == [1, 2]
    with pytest.raises(ValueError, match="prefetch = 0 must be at least 1"):
        Prefetched(iter([1]), 0)


def test_a_step_that_does_not_divide_is_refused(corpora: list[Corpus]) -> None:
    with pytest.raises(ValueError, match="a step of 12 sequences is not a multiple of micro_batch 5 x data 1"):
        read(corpora, cursor_of(corpora), 1, micro_batch=5)


def test_a_corpus_that_the_cursor_reads_must_be_given(corpora: list[Corpus]) -> None:
    with pytest.raises(UserError, match=r"the run reads a corpus [0-9a-f]{12} that is not in data\.mixture"):
        read(corpora[:2], cursor_of(corpora), 1)


def test_a_batch_moves_as_a_whole(corpora: list[Corpus]) -> None:
    batch = next(batches(corpora, "chunk", mask=True)).to("meta")
    assert batch.cu_seqlens_S is not None
    assert all(t.is_meta for t in (batch.tokens_BT, batch.targets_BT, batch.cu_seqlens_S, batch.samples_B))
    assert next(batches(corpora, "chunk", mask=False)).to("cpu").cu_seqlens_S is None


def test_a_run_stops_at_the_step_that_would_read_a_corpus_too_often(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("a", random_documents(1, 20, 30))
    source = pack.source(corpus, context=T, packing="chunk")
    cursor = dataclasses.replace(cursor_of([corpus], weights=(1,)), max_epochs=2)
    steps = train_steps(
        [corpus],
        cursor,
        global_batch=lambda _: 4,
        micro_batch=2,
        data_rank=0,
        data_ranks=2,
        document_mask=False,
        pin=False,
    )
    for _ in range(2 * source.sequences // 4):
        next(steps)
    with pytest.raises(UserError, match="data.max_epochs = 2 allows no more"):
        next(steps)
