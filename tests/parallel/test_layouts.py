"""Layouts against the fp64 reference: outputs, loss, every gradient, norm, and three steps of AdamW."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megagpt import config
from megagpt.verify.layouts import EIGHT, SMALL, parse
from megagpt.verify.task import run_of
from megagpt.verify.trial import try_layout

LEARNED_TIED = "gpt3-125m"  # layernorm, gelu, learned positions, banded attention, tied
ROTARY_UNTIED = "llama-1b"  # rmsnorm, swiglu, rotary, grouped queries, documents, untied


def check(preset: str, layout: str, **model: Any) -> None:
    run = run_of(config.load(preset), parse(layout))
    result = try_layout(dataclasses.replace(run, model=dataclasses.replace(run.model, **model)), layout)
    assert not result.problem, result.problem


@pytest.mark.parametrize("layout", SMALL)
def test_a_layout_computes_what_one_process_does(layout):
    check(LEARNED_TIED, layout)


@pytest.mark.parametrize("layout", ["1x2x2/z1/a3/sp", "2x1x2/z3/a1", "1x1x4/z0/a1"])
def test_so_it_does_with_rotary_positions_grouped_queries_documents_and_an_untied_head(layout):
    check(ROTARY_UNTIED, layout)


def test_key_value_heads_that_do_not_divide_among_the_ranks_are_shared_by_neighbours():
    check(ROTARY_UNTIED, "1x1x4/z1/a1/sp", heads=12, kv_heads=3, width=48, hidden=64, biases="all")


def test_one_key_value_head_is_on_every_rank():
    check(ROTARY_UNTIED, "2x1x2/z3/a1", kv_heads=1)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_recomputed_is_the_same_in_a_pipeline_of_cut_layers(recompute):
    preset = config.load(LEARNED_TIED)
    preset = dataclasses.replace(preset, train=dataclasses.replace(preset.train, recompute=recompute))
    result = try_layout(run_of(preset, parse("1x2x2/z1/a3/sp")), "1x2x2/z1/a3/sp")
    assert not result.problem, result.problem


@pytest.mark.parametrize("layout", ["2x1x2/z1/a3/offload", "2x1x1/z2/a1/offload", "1x1x2/z3/a3/offload"])
def test_an_optimizer_on_the_cpu_takes_the_same_steps(layout):
    check(LEARNED_TIED, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", EIGHT)
@pytest.mark.parametrize("preset", [LEARNED_TIED, ROTARY_UNTIED])
def test_eight_ranks_in_any_layout_compute_what_one_process_does(preset, layout):
    check(preset, layout)
