"""The output head and its loss in one, in chunks of rows: the logits of the whole batch never exist.

    loss = sum over rows of cross_entropy(x w')

The loss is a sum, so that its gradients by x and w are known up to one factor while a chunk's logits are at hand; they
are computed then, and the backward only multiplies them by that factor. No logits are computed twice.
Legend: R rows, C rows of a chunk, D features, V vocabulary (V_tp: the part of this rank).
Numerics: logits in x's dtype, losses and the sum over chunks of dw in fp32.
Cost: beside dx and dw, memory for the logits of one chunk and their gradient.
Source: Wijmans et al. 2024, arXiv:2411.09009, and Hsu et al. 2024, arXiv:2410.10989, fuse further or the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.kernels.common import check_floats, check_shape
from megagpt.kernels.cross_entropy import check_loss, logits_gradient, row_losses, statistics


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, w_VD: Tensor, targets_R: Tensor, start: int, chunk: int, options: dict[str, Any]
    ) -> Tensor:
        columns = min(max(options["vocabulary"] - start, 0), w_VD.shape[0])
        total: list[Tensor] = []
        dx_RD = torch.empty_like(x_RD) if ctx.needs_input_grad[0] else None
        dw_VD = torch.zeros(w_VD.shape, dtype=torch.float32, device=w_VD.device) if ctx.needs_input_grad[1] else None
        for x_CD, targets_C, rows in zip(
            x_RD.split(chunk), targets_R.split(chunk), torch.arange(len(x_RD)).split(chunk), strict=True
        ):
            logits_CV = x_CD @ w_VD.T
            parts = statistics(logits_CV, targets_C, start, columns, options["smoothing"] > 0)
            with torch.enable_grad():
                leaves = [part.detach().requires_grad_() for part in parts]
                loss = row_losses((leaves[0], leaves[1], leaves[2]), targets_C, **options).sum()
            total.append(loss.detach())
            if dx_RD is None and dw_VD is None:
                continue
            dlse, dtarget, dtotal = torch.autograd.grad(loss, leaves, allow_unused=True)
            dlogits_CV = logits_gradient(dlse, dtarget, dtotal, logits_CV, targets_C, parts[0], start, columns)
            if dx_RD is not None:
                torch.mm(dlogits_CV, w_VD, out=dx_RD[rows[0] : rows[-1] + 1])
            if dw_VD is not None:
                dw_VD += dlogits_CV.T @ x_CD
        ctx.save_for_backward(dx_RD, None if dw_VD is None else dw_VD.to(w_VD.dtype))
        return torch.stack(total).sum()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        grads = [None if grad is None else grad * dloss.to(grad.dtype) for grad in ctx.saved_tensors]
        return *grads, None, None, None, None


def head_loss(
    x_RD: Tensor, w_VD: Tensor, targets_R: Tensor, *, vocabulary: int, start: int = 0, chunk: int = 2048,
    group: dist.ProcessGroup | None = None, smoothing: float = 0.0, z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """The sum (fp32) over rows of `cross_entropy(x @ w.T)`, with its arguments; `chunk` rows of logits exist at once.

    With a cut vocabulary, dx is of this rank's columns alone: the caller sums it over `group`, as for any matrix that
    is cut by columns. Raises ValueError as `cross_entropy` does, and for fp16, whose loss scale comes too late here.
    """
    check_floats(x=x_RD, w=w_VD)
    check_loss(vocabulary, start, smoothing, z_loss)
    if x_RD.dtype == torch.float16:
        raise ValueError("x is float16, but head_loss needs bfloat16 or wider: its gradients precede the loss scale.")
    if x_RD.dim() != 2 or w_VD.dim() != 2 or x_RD.shape[1] != w_VD.shape[1] or len(x_RD) == 0:
        raise ValueError(f"x and w have shapes {tuple(x_RD.shape)} and {tuple(w_VD.shape)}, not [R, D] and [V, D].")
    check_shape("targets", targets_R, x_RD.shape[:1])
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, but must be at least 1.")
    options = {"vocabulary": vocabulary, "group": group, "smoothing": smoothing, "z_loss": z_loss}
    out = _HeadLoss.apply(x_RD, w_VD, targets_R.contiguous(), start, chunk, options)
    assert isinstance(out, Tensor)
    return out
