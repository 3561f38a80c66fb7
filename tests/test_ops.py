"""The operators against their definitions, written out in fp64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megagpt import ops
from megagpt.ops import Mask
from megagpt.philox import philox

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def attention_by_hand(q, k, v, *, window, start, keep=None, rate=0.0):
    """One query at a time, one head at a time."""
    B, T, N, K = q.shape
    S, G = k.shape[1:3]
    rows = []
    for b in range(B):
        for t in range(T):
            i = S - T + t
            first = max(0 if window is None else i - window + 1, 0 if start is None else int(start[b, t]), 0)
            for n in range(N):
                keys, values = k[b, first : i + 1, n * G // N], v[b, first : i + 1, n * G // N]
                weights = (keys @ q[b, t, n] / math.sqrt(K)).softmax(0)
                if keep is not None:
                    weights = weights * keep[b, n, t, first : i + 1] / (1 - rate)
                rows.append(weights @ values)
    return torch.stack(rows).view(B, T, N, K)


STARTS = torch.tensor([[0, 0, 0, 3, 3, 5, 6], [0, 1, 1, 1, 1, 1, 1]], dtype=torch.int32)
ATTENTION_CASES = [
    pytest.param(
        heads, kv_heads, window, start, id=f"{heads}q{kv_heads}kv-window{window}-{'documents' * (start is not None)}"
    )
    for heads, kv_heads in ((3, 3), (4, 2))
    for window in (None, 1, 3, 7)
    for start in (None, STARTS)
]


@pytest.mark.parametrize(("heads", "kv_heads", "window", "start"), ATTENTION_CASES)
def test_attention_and_its_gradients_are_those_of_the_definition(heads, kv_heads, window, start):
    q, k, v = random(2, 7, heads, 5), random(2, 7, kv_heads, 5), random(2, 7, kv_heads, 5)
    ours = ops.attention(q, k, v, window=window, document_start_BT=start)
    truth = attention_by_hand(q, k, v, window=window, start=start)
    do = torch.randn_like(truth)
    torch.testing.assert_close(ours, truth)
    for mine, true in zip(
        torch.autograd.grad(ours, (q, k, v), do), torch.autograd.grad(truth, (q, k, v), do), strict=True
    ):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("queries", [1, 2, 7])
def test_with_fewer_queries_than_keys_the_queries_are_the_last_positions(queries, window):
    q, k, v = random(2, 7, 4, 5), random(2, 7, 2, 5), random(2, 7, 2, 5)
    whole = ops.attention(q, k, v, window=window)
    torch.testing.assert_close(ops.attention(q[:, -queries:], k, v, window=window), whole[:, -queries:])


def test_attention_refuses_shapes_that_do_not_fit():
    q, k = random(1, 4, 3, 2), random(1, 4, 2, 2)
    with pytest.raises(ValueError, match="attention: q"):
        ops.attention(q, k, k)
    with pytest.raises(ValueError, match="attention: q"):
        ops.attention(random(1, 5, 2, 2), k, k)


@pytest.mark.parametrize(("heads", "kv_heads", "window", "start"), ATTENTION_CASES)
def test_attention_drops_the_weights_that_its_mask_names(heads, kv_heads, window, start):
    q, k, v = random(2, 7, heads, 5), random(2, 7, kv_heads, 5), random(2, 7, kv_heads, 5)
    mask = Mask(rate=0.3, key=99, samples_B=torch.tensor([5, 1 << 40]))
    keep = mask.keep_BNTC(heads, 7, 7)
    ours = ops.attention(q, k, v, window=window, document_start_BT=start, dropout=mask)
    truth = attention_by_hand(q, k, v, window=window, start=start, keep=keep, rate=0.3)
    do = torch.randn_like(truth)
    torch.testing.assert_close(ours, truth)
    for mine, true in zip(
        torch.autograd.grad(ours, (q, k, v), do), torch.autograd.grad(truth, (q, k, v), do), strict=True
    ):
        torch.testing.assert_close(mine, true)


def test_a_mask_is_the_documented_function_of_sample_head_position_and_column():
    samples = torch.tensor([3, (7 << 32) + 9])
    keep = Mask(rate=0.25, key=2**63 + 5, samples_B=samples).keep_BNTC(2, 3, 10)
    assert keep.shape == (2, 2, 3, 10)
    for b, h, t, c in itertools.product(range(2), range(2), range(3), range(10)):
        counter = (c // 4, t, int(samples[b]) % 2**32, h)
        words = philox([torch.tensor(part) for part in counter], 2**63 + 5)
        assert bool(keep[b, h, t, c]) == (int(words[c % 4]) >= 2**30)


def test_an_element_is_kept_iff_its_word_reaches_the_rate():
    samples = torch.tensor([3])
    word = int(philox([torch.tensor(part) for part in (1, 2, 3, 0)], 99)[2])
    for rate, kept in ((word / 2**32, True), ((word + 1) / 2**32, False)):
        assert bool(Mask(rate, 99, samples).keep_BNTC(1, 3, 8)[0, 0, 2, 6]) == kept


def test_the_mask_of_a_sample_is_the_same_in_any_batch():
    samples = torch.tensor([4, 8, 15, 16, 23])
    keep = Mask(0.5, 1, samples).keep_BNTC(2, 6, 12)
    for b in range(5):
        assert torch.equal(Mask(0.5, 1, samples[b : b + 1]).keep_BNTC(2, 6, 12)[0], keep[b])
    assert len({row.numpy().tobytes() for row in keep}) == 5


def test_dropout_drops_its_share_and_keeps_the_expectation():
    x = torch.ones(4, 64, 128, requires_grad=True)
    y = ops.dropout(x, Mask(0.1, 7, torch.arange(4)))
    assert set(y.unique().tolist()) == {0.0, float(torch.ones(()) / 0.9)}
    assert (y == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_norms_lose_no_more_than_the_rounding_of_their_result(norm, dtype):
    x, w, b = random(5, 333), random(333), random(333)
    x, w, b = (tensor.detach().to(dtype) for tensor in (x * 3 + 1, w, b))
    X, W, B = x.double(), w.double(), b.double()
    if norm == "layernorm":
        centred = X - X.mean(-1, keepdim=True)
        truth = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * W + B
        ours = ops.layernorm(x, w, b, 1e-5)
    else:
        truth = X / (X.square().mean(-1, keepdim=True) + 1e-5).sqrt() * W
        ours = ops.rmsnorm(x, w, 1e-5)
    assert ours.dtype == dtype
    rounding = 0.51 * torch.finfo(dtype).eps * truth.abs()
    assert ((ours - truth).abs() <= rounding + 1e-6 * (4 * W.abs() + B.abs())).all()


def test_layernorm_needs_no_bias():
    x, w = random(3, 8), random(8)
    torch.testing.assert_close(ops.layernorm(x, w, None, 1e-5), ops.layernorm(x, w, torch.zeros(8).double(), 1e-5))


def test_rotary_turns_each_pair_of_features_by_its_own_angle():
    q, k = random(2, 5, 3, 6), random(2, 5, 1, 6)
    positions = torch.tensor([0, 1, 2, 7, 100])
    for x, turned in zip((q, k), ops.rotary(q, k, positions, 500.0), strict=True):
        angle = positions[:, None] * 500.0 ** (-torch.arange(3).double() / 3)
        pairs = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones(5, 3).double(), angle)[:, None]
        torch.testing.assert_close(turned, torch.cat((pairs.real, pairs.imag), -1))


def test_rotary_takes_one_row_of_positions_for_each_sequence():
    q, k = random(2, 4, 2, 6), random(2, 4, 2, 6)
    positions = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]])
    both = ops.rotary(q, k, positions, 1e4)
    for b in range(2):
        one = ops.rotary(q[b : b + 1], k[b : b + 1], positions[b], 1e4)
        assert all(torch.equal(mine[b : b + 1], alone) for mine, alone in zip(both, one, strict=True))


def test_rotary_keeps_the_dtype_and_refuses_an_odd_width():
    q = random(1, 2, 1, 4, dtype=torch.bfloat16)
    assert ops.rotary(q, q, torch.arange(2), 1e4)[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="head width 5 is odd"):
        ops.rotary(random(1, 2, 1, 5), random(1, 2, 1, 5), torch.arange(2), 1e4)


def test_gelu_and_swiglu_are_their_formulas():
    x = random(4, 6)
    torch.testing.assert_close(ops.gelu(x), x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
    torch.testing.assert_close(ops.swiglu(x), x[:, :3] * torch.sigmoid(x[:, :3]) * x[:, 3:])


@pytest.mark.parametrize("chunk", [1, 60, 1 << 22])
def test_cross_entropy_and_its_gradient_are_those_of_torch_without_padding_and_masked_rows(chunk, monkeypatch):
    monkeypatch.setattr(ops, "_CHUNK", chunk)
    logits, targets = random(13, 20), torch.randint(0, 17, (13,))
    targets[[2, 7]] = -100
    ours = ops.cross_entropy(logits, targets, vocabulary=17)
    truth = F.cross_entropy(logits[:, :17], targets, ignore_index=-100, reduction="none")
    torch.testing.assert_close(ours, truth)
    dloss = torch.randn(13).double()
    (mine,), (true,) = (torch.autograd.grad(loss, logits, dloss) for loss in (ours, truth))
    torch.testing.assert_close(mine, true)
    assert not mine[:, 17:].any()
    assert not mine[[2, 7]].any()


def test_cross_entropy_of_half_precision_logits_is_computed_in_fp32():
    logits, targets = random(9, 500, dtype=torch.bfloat16), torch.randint(0, 500, (9,))
    loss = ops.cross_entropy(logits, targets, vocabulary=500)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), F.cross_entropy(logits.double(), targets, reduction="none"), rtol=1e-6, atol=1e-6
    )
    assert torch.autograd.grad(loss.sum(), logits)[0].dtype == torch.bfloat16


class _LargeResults(TorchDispatchMode):
    """Counts the tensors of `size` elements or more that operators create."""

    def __init__(self, size):
        super().__init__()
        self.size, self.storages = size, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().nbytes() >= self.size * result.itemsize:
            self.storages.add(result.untyped_storage()._cdata)
        return result


def test_cross_entropy_makes_one_more_tensor_of_the_logits_size_and_no_other(monkeypatch):
    monkeypatch.setattr(ops, "_CHUNK", 64)
    logits, targets = random(32, 16), torch.randint(0, 16, (32,))
    logits_storage = logits.untyped_storage()._cdata
    with _LargeResults(logits.numel()) as large:
        (gradient,) = torch.autograd.grad(ops.cross_entropy(logits, targets, vocabulary=16).sum(), logits)
    assert large.storages - {logits_storage} == {gradient.untyped_storage()._cdata}


def test_auto_takes_torch_on_a_cpu():
    assert ops.select("auto").attention is ops.attention
