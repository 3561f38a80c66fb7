"""The ledger against torch's own FLOP counter, the model's parameters, published sizes and hand arithmetic."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megagpt.config import Model
from megagpt.data.batch import Batch
from megagpt.ledger import (
    Flops,
    Parameters,
    flops_per_token,
    hfu,
    mfu,
    parameters,
    time_left,
    training_bytes,
    visible_pairs,
)
from megagpt.model import build, initialise


@pytest.mark.parametrize(
    ("published", "layers", "width", "heads"),
    [
        (125e6, 12, 768, 12),
        (350e6, 24, 1024, 16),
        (760e6, 24, 1536, 16),
        (1.3e9, 24, 2048, 16),
        (2.7e9, 32, 2560, 32),
        (6.7e9, 32, 4096, 32),
        (13.0e9, 40, 5120, 40),
        (175e9, 96, 12_288, 96),
    ],
)
def test_gpt3_has_the_parameters_that_were_published(published, layers, width, heads):
    model = Model(layers=layers, width=width, heads=heads, context=2048)
    assert parameters(model).total() == pytest.approx(published, rel=0.02)


def test_gpt2_small_has_its_124_439_808_parameters():
    assert parameters(Model()).total() == 124_439_808


def test_llama_2_7b_has_its_6_738_415_616_parameters():
    model = Model(
        layers=32, width=4096, heads=32, hidden=11_008, vocabulary=32_000, context=4096, norm="rmsnorm",
        positions="rotary", feed_forward="swiglu", biases="none", tied=False,
    )  # fmt: skip
    assert parameters(model).total() == 6_738_415_616


@pytest.mark.parametrize(("tokens", "window"), [(1, None), (7, None), (7, 1), (7, 3), (7, 7), (7, 20)])
def test_visible_pairs_are_those_of_the_mask(tokens, window):
    seen = sum(1 for i in range(tokens) for j in range(tokens) if j <= i and (window is None or j > i - window))
    assert visible_pairs(tokens, window) == seen


def test_one_small_model_by_hand():
    """L 2, D 8, H 32, N 2, G 1, K 4, V 10, T 4; the second layer sees 2 tokens."""
    flops = flops_per_token(Model(layers=2, width=8, heads=2, kv_heads=1, vocabulary=10, context=4, window=2), "full")
    projections = 2 * (2 * 8 * 16 + 2 * 8 * 8)
    scores = 4 * 2 * 4 * (10 / 4) + 4 * 2 * 4 * (7 / 4)
    feed_forward = 2 * (2 * 2 * 8 * 32)
    head = 2 * 8 * 10
    assert flops.forward == projections + scores + feed_forward + head
    assert flops.backward == 2 * flops.forward
    assert flops.recomputed == projections + scores + feed_forward / 2
    assert flops.useful() == 3 * flops.forward
    assert flops.hardware() == 3 * flops.forward + flops.recomputed


def test_selective_recomputation_costs_the_first_matrix_of_the_feed_forward_layers():
    model = Model(layers=3, width=16, heads=2, feed_forward="swiglu")
    assert flops_per_token(model).recomputed == 0
    assert flops_per_token(model, "selective").recomputed == 3 * 2 * 16 * 2 * model.feed_forward_width()


def test_documents_shorter_than_the_context_are_counted_by_what_they_see():
    model = Model(layers=2, width=8, heads=2, vocabulary=10, context=8, window=2)
    whole = flops_per_token(model, documents=[8])
    assert whole == flops_per_token(model)
    cut = flops_per_token(model, documents=[5, 3])
    dense, banded = (36 - 15 - 6) / 8, (15 - 9 - 5) / 8
    assert whole.forward - cut.forward == pytest.approx(4 * 8 * (dense + banded))
    for wrong in ([], [4, 0]):
        with pytest.raises(ValueError, match="positive"):
            flops_per_token(model, documents=wrong)


def test_a_window_never_counts_more_than_the_dense_layer():
    dense = flops_per_token(Model(context=256))
    assert flops_per_token(Model(context=256, window=256)) == dense
    assert flops_per_token(Model(context=256, window=64)).forward < dense.forward


def test_mfu_leaves_recomputation_out_and_hfu_counts_it():
    flops = Flops(forward=2.0, backward=4.0, recomputed=1.0)
    assert mfu(flops, tokens_per_s=10, peak_flops_per_s=120) == pytest.approx(0.5)
    assert hfu(flops, tokens_per_s=10, peak_flops_per_s=140) == pytest.approx(0.5)


def test_zero_cuts_what_its_paper_says():
    """Rajbhandari et al. 2020, figure 1: 7.5 B parameters in half precision on 64 ranks."""
    totals = [training_bytes(7_500_000_000, precision="bf16", zero_stage=stage, data=64).total() for stage in range(4)]
    assert [round(total / 1e9, 1) for total in totals] == [120.0, 31.4, 16.6, 1.9]


def test_plain_fp32_keeps_no_second_copy_of_its_weights():
    assert training_bytes(10, precision="fp32", zero_stage=0, data=1).total() == 160
    assert training_bytes(10, precision="fp32", zero_stage=1, data=1).total() == 200


@pytest.mark.parametrize(("stage", "data"), [(4, 1), (-1, 1), (1, 0)])
def test_another_zero_stage_or_no_rank_is_refused(stage, data):
    with pytest.raises(ValueError, match="zero_stage"):
        training_bytes(1, precision="bf16", zero_stage=stage, data=data)


def test_time_left_is_infinite_when_nothing_moves_and_zero_at_the_end():
    assert time_left(tokens=40, total_tokens=100, tokens_per_s=2) == 30
    assert time_left(tokens=40, total_tokens=100, tokens_per_s=0) == float("inf")
    assert time_left(tokens=140, total_tokens=100, tokens_per_s=0) == 0


KINDS = {
    "dense": {},
    "banded": {"window": 16, "biases": "no_qkv"},
    "modern": {
        "kv_heads": 2, "norm": "rmsnorm", "positions": "rotary", "feed_forward": "swiglu", "biases": "none",
        "tied": False, "qk_norm": True,
    },
}  # fmt: skip


def a_small_model(kind):
    return Model(layers=3, width=64, heads=4, context=48, vocabulary=131, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_the_parameters_are_those_of_the_model_part_by_part(kind):
    counted = {"embedding": 0, "positions": 0, "attention": 0, "feed_forward": 0, "norms": 0, "head": 0}
    for name, parameter in build(a_small_model(kind)).named_parameters():
        if "norm" in name:
            part = "norms"
        elif name.startswith("embedding."):
            part = "positions" if "position" in name else "embedding"
        else:
            part = "head" if name.startswith("head.") else name.split(".")[2]
        counted[part] += parameter.numel()
    assert parameters(a_small_model(kind)) == Parameters(**counted)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_torch_counts_the_same_flops_in_the_model(kind, recompute):
    """Torch counts all T x T pairs of the unfused attention; the ledger those that are visible, so they are added."""
    model, rows = a_small_model(kind), 2
    T = model.context
    gpt = build(model, recompute=recompute)
    initialise(gpt, model, seed=1)
    tokens_BT = torch.arange(rows * T).reshape(rows, T) % model.vocabulary
    batch = Batch(tokens_BT, tokens_BT, None, torch.arange(rows))
    with FlopCounterMode(display=False) as forward, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        gpt(batch)
    with FlopCounterMode(display=False) as training, sdpa_kernel(SDPBackend.MATH):
        gpt(batch).backward()
    hidden = sum(T - visible_pairs(T, model.layer_window(layer)) / T for layer in range(model.layers))
    masked = 4 * model.width * hidden
    flops = flops_per_token(model, recompute)
    assert forward.get_total_flops() / (rows * T) == pytest.approx(flops.forward + masked)
    again = masked if recompute == "full" else 0
    assert training.get_total_flops() / (rows * T) == pytest.approx(flops.hardware() + 3 * masked + again)
