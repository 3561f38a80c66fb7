"""Interval attention against fp64: every mask, width and fusion, on sizes that break tiles."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagpt.kernels import attention as module
from megagpt.kernels import tuning
from megagpt.kernels.attention import attention, attention_reference
from megagpt.kernels.visits import tiles_visited
from megagpt.ops import Mask
from tests.kernels.helpers import DEVICE, DTYPES, assert_as_exact_as_torch, assert_repeats, random, with_gradients

pytestmark = pytest.mark.usefixtures("careful")


def visible(T, S, *, causal=True, window=None, start=None, stop=None):
    """Visible pairs, bool [B or 1, 1, T, S], by the definition: causal queries are the last T positions."""
    query = torch.arange(T, device=DEVICE)[:, None] + (S - T if causal else 0)
    key = torch.arange(S, device=DEVICE)
    seen = (key <= query) if causal else torch.ones(T, S, dtype=torch.bool, device=DEVICE)
    if window is not None:
        seen = seen & ((query - key).abs() < window)
    seen = seen[None, None]
    for bound, within in ((start, torch.ge), (stop, torch.lt)):
        if bound is not None:
            seen = seen & within(key, bound[:, None, :, None])
    return seen


def inputs(B, T, N, K, *, S=None, G=None, dtype=torch.float32):
    shapes = ((B, T, N, K), (B, S or T, G or N, K), (B, S or T, G or N, K))
    return [random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


def documents(*lengths):
    """int32 [1, T]: where each token's document starts."""
    firsts = [0, *itertools.accumulate(lengths)][:-1]
    starts = [first for first, length in zip(firsts, lengths, strict=True) for _ in range(length)]
    return torch.tensor([starts], dtype=torch.int32, device=DEVICE)


def check(tensors, mask, **options):
    dropout, softcap = options.get("dropout"), options.get("softcap", 0.0)
    return assert_as_exact_as_torch(
        lambda q, k, v: attention(q, k, v, **options),
        lambda q, k, v: attention_reference(q, k, v, mask, dropout=dropout, softcap=softcap),
        tensors,
    )


def tiled(monkeypatch, rows, columns):
    cut = tuning.Tile(rows=rows, columns=columns, warps=4, stages=1)
    monkeypatch.setattr(module, "tile", lambda *_: cut)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("T", "G", "K"), [(1, 4, 16), (97, 1, 64), (131, 2, 80), (64, 4, 96), (40, 2, 256), (50, 4, 20)]
)
def test_causal_attention_is_as_exact_as_torchs(dtype, T, G, K):
    check(inputs(1, T, 4, K, G=G, dtype=dtype), visible(T, T))


@pytest.mark.parametrize("window", [1, 7, 64, 500])
def test_a_banded_layer_sees_its_window(window):
    check(inputs(2, 150, 2, 32, G=1), visible(150, 150, window=window), window=window)


@pytest.mark.parametrize("window", [None, 1, 9])
def test_full_attention_sees_both_sides(window):
    check(inputs(1, 99, 2, 32), visible(99, 99, causal=False, window=window), causal=False, window=window)


@pytest.mark.parametrize(("T", "S"), [(1, 70), (33, 70), (70, 33)])
def test_cross_attention_sees_all_keys(T, S):
    check(inputs(2, T, 2, 16, S=S), visible(T, S, causal=False), causal=False)


@pytest.mark.parametrize("window", [None, 5])
def test_the_queries_of_a_cache_are_the_last_positions(window):
    check(inputs(1, 9, 2, 16, S=75), visible(9, 75, window=window), window=window)


@pytest.mark.parametrize("lengths", [(1,) * 33, (50, 1, 30, 19), (100,)], ids=str)
@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("causal", [True, False])
def test_documents_do_not_see_each_other(lengths, window, causal):
    start = documents(*lengths)
    T = start.shape[1]
    stop = torch.searchsorted(start, start, right=True)
    mask = visible(T, T, causal=causal, window=window, start=start, stop=stop)
    check(inputs(1, T, 2, 16, G=1), mask, causal=causal, window=window, document_start_BT=start)


def test_packed_encoder_and_decoder_documents_meet_in_cross_attention():
    start = torch.tensor([[0] * 10 + [20] * 25 + [21] * 5], device=DEVICE)
    stop = torch.tensor([[20] * 10 + [21] * 25 + [60] * 5], device=DEVICE)
    options = {"causal": False, "document_start_BT": start, "document_stop_BT": stop}
    check(inputs(1, 40, 2, 16, S=60), visible(40, 60, causal=False, start=start, stop=stop), **options)


