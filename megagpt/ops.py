"""Every operator of the model: what it computes, in plain torch, and which implementation runs.

The functions are the definitions. They compute in the dtype they are given, so that fp64 is the truth which others are
measured against, and they are the fast path on a CPU. `select` is the one place where an implementation is chosen: the
model calls what it returns and knows no other.

Letters: B batch, T query tokens, S key tokens, N query heads, G key and value heads, K head width, D features, R rows,
V vocabulary.
Numerics: norms, softmax and loss of half-precision inputs are computed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.errors import UserError
from megagpt.kernels import support
from megagpt.philox import WORD, philox

# Elements of the logits that cross entropy has in flight: few enough for a CPU's cache, enough to fill its cores.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Mask:
    """Which elements dropout keeps: a function of the sample and the position in it, never of a rank or a generator.

    The element of sample b at position t, head h and column c (a feature, or the key position in attention; h is 0
    outside attention) is kept iff word c % 4 of Philox4x32-10 at the counter (c // 4, t, low 32 bits of the number of
    b, h), with `key` as its key, is at least round(rate * 2**32).
    """

    rate: float
    """Share of the elements that is dropped, from 0 to below 1."""
    key: int
    """64 bits that no other dropout of the model has."""
    samples_B: Tensor
    """int64: the number of each sequence in the run's stream of samples."""
    first_token: int = 0
    """The position of the first row that is at hand, where a rank has a part of the tokens."""
    first_head: int = 0
    """The number of the first head that is at hand, where a rank has a part of the heads."""

    def keep_BNTC(self, heads: int, tokens: int, columns: int) -> Tensor:
        """True where an element stays."""
        device = self.samples_B.device
        counter = (
            torch.arange(-(-columns // 4), device=device),
            torch.arange(self.first_token, self.first_token + tokens, device=device)[:, None],
            (self.samples_B & WORD)[:, None, None, None],
            torch.arange(self.first_head, self.first_head + heads, device=device)[:, None, None],
        )
        dropped = round(self.rate * (WORD + 1))
        kept = torch.stack([word >= dropped for word in philox(counter, self.key)], dim=-1)
        return kept.flatten(-2)[..., :columns]


def dropout(x_BTD: Tensor, mask: Mask) -> Tensor:
    """`x` with the elements outside the mask at 0 and the others over 1 - rate (Srivastava et al. 2014, JMLR 15)."""
    keep_BTD = mask.keep_BNTC(1, x_BTD.shape[1], x_BTD.shape[2])[:, 0]
    return (x_BTD / (1 - mask.rate)).masked_fill(~keep_BTD, 0)


def attention(
    q_BTNK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    *,
    window: int | None = None,
    document_start_BT: Tensor | None = None,
    dropout: Mask | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention, o = softmax(scale q k') v, over the keys that each query sees  (Vaswani et al. 2017).

    The queries are the last T of the S positions, so that T = S in training and T < S with a key-value cache. The
    query at position i sees the keys from max(document_start, i - window + 1) to i; query head n reads key and value
    head n // (N / G) (Ainslie et al. 2023, arXiv:2305.13245). `document_start_BT` holds positions in the row, `scale`
    defaults to 1/sqrt(K). Returns o_BTNK, contiguous. Raises ValueError if the shapes do not fit.
    """
    B, T, N, K = q_BTNK.shape
    S, G = k_BSGK.shape[1:3]
    if k_BSGK.shape != v_BSGK.shape or k_BSGK.shape != (B, S, G, K) or N % G or S < T:
        raise ValueError(f"attention: q {tuple(q_BTNK.shape)}, k {tuple(k_BSGK.shape)}, v {tuple(v_BSGK.shape)}")
    if T == 1 and window is not None and document_start_BT is None:  # a cached step: no mask where a slice does
        k_BSGK, v_BSGK, S = k_BSGK[:, -window:], v_BSGK[:, -window:], min(S, window)
    q, k, v = q_BTNK.transpose(1, 2), k_BSGK.transpose(1, 2), v_BSGK.transpose(1, 2)
    visible = _visible(T, S, window=window, document_start_BT=document_start_BT, device=q.device)
    if dropout is not None:
        return _attention_with_dropout(q, k, v, visible, dropout, scale)
    o_BNTK = F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=visible is None and T > 1, scale=scale, enable_gqa=N != G
    )
    return o_BNTK.transpose(1, 2).contiguous()


def _visible(
    T: int, S: int, *, window: int | None, document_start_BT: Tensor | None, device: torch.device
) -> Tensor | None:
    """The keys that each query sees, bool [T, S] or [B, 1, T, S]; None where plain causal attention says it all."""
    if document_start_BT is None and (window is None or window >= S) and T in (1, S):
        return None
    query = torch.arange(S - T, S, device=device)[:, None]
    key = torch.arange(S, device=device)
    visible = key <= query
    if window is not None and window < S:
        visible &= key > query - window
    if document_start_BT is not None:
        visible = visible & (key >= document_start_BT[:, None, :, None])
    return visible


def _attention_with_dropout(
    q_BNTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, visible: Tensor | None, mask: Mask, scale: float | None
) -> Tensor:
    """The softmax written out, since its weights are what dropout falls on."""
    N, T, K = q_BNTK.shape[1:]
    G, S = k_BGSK.shape[1:3]
    if visible is None:
        visible = torch.ones(T, S, dtype=torch.bool, device=q_BNTK.device).tril(S - T)
    k_BNSK, v_BNSK = k_BGSK.repeat_interleave(N // G, 1), v_BGSK.repeat_interleave(N // G, 1)
    scores = q_BNTK @ k_BNSK.transpose(2, 3) * (K**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=_wide(scores.dtype))
    kept = (weights / (1 - mask.rate)).masked_fill(~mask.keep_BNTC(N, T, S), 0)
    return (kept.to(v_BNSK.dtype) @ v_BNSK).transpose(1, 2).contiguous()


def layernorm(x: Tensor, w_D: Tensor, b_D: Tensor | None, eps: float) -> Tensor:
    """LayerNorm, y = (x - mean) / sqrt(variance + eps) w + b over the last dim (Ba et al. 2016, arXiv:1607.06450)."""
    return F.layer_norm(x, w_D.shape, w_D, b_D, eps)


def rmsnorm(x: Tensor, w_D: Tensor, eps: float) -> Tensor:
    """RMSNorm, y = x / sqrt(mean(x^2) + eps) w over the last dim (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    return F.rms_norm(x, w_D.shape, w_D, eps)


def add_residual(x_BTD: Tensor, residual_BTD: Tensor, *, mask: Mask | None = None) -> Tensor:
    """The end of a branch: residual + dropout(x)."""
    return residual_BTD + (x_BTD if mask is None else dropout(x_BTD, mask))


def add_layernorm(
    x_BTD: Tensor, residual_BTD: Tensor, w_D: Tensor, b_D: Tensor | None, *, mask: Mask | None = None, eps: float
) -> tuple[Tensor, Tensor]:
    """The end of a branch and the start of the next: (LayerNorm of h, h) with h = residual + dropout(x)."""
    h_BTD = add_residual(x_BTD, residual_BTD, mask=mask)
    return layernorm(h_BTD, w_D, b_D, eps), h_BTD


def add_rmsnorm(
    x_BTD: Tensor, residual_BTD: Tensor, w_D: Tensor, *, mask: Mask | None = None, eps: float
) -> tuple[Tensor, Tensor]:
    """(RMSNorm of h, h) with h = residual + dropout(x)."""
    h_BTD = add_residual(x_BTD, residual_BTD, mask=mask)
    return rmsnorm(h_BTD, w_D, eps), h_BTD


def rotary(q_BTNK: Tensor, k_BTGK: Tensor, positions: Tensor, base: float) -> tuple[Tensor, Tensor]:
    """Queries and keys, each pair of features (i, i + K/2) turned by position * base^(-2i/K)  (Su et al. 2021,
    arXiv:2104.09864, with Llama's pairing).

    `positions` is [T] or [B, T]. Raises ValueError if K is odd.
    """
    K = q_BTNK.shape[-1]
    if K % 2:
        raise ValueError(f"rotary: the head width {K} is odd")
    dtype = _wide(q_BTNK.dtype)
    frequency = base ** -(torch.arange(0, K, 2, device=q_BTNK.device).to(dtype) / K)
    angle = (positions.to(dtype)[..., None] * frequency)[..., None, :]
    cos, sin = angle.cos(), angle.sin()
    return _turned(q_BTNK, cos, sin), _turned(k_BTGK, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def gelu(x: Tensor, b_H: Tensor | None = None) -> Tensor:
    """y/2 (1 + tanh(sqrt(2/pi) (y + 0.044715 y^3))) with y = x + b, GPT-2's form  (Hendrycks & Gimpel 2016,
    arXiv:1606.08415).
    """
    return F.gelu(x if b_H is None else x + b_H, approximate="tanh")


def linear_gelu(x: Tensor, w_HD: Tensor, b_H: Tensor | None) -> Tensor:
    """gelu(x w' + b). Here the product adds the bias; the kernels add it in the GELU, whose backward then sums db."""
    return gelu(F.linear(x, w_HD, b_H))


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, of the first and the second half of the last dim  (Shazeer 2020, arXiv:2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def cross_entropy(logits_RV: Tensor, targets_R: Tensor, *, vocabulary: int) -> Tensor:
    """The loss -log softmax(logits)[target] of each row, in nats: fp32, or fp64 for fp64 logits.

    A row with a negative target has loss 0. Columns from `vocabulary` on are padding: they get no probability and no
    gradient. Forward and backward go through the rows in chunks, so that beside the logits only their gradient ever
    exists whole.
    """
    loss_R = _CrossEntropy.apply(logits_RV, targets_R, vocabulary)
    assert isinstance(loss_R, Tensor)
    return loss_R


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits alone for the backward, which computes the softmax again."""

    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, targets_R: Tensor, vocabulary: int) -> Tensor:
        ctx.save_for_backward(logits_RV, targets_R)
        ctx.vocabulary = vocabulary
        loss_R = torch.empty(targets_R.shape, dtype=_wide(logits_RV.dtype), device=logits_RV.device)
        for rows in _row_chunks(logits_RV):
            log_p = logits_RV[rows, :vocabulary].log_softmax(-1, dtype=loss_R.dtype)
            loss_R[rows] = -log_p.gather(1, targets_R[rows, None].clamp(min=0))[:, 0]
        return loss_R.masked_fill_(targets_R < 0, 0)

    @staticmethod
    def backward(ctx: Any, dloss_R: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits_RV, targets_R = ctx.saved_tensors
        vocabulary = ctx.vocabulary
        dlogits_RV = torch.empty_like(logits_RV)
        dlogits_RV[:, vocabulary:] = 0
        dloss_R1 = dloss_R.masked_fill(targets_R < 0, 0)[:, None]
        for rows in _row_chunks(logits_RV):
            d = logits_RV[rows, :vocabulary].softmax(-1, dtype=dloss_R.dtype).mul_(dloss_R1[rows])
            d.scatter_add_(1, targets_R[rows, None].clamp(min=0), -dloss_R1[rows])
            dlogits_RV[rows, :vocabulary] = d
        return dlogits_RV, None, None


def _row_chunks(logits_RV: Tensor) -> list[slice]:
    R, V = logits_RV.shape
    size = max(1, _CHUNK // V)
    return [slice(start, min(start + size, R)) for start in range(0, R, size)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and statistics are kept in: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Operators:
    """One implementation of each operator, with the signatures of the functions above."""

    choice: str
    """Which implementation this is, and why; a line for the console."""
    attention: Callable[..., Tensor]
    layernorm: Callable[..., Tensor]
    rmsnorm: Callable[..., Tensor]
    add_residual: Callable[..., Tensor]
    add_layernorm: Callable[..., tuple[Tensor, Tensor]]
    add_rmsnorm: Callable[..., tuple[Tensor, Tensor]]
    cross_entropy: Callable[..., Tensor]
    rotary: Callable[..., tuple[Tensor, Tensor]]
    gelu: Callable[..., Tensor]
    linear_gelu: Callable[..., Tensor]
    swiglu: Callable[..., Tensor]
    dropout: Callable[..., Tensor]


def select(kernels: str) -> Operators:
    """The operators that `model.kernels` asks for. Raises UserError if that is triton, and it cannot run here.

    auto takes triton on a GPU that can run it. In Triton's interpreter only triton itself does, being for tests.
    """
    obstacle = support.obstacle()
    if kernels == "triton" and obstacle:
        raise UserError(
            f"model.kernels = 'triton': the kernels cannot run, because {obstacle}.",
            "Use --model.kernels auto, or torch.",
        )
    if kernels == "triton" or (kernels == "auto" and not obstacle and not support.interpreting()):
        return _triton("as asked for" if kernels == "triton" else "the GPU runs it")
    if kernels == "torch":
        why = "as asked for"
    elif torch.cuda.is_available():
        why = f"{obstacle or 'Triton is in its interpreter'}; slower, and windows and dropout take T x T memory"
    else:
        why = obstacle or "Triton is in its interpreter"
    return Operators(
        choice=f"torch operators ({why})",
        attention=attention,
        layernorm=layernorm,
        rmsnorm=rmsnorm,
        add_residual=add_residual,
        add_layernorm=add_layernorm,
        add_rmsnorm=add_rmsnorm,
        cross_entropy=cross_entropy,
        rotary=rotary,
        gelu=gelu,
        linear_gelu=linear_gelu,
        swiglu=swiglu,
        dropout=dropout,
    )


def _triton(why: str) -> Operators:
    """The kernels; importing them imports Triton."""
    from megagpt.kernels import attention as kernel
    from megagpt.kernels import cross_entropy, gelu, norm, residual, rotary, swiglu, tuning

    def attention_of_heads(q: Tensor, k: Tensor, v: Tensor, *, dropout: Mask | None = None, **options: Any) -> Tensor:
        first_head = 0 if dropout is None else dropout.first_head
        return kernel.attention(q, k, v, dropout=dropout, first_head=first_head, **options)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = f"tiles of {tuning.architecture(device)}, table {tuning.digest(device)[:8]}"
    return Operators(
        choice=f"Triton {support.triton_version()} kernels ({why}; {table})",
        attention=attention_of_heads,
        layernorm=norm.layernorm,
        rmsnorm=norm.rmsnorm,
        add_residual=residual.add_residual,
        add_layernorm=norm.add_layernorm,
        add_rmsnorm=norm.add_rmsnorm,
        cross_entropy=cross_entropy.cross_entropy,
        rotary=rotary.rotary,
        gelu=gelu.gelu,
        linear_gelu=lambda x, w_HD, b_H: gelu.gelu(F.linear(x, w_HD), b_H),
        swiglu=swiglu.swiglu,
        dropout=residual.dropout,
    )
