"""What every layout computes in `megagpt verify`: a shrunk model, its weights, and three batches, all by formula.

The model has the preset's structure in every choice; only sizes shrink. Weights are not the initial ones, where biases
are 0 and norms 1 and a fault in them would not show: all are drawn, by name. Rows have unequal numbers of targets, and
documents where the preset keeps attention inside them. Adam's eps is large, since with the usual one the update of a
weight whose gradient is rounding noise is noise of full size, on any layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from megagpt.config import Model, Optim, Run, Train
from megagpt.data.batch import IGNORE, Batch
from megagpt.philox import key_of
from megagpt.verify.layouts import Layout

STEPS = 3
ROWS = 24
LAYERS, HEADS, VOCABULARY, CONTEXT, WINDOW = 4, 8, 101, 16, 6
OPTIM = Optim(lr=1e-2, eps=1e-2, clip_norm=0.5, weight_decay=0.1)


def shrunk(model: Model) -> Model:
    """A model of the same structure: the same choices, the same ratio of query to key and value heads, small sizes.

    Dropout is on where the preset has it off, since masks are part of what layouts must agree on.
    """
    head_width = 4
    width = HEADS * head_width
    return dataclasses.replace(
        model,
        layers=LAYERS,
        width=width,
        heads=HEADS,
        kv_heads=max(1, HEADS * model.key_value_heads() // model.heads),
        hidden=2 * width,
        vocabulary=VOCABULARY,
        context=CONTEXT,
        window=None if model.window is None else WINDOW,
        dropout=model.dropout or 0.1,
        kernels="torch",
    )


def run_of(preset: Run, layout: Layout) -> Run:
    """The preset's shrunk run on this layout, in fp32. Raises UserError if the layout is illegal."""
    return dataclasses.replace(
        preset,
        model=shrunk(preset.model),
        parallel=layout.parallel(),
        optim=OPTIM,
        train=Train(
            global_batch=ROWS,
            micro_batch=max(1, ROWS // (layout.data * layout.accumulation)),
            precision="fp32",
            recompute=preset.train.recompute,
        ),
    )


def weight(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """fp32: what the parameter with this global name starts from."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(key_of(seed, "verify", name)))
    if name.endswith("norm.weight"):
        return 1 + 0.2 * drawn
    return 0.1 * drawn if name.endswith("bias") or "norm" in name else 0.15 * drawn


def rows(run: Run, step: int, first: int, count: int) -> Batch:
    """Rows [first, first + count) of a step's global batch."""
    model = run.model
    generator = torch.Generator().manual_seed(key_of(run.seed, "verify", "tokens", step))
    tokens = torch.randint(0, model.vocabulary, (ROWS, model.context + 1), generator=generator)
    seams = torch.randint(1, model.context, (ROWS,), generator=generator)
    targets = tokens[:, 1:].clone()
    for row in range(ROWS):
        targets[row, : row % (model.context - 1)] = IGNORE
    part = slice(first, first + count)
    return Batch(
        tokens_BT=tokens[part, :-1].contiguous(),
        targets_BT=targets[part],
        cu_seqlens_S=_documents(seams[part], model.context) if run.data.document_mask else None,
        samples_B=torch.arange(step * ROWS + first, step * ROWS + first + count),
    )


def _documents(seams_B: Tensor, T: int) -> Tensor:
    """Two documents a row, the second from its seam on."""
    B = len(seams_B)
    cu_seqlens = torch.full((B * T + 1,), B * T, dtype=torch.int32)
    starts = torch.stack([torch.arange(B) * T, torch.arange(B) * T + seams_B], dim=1).flatten()
    cu_seqlens[: 2 * B] = starts.to(torch.int32)
    return cu_seqlens