def test_a_query_that_sees_nothing_gives_zero_and_no_gradient():
    start = torch.tensor([[0] * 5 + [9] * 4], device=DEVICE)
    stop = torch.tensor([[5] * 5 + [9] * 4], device=DEVICE)
    q, k, v = inputs(1, 9, 1, 16)
    options = {"causal": False, "document_start_BT": start, "document_stop_BT": stop}
    o, dq, dk, dv = with_gradients(lambda q, k, v: attention(q, k, v, **options), [q, k, v], torch.float32)
    assert not o[:, 5:].any()
    assert not dq[:, 5:].any()
    assert not dk[:, 5:].any()
    assert dv.isfinite().all()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 60),
    causal=st.booleans(),
    group=st.sampled_from([1, 2]),
    rows=st.sampled_from([16, 32]),
    columns=st.sampled_from([16, 64]),
)
def test_any_mix_of_masks_on_any_tiles_is_right(monkeypatch, lengths, window, causal, group, rows, columns):
    tiled(monkeypatch, rows, columns)
    start = documents(*lengths)
    T = start.shape[1]
    stop = torch.searchsorted(start, start, right=True)
    mask = visible(T, T, causal=causal, window=window, start=start, stop=stop)
    check(inputs(1, T, 2, 16, G=2 // group), mask, causal=causal, window=window, document_start_BT=start)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_drops_what_the_reference_drops(dtype):
    dropout = Mask(0.25, 2**63 + 12_345, torch.tensor([5, 2**33 + 1], device=DEVICE))
    check(inputs(2, 70, 2, 16, G=1, dtype=dtype), visible(70, 70), dropout=dropout)


def test_dropout_masks_equal_the_reference_bit_for_bit_on_any_tiles(monkeypatch):
    """With all weights equal and v the identity, the output shows which weights were kept."""
    T = 64
    dropout = Mask(0.5, 2**64 - 1, torch.tensor([7], device=DEVICE))
    q, k = torch.zeros(1, T, 3, T, device=DEVICE), torch.zeros(1, T, 3, T, device=DEVICE)
    v = torch.eye(T, device=DEVICE)[None, :, None].expand(1, T, 3, T)
    expected = dropout.keep_BNTC(3, T, T).transpose(1, 2)
    for rows, columns in ((16, 64), (64, 16)):
        tiled(monkeypatch, rows, columns)
        assert torch.equal(attention(q, k, v, causal=False, dropout=dropout) > 0, expected)
    second = attention(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], causal=False, dropout=dropout, first_head=1)
    assert torch.equal(second > 0, expected[:, :, 1:])


def test_softcap_bends_scores_and_gradients():
    tensors = [tensor * 3 for tensor in inputs(1, 45, 2, 32)]
    check(tensors, visible(45, 45), softcap=2.0)


def test_all_fusions_together_are_as_exact_as_torchs():
    start = documents(30, 41)
    dropout = Mask(0.1, 99, torch.tensor([3], device=DEVICE))
    mask = visible(71, 71, window=20, start=start)
    options = {"window": 20, "document_start_BT": start, "dropout": dropout, "softcap": 3.0}
    check(inputs(1, 71, 4, 16, G=2), mask, **options)


def test_slices_of_one_matrix_give_the_bits_of_separate_tensors():
    qkv = random(2, 37, 8, 32, dtype=torch.float32, seed=1)
    parts = qkv.split((4, 2, 2), 2)
    assert torch.equal(attention(*parts), attention(*(part.contiguous() for part in parts)))
    turned = [part.transpose(1, 3).contiguous().transpose(1, 3) for part in parts]
    assert turned[0].stride(-1) != 1
    assert torch.equal(attention(*parts), attention(*turned))


def test_results_repeat_bit_for_bit():
    assert_repeats(lambda q, k, v: attention(q, k, v, window=9), inputs(2, 61, 4, 16, G=2))


def test_gradients_agree_with_finite_differences_in_fp64():
    tensors = [tensor.requires_grad_() for tensor in inputs(1, 5, 2, 3, G=1, dtype=torch.float64)]
    start = documents(3, 2)
    dropout = Mask(0.3, 4, torch.tensor([1], device=DEVICE))
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, document_start_BT=start, dropout=dropout, softcap=1.5),
        tensors,
        fast_mode=True,
    )


def test_large_scores_neither_overflow_nor_lose_the_row():
    q, k, v = (tensor * 100 for tensor in inputs(1, 33, 1, 16))
    check([q, k, v / 100], visible(33, 33))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts what the interpreter runs")
@pytest.mark.parametrize("options", [{}, {"window": 20}, {"causal": False}, {"lengths": (40, 1, 59)}], ids=str)
def test_the_forward_visits_exactly_the_tiles_that_are_counted(monkeypatch, options):
    from triton.runtime import interpreter

    products = []
    dot = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_dot", lambda self, *rest: (products.append(1), dot(self, *rest))[1]
    )
    tiled(monkeypatch, 16, 16)
    lengths = options.pop("lengths", None)
    start = documents(*lengths) if lengths else None
    attention(*inputs(1, 100, 1, 16), document_start_BT=start, **options)
    counted = tiles_visited(100, rows=16, columns=16, lengths=lengths, **options)
    assert len(products) == 2 * counted  # q k' and p v


def test_a_band_visits_no_more_than_its_width_and_one_tile_a_row():
    T, W, tile = 8192, 256, 128
    dense = (T // tile) ** 2
    assert tiles_visited(T, rows=tile, columns=tile, window=W) / dense <= (W + tile) / T


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.ones(1, 4, 3, 16), "v": torch.ones(1, 4, 3, 16)}, "q has 4 heads and k has 3"),
        ({"v": torch.ones(1, 4, 2, 8)}, r"v has shape \(1, 4, 2, 8\), but must have \(1, 4, 2, 16\)"),
        ({"q": torch.ones(1, 5, 4, 16)}, "causal attention has 5 queries for 4 keys"),
        ({"q": torch.ones(1, 0, 4, 16)}, "four dims that are not empty"),
        ({"window": 0}, "window is 0, but must be at least 1"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"document_start_BT": torch.zeros(1, 3)}, r"document_start_BT has shape \(1, 3\)"),
        ({"document_stop_BT": torch.zeros(1, 4)}, "document_stop_BT is needed with document_start_BT"),
        ({"dropout": Mask(1.0, 1, torch.zeros(1, dtype=torch.int64))}, r"dropout rate is 1.0, but must be from 0"),
        ({"q": torch.ones(1, 4, 4, 16, dtype=torch.int64)}, "q is torch.int64, but must be float16"),
    ],
)
def test_bad_arguments_are_named(change, message):
    call = {"q": torch.ones(1, 4, 4, 16), "k": torch.ones(1, 4, 2, 16), "v": torch.ones(1, 4, 2, 16)} | change
    with pytest.raises(ValueError, match=message):
        attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)
