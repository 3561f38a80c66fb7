"""What the loader yields and the model reads: one micro-batch.

Letters: B rows (sequences) of the micro-batch, T tokens a row, S static length of cu_seqlens (B * T + 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100  # a target that no loss counts: torch's own default


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    tokens_BT    int64
    targets_BT   int64, the token after each; IGNORE where there is none to predict
    cu_seqlens_S int32, ascending: where documents begin in the flattened B * T tokens, every row's first token
                 included, padded with B * T; None when data.document_mask is off
    samples_B    int64, each row's number in the run's stream (held-out rows are numbered from 0)
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    cu_seqlens_S: Tensor | None
    samples_B: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; asynchronous from pinned memory."""
        return Batch(
            tokens_BT=self.tokens_BT.to(device, non_blocking=True),
            targets_BT=self.targets_BT.to(device, non_blocking=True),
            cu_seqlens_S=None if self.cu_seqlens_S is None else self.cu_seqlens_S.to(device, non_blocking=True),
            samples_B=self.samples_B.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, for asynchronous copies to a GPU."""
        return Batch(
            tokens_BT=self.tokens_BT.pin_memory(),
            targets_BT=self.targets_BT.pin_memory(),
            cu_seqlens_S=None if self.cu_seqlens_S is None else self.cu_seqlens_S.pin_memory(),
            samples_B=self.samples_B.pin_memory(),
        )


def document_starts(cu_seqlens_S: Tensor, B: int, T: int) -> Tensor:
    """Where each token's document begins, as an index within its own row: int32 [B, T], on cu_seqlens_S's device."""
    flat = torch.arange(B * T, dtype=cu_seqlens_S.dtype, device=cu_seqlens_S.device)
    document = torch.searchsorted(cu_seqlens_S, flat, right=True) - 1
    rows_B1 = torch.arange(0, B * T, T, dtype=torch.int32, device=cu_seqlens_S.device).unsqueeze(1)
    return cu_seqlens_S[document].view(B, T) - rows_B1


def document_lengths(batches: Sequence[Batch]) -> list[int] | None:
    """Tokens of each document, or part of one, in some batches; None where attention does not heed documents."""
    boundaries = [batch.cu_seqlens_S for batch in batches if batch.cu_seqlens_S is not None]
    return [length for ends in boundaries for length in ends.diff().tolist() if length] or None
