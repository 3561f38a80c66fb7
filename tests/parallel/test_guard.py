"""The guard, on four ranks: silent where ranks agree, and by name where one does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megagpt import config
from megagpt.errors import UserError
from megagpt.mesh import mesh_of
from megagpt.parallel import ranks
from megagpt.parallel.guard import checksum
from megagpt.verify.layouts import parse
from megagpt.verify.task import rows, run_of
from tests.ranks import on_ranks


@given(st.integers(0, 59), st.integers(0, 59))
def test_a_checksum_sees_any_two_elements_that_change_places(first, second):
    value = torch.arange(60.0).view(5, 12)
    other = value.clone()
    other.view(-1)[first], other.view(-1)[second] = value.view(-1)[second], value.view(-1)[first]
    assert (checksum(value) == checksum(other)) == (first == second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.float16])
def test_a_checksum_sees_one_bit(dtype):
    value = torch.ones(7, 3).to(dtype)
    other = value.clone()
    other[4, 1] = 2
    assert checksum(value) != checksum(other)


def outcome(layout: str, spoil: Callable[[Any, list[Any]], None], folder: Path) -> list[str]:
    """What check_agreement says on each rank after `spoil(engine, batches)`."""
    run = run_of(config.load("gpt3-125m"), parse(layout))

    def work() -> str:
        from megagpt.parallel.engine import Engine

        ranks.join(world=run.parallel.world_size())
        mesh = mesh_of(run.parallel, ranks.rank())
        engine = Engine(run, mesh)
        batches = [rows(run, 0, mesh.data_rank * run.train.micro_batch, run.train.micro_batch)]
        spoil(engine, batches)
        try:
            engine.check_agreement(batches if mesh.reads_data else [])
        except UserError as error:
            return str(error)
        return ""

    return on_ranks(work, run.parallel.world_size(), folder)


def nothing(engine: Any, batches: list[Any]) -> None:
    pass


@pytest.mark.parametrize("layout", ["2x1x2/z1", "1x2x2/z0", "2x1x2/z3", "1x4x1/z1"])
def test_the_guard_is_silent_where_all_agree(tmp_path, layout):
    assert outcome(layout, nothing, tmp_path) == [""] * 4


def test_a_rank_that_reads_another_batch_is_named_on_every_rank(tmp_path):
    def spoil(engine: Any, batches: list[Any]) -> None:
        if engine.mesh.rank == 3:
            tokens = batches[0].tokens_BT.clone()
            tokens[0, 5] += 1
            batches[0] = dataclasses.replace(batches[0], tokens_BT=tokens)

    for words in outcome("1x2x2/z1", spoil, tmp_path):
        assert words.startswith("rank 3 (data 0, stage 1, tensor 1) reads another batch than rank 0 (data 0, stage 0,")


@pytest.mark.parametrize(
    ("layout", "name", "words"),
    [
        (
            "2x1x2/z1",
            "blocks.1.feed_forward.up.weight",
            "blocks.1.feed_forward.up.weight differs among the data-parallel ranks",
        ),
        (
            "1x1x4/z1",
            "blocks.2.attention_norm.bias",
            "blocks.2.attention_norm.bias differs among the tensor ranks [0, 1, 2, 3]: rank 3",
        ),
        (
            "1x4x1/z0",
            "embedding.token.weight",
            "embedding.token.weight differs among the first and last stage's ranks [0, 3]",
        ),
    ],
)
def test_a_copy_of_a_weight_that_differs_in_one_bit_is_named(tmp_path, layout, name, words):
    def spoil(engine: Any, batches: list[Any]) -> None:
        if engine.mesh.rank == 3:
            (part,) = [part for part in engine.placed if part.name == name]
            part.parameter.data.view(-1)[0] += 2.0**-20

    found = outcome(layout, spoil, tmp_path)
    assert all(found)
    assert any(words in text for text in found), found
