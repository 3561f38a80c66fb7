"""How each parameter of the model is cut over the tensor ranks: a table, and the arithmetic of its cuts. No torch.

    module                      weight, [rows, columns]                                  what a rank keeps
    embedding.token             V x D          rows                                      its share of the vocabulary
    attention.query_key_value   (N+2G)K x D    rows of three parts, q | k | v            its heads of each part
    attention.output            D x NK         columns                                   its heads
    feed_forward.up             H x D          rows                                      H / tensor
    feed_forward.gate_up        2H x D         rows of two parts, gate | up              H / tensor of each part
    feed_forward.down           D x H          columns                                   H / tensor
    head.output                 V x D          rows                                      its share of the vocabulary

The biases of modules cut by rows are cut with them; those of modules cut by columns, and whatever is not in the table
(norms, positions), are on every rank. Where there are fewer key and value heads than ranks, or they do not divide
evenly, a rank keeps those that its query heads use: neighbours then hold the same one, and the first of them owns it.
docs/parallel.md draws the cuts (Shoeybi et al. 2019, arXiv:1909.08053, section 3).

Letters: D width, H hidden, N query heads, G key and value heads, K head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megagpt.config import Model

ROWS_MULTIPLE = 64  # rows of the vocabulary that a rank holds are a multiple of this: what tensor cores like


@dataclass(frozen=True)
class Range:
    """Indices [start, stop) of a whole parameter's dim, and whether this rank is the one that answers for them."""

    start: int
    stop: int
    owned: bool = True

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Cut:
    """The part of a parameter that a rank keeps: these ranges of one dim, one after another, and all of the others."""

    dim: int
    ranges: tuple[Range, ...]

    def size(self) -> int:
        return sum(len(part) for part in self.ranges)


@dataclass(frozen=True)
class Place:
    """Which of how many tensor ranks."""

    rank: int
    ranks: int


def kv_heads_of(model: Model, place: Place) -> Range:
    """The key and value heads that this rank's query heads use."""
    mine = model.heads // place.ranks
    share = model.heads // model.key_value_heads()
    return Range(place.rank * mine // share, (place.rank * mine + mine - 1) // share + 1)


def kv_head_of_each_query(model: Model, place: Place) -> list[int] | None:
    """Where each of this rank's query heads finds its key and value head among the rank's own; None where it is the
    rule that attention knows, query head n to head n // (query heads / key and value heads).
    """
    heads, kept = model.heads // place.ranks, kv_heads_of(model, place)
    share = model.heads // model.key_value_heads()
    found = [(place.rank * heads + n) // share - kept.start for n in range(heads)]
    regular = heads % len(kept) == 0 and found == [n // (heads // len(kept)) for n in range(heads)]
    return None if regular else found


def vocabulary_rows(model: Model, tensor: int) -> int:
    """Rows of the embedding with its padding, over all ranks."""
    multiple = ROWS_MULTIPLE * tensor
    return -(-model.vocabulary // multiple) * multiple


def _share(size: int, place: Place) -> Range:
    each = size // place.ranks
    return Range(place.rank * each, place.rank * each + each)


def _vocabulary(model: Model, place: Place) -> Cut:
    return Cut(0, (_share(vocabulary_rows(model, place.ranks), place),))


def _query_key_value(model: Model, place: Place) -> Cut:
    K, N, G = model.head_width(), model.heads, model.key_value_heads()
    queries, kept = _share(N, place), kv_heads_of(model, place)
    before = kv_heads_of(model, Place(place.rank - 1, place.ranks)).stop if place.rank else 0
    shared = min(max(before, kept.start), kept.stop)
    parts = [Range(queries.start * K, queries.stop * K)]
    for first in (N, N + G):
        parts += [
            Range((first + kept.start) * K, (first + shared) * K, owned=False),
            Range((first + shared) * K, (first + kept.stop) * K),
        ]
    return Cut(0, tuple(part for part in parts if len(part)))


def _heads_columns(model: Model, place: Place) -> Cut:
    return Cut(1, (_share(model.heads * model.head_width(), place),))


def _hidden_rows(model: Model, place: Place) -> Cut:
    return Cut(0, (_share(model.feed_forward_width(), place),))


def _gate_up_rows(model: Model, place: Place) -> Cut:
    gate, H = _share(model.feed_forward_width(), place), model.feed_forward_width()
    return Cut(0, (gate, Range(H + gate.start, H + gate.stop)))


def _hidden_columns(model: Model, place: Place) -> Cut:
    return Cut(1, (_share(model.feed_forward_width(), place),))


CUTS: dict[str, Callable[[Model, Place], Cut]] = {
    "embedding.token": _vocabulary,
    "attention.query_key_value": _query_key_value,
    "attention.output": _heads_columns,
    "feed_forward.up": _hidden_rows,
    "feed_forward.gate_up": _gate_up_rows,
    "feed_forward.down": _hidden_columns,
    "head.output": _vocabulary,
}


def cut_of(name: str, model: Model, place: Place) -> Cut | None:
    """The cut of the parameter with this global name, or None if every rank keeps all of it."""
    module, _, kind = name.rpartition(".")
    rule = CUTS.get(".".join(module.split(".")[-2:]))
    if rule is None:
        return None
    cut = rule(model, place)
    return None if kind == "bias" and cut.dim == 1 else cut
