# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
"""Interval attention: o = softmax(scale q k') v, over the keys that each query sees  (Vaswani et al. 2017).

Every mask that language models use gives query i one interval of keys, [low_i, high_i], whose ends never decrease:

    low_i  = max(0, i - behind, start_i)         causal: ahead = S - T; banded: behind = window - 1 - (S - T)
    high_i = min(S - 1, i + ahead, stop_i - 1)   documents: start and stop of the query's document

so that one scheme covers causal, full, cross, banded and document attention and any mix of them, and tiles outside of
the interval are never visited (`attention_tiles.py`). Key j is seen by an interval of queries by the same argument.

Legend: B batch, T queries, S keys, N query heads, G key and value heads (grouped queries), K head width.
Numerics: scores, sums and gradients in fp32, weights rounded to the inputs' dtype before they meet v (Dao 2023,
arXiv:2307.08691). The log of each row's sum (lse, base 2) is all that is saved besides q, k, v and o. There are no
atomics: each output element has one writer that sums in a fixed order, so results repeat bit for bit.
Cost: forward 4 K operations a visible pair and head, backward 14 K (the scores are computed in both of its passes).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megagpt.kernels import attention_tiles as tiles
from megagpt.kernels.common import Mask, accumulator, check_floats, check_shape, on, signed, statistics_dtype
from megagpt.kernels.philox import threshold
from megagpt.kernels.tuning import Tile, tile

WIDEST = 256


def attention_reference(
    q_BTNK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, visible: Tensor,
    *, dropout: Mask | None = None, scale: float | None = None, softcap: float = 0.0, first_head: int = 0,
) -> Tensor:  # fmt: skip
    """The definition, in the dtype it is given; `visible` is bool and broadcasts to [B, N, T, S]."""
    _, T, N, K = q_BTNK.shape
    S = k_BSGK.shape[1]
    q, k, v = (x.transpose(1, 2).repeat_interleave(N // x.shape[2], 1) for x in (q_BTNK, k_BSGK, v_BSGK))
    scores = q @ k.transpose(2, 3) * (K**-0.5 if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).masked_fill(~visible, 0)
    if dropout is not None:
        keep = dropout.keep_BNTC(first_head + N, T, S)[:, first_head:]
        weights = (weights / (1 - dropout.rate)).masked_fill(~keep, 0)
    return (weights @ v).transpose(1, 2)


def _constants(q: Tensor, k: Tensor, softcap: float, rate: float) -> dict[str, object]:
    """What the compiler must know of a call, beside the tile."""
    K = q.shape[-1]
    exact = q.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return {
        "GROUP": q.shape[2] // k.shape[2], "K": K, "BLOCK_K": max(16, triton.next_power_of_2(K)), "CAP": softcap,
        "RATE": rate, "THRESHOLD": threshold(rate), "ACC": accumulator(q.dtype),
        "PRECISION": "ieee" if exact else "tf32",
    }  # fmt: skip


def _tile(name: str, q: Tensor, rate: float) -> Tile:
    """Dropout's words need registers of their own, and so tiles of their own."""
    return tile(f"attention_{name}{'_dropout' if rate > 0 else ''}", q.dtype, q.shape[-1], q.device)


@torch.library.custom_op("megagpt::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, stop: Tensor | None, samples: Tensor | None,
    behind: int, ahead: int, scale: float, softcap: float, rate: float, key: int, first_head: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o_BTNK and lse_BNT."""
    B, T, N, K = q.shape
    o = torch.empty(B, T, N, K, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, N, T, dtype=statistics_dtype(q.dtype), device=q.device)
    high = None if stop is None else stop - 1
    cut = _tile("forward", q, rate)
    with on(q):
        tiles.forward[(triton.cdiv(T, cut.rows) * B * N,)](
            q, k, v, o, lse, start, high, samples, key, first_head, scale, behind, ahead, T, k.shape[1], N,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            M=cut.rows, C=cut.columns, **cut.options(), **_constants(q, k, softcap, rate),
        )  # fmt: skip
    return o, lse


@_attention.register_fake
def _(q, k, v, start, stop, samples, behind, ahead, scale, softcap, rate, key, first_head):
    B, T, N, K = q.shape
    return q.new_empty(B, T, N, K), q.new_empty(B, N, T, dtype=statistics_dtype(q.dtype))


@torch.library.custom_op("megagpt::attention_backward", mutates_args=())
def _attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, start: Tensor | None, stop: Tensor | None,
    samples: Tensor | None, behind: int, ahead: int, scale: float, softcap: float, rate: float, key: int,
    first_head: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq_BTNK, dk_BSGK and dv_BSGK."""
    B, T, N, K = q.shape
    S, G = k.shape[1:3]
    do = do.contiguous()
    dq = torch.empty(B, T, N, K, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(B, S, G, K, dtype=q.dtype, device=q.device) for _ in range(2))
    delta = torch.empty_like(lse)
    keys = torch.arange(S, dtype=torch.int32, device=q.device).expand(B, S).contiguous()
    first = None if stop is None else torch.searchsorted(stop, keys, right=True, out_int32=True)
    last = None if start is None else torch.searchsorted(start, keys, right=True, out_int32=True) - 1
    high = None if stop is None else stop - 1
    dropout = (samples, key, first_head)
    sizes = (scale, behind, ahead, T, S, N, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    constants = _constants(q, k, softcap, rate)
    cut_delta, cut_keys, cut_queries = (
        _tile("delta", q, 0.0), _tile("backward_keys", q, rate), _tile("backward_queries", q, rate)
    )  # fmt: skip
    with on(q):
        tiles.delta[(triton.cdiv(T, cut_delta.rows) * B * N,)](
            o, do, delta, T, N, K=K, BLOCK_K=constants["BLOCK_K"], M=cut_delta.rows, ACC=constants["ACC"],
            **cut_delta.options(),
        )  # fmt: skip
        tiles.backward_keys[(triton.cdiv(S, cut_keys.columns) * B * G,)](
            q, k, v, do, lse, delta, dk, dv, first, last, *dropout, *sizes, M=cut_keys.rows, C=cut_keys.columns,
            **cut_keys.options(), **constants,
        )  # fmt: skip
        tiles.backward_queries[(triton.cdiv(T, cut_queries.rows) * B * N,)](
            q, k, v, do, lse, delta, dq, start, high, *dropout, *sizes, M=cut_queries.rows, C=cut_queries.columns,
            **cut_queries.options(), **constants,
        )  # fmt: skip
    return dq, dk, dv


@_attention_backward.register_fake
def _(do, q, k, v, *rest):  # noqa: ANN002
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    q, k, v, start, stop, samples, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, start, stop, samples)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, dlse):
    if do is None:
        return (None,) * 13
    return *_attention_backward(do, *ctx.saved_tensors, *ctx.numbers), *(None,) * 10


_attention.register_autograd(_differentiate, setup_context=_save)


def _visible_pairs(T: int, S: int, behind: int, ahead: int) -> int:
    """Queries times keys that they see; documents, whose bounds are data, are not taken off."""
    return sum(max(0, min(S - 1, i + ahead) - max(0, i - behind) + 1) for i in range(T))


@register_flop_formula(torch.ops.megagpt.attention)
def _(q, k, v, start, stop, samples, behind, ahead, *rest, **ignored) -> int:  # noqa: ANN002, ANN003
    B, T, N, K = q
    return 4 * K * B * N * _visible_pairs(T, k[1], behind, ahead)


@register_flop_formula(torch.ops.megagpt.attention_backward)
def _(do, q, k, v, o, lse, start, stop, samples, behind, ahead, *rest, **ignored) -> int:  # noqa: ANN002, ANN003
    B, T, N, K = q
    return 10 * K * B * N * _visible_pairs(T, k[1], behind, ahead)


def _checked(
    q_BTNK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, causal: bool, window: int | None, start: Tensor | None,
    stop: Tensor | None,
) -> None:  # fmt: skip
    check_floats(q=q_BTNK, k=k_BSGK, v=v_BSGK)
    for name, x in (("q", q_BTNK), ("k", k_BSGK)):
        if x.dim() != 4 or 0 in x.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, but must have four dims that are not empty.")
    B, T, N, K = q_BTNK.shape
    S, G = k_BSGK.shape[1:3]
    check_shape("k", k_BSGK, (B, S, G, K))
    check_shape("v", v_BSGK, (B, S, G, K))
    if N % G:
        raise ValueError(f"q has {N} heads and k has {G}, but query heads must be a multiple of key heads.")
    if K > WIDEST:
        raise ValueError(f"q has head width {K}, but it must be at most {WIDEST}.")
    if causal and S < T:
        raise ValueError(f"causal attention has {T:,} queries for {S:,} keys, but must not have more.")
    if window is not None and (window < 1 or not (causal or S == T)):
        raise ValueError(f"window is {window}, but must be at least 1, and be None in cross attention.")
    for name, bound in (("document_start_BT", start), ("document_stop_BT", stop)):
        if bound is not None:
            check_shape(name, bound, (B, T))
    if (start is None and stop is not None) or (not causal and S != T and start is not None and stop is None):
        raise ValueError("document_stop_BT is needed with document_start_BT in cross attention, and nowhere alone.")


def attention(
    q_BTNK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, *, causal: bool = True, window: int | None = None,
    document_start_BT: Tensor | None = None, document_stop_BT: Tensor | None = None, dropout: Mask | None = None,
    scale: float | None = None, softcap: float = 0.0, first_head: int = 0,
) -> Tensor:  # fmt: skip
    """Attention of each query to the interval of keys that it sees; returns o_BTNK, contiguous.

    Causal: the queries are the last T of the S positions; each sees the last `window` keys up to its own (None: all).
    Full (`causal=False`): all keys, or with T = S those closer than `window` on both sides. Documents: only the keys
    from `document_start_BT` to before `document_stop_BT`, two vectors of key positions that must never decrease along
    T (not checked: that would stop the GPU); without a stop, a document ends where the next starts. `softcap` c > 0
    bends scores by c tanh(s / c) (Gemma 2, arXiv:2408.00118). Dropout falls on the weights of heads `first_head` on.
    Query head n reads key head n // (N / G). Raises ValueError for shapes, dtypes or bounds that it lacks.
    """
    _checked(q_BTNK, k_BSGK, v_BSGK, causal, window, document_start_BT, document_stop_BT)
    T, K, S = q_BTNK.shape[1], q_BTNK.shape[3], k_BSGK.shape[1]
    scale = float(K**-0.5 if scale is None else scale)
    if scale <= 0 or softcap < 0:
        raise ValueError(f"scale is {scale} and softcap {softcap}, but they must be over 0 and at least 0.")
    behind, ahead = max(T, S), S - T if causal else max(T, S)
    if window is not None:
        behind = min(behind, window - 1 - (S - T))
        ahead = ahead if causal else min(ahead, window - 1)
    start, stop = (
        None if x is None else x.to(torch.int32).contiguous() for x in (document_start_BT, document_stop_BT)
    )
    if start is not None and stop is None and not causal:
        stop = torch.searchsorted(start, start, right=True, out_int32=True)
    samples, rate, key = None, 0.0, 0
    if dropout is not None and dropout.rate > 0:
        check_shape("dropout.samples_B", dropout.samples_B, q_BTNK.shape[:1])
        samples, rate, key = dropout.samples_B, dropout.rate, signed(dropout.key)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BTNK, k_BSGK, v_BSGK))
    return _attention(q, k, v, start, stop, samples, behind, ahead, scale, softcap, rate, key, first_head)[0]
