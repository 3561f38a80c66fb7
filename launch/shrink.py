"""A run made small enough to rehearse, and still itself: the same kinds of everything, the same axes cut."""

from __future__ import annotations

import dataclasses

from megagpt.config import Run

HEAD_WIDTH, CONTEXT, VOCABULARY = 16, 32, 1024
ROWS, MICRO_BATCH = 4, 2


def shrink(run: Run, *, steps: int, every: int) -> Run:
    """A run of `steps` steps that saves after each `every`, on at most two ranks an axis.

    What is kept is every choice that decides which code runs: kinds of norm, positions and feed-forward, banded and
    grouped attention, precision, ZeRO stage, schedule, packing. The data is for the caller to replace.
    """
    tensor, pipeline = min(2, run.parallel.tensor), min(2, run.parallel.pipeline)
    data = 1 if tensor * pipeline > 1 else 2
    heads = 2 * tensor
    grouped = run.model.kv_heads is not None and run.model.kv_heads < run.model.heads
    model = dataclasses.replace(
        run.model,
        layers=2 * pipeline,
        width=HEAD_WIDTH * heads,
        heads=heads,
        kv_heads=tensor if grouped else None,
        hidden=None,
        vocabulary=VOCABULARY,
        context=CONTEXT,
        window=None if run.model.window is None else CONTEXT // 4,
    )
    train = dataclasses.replace(
        run.train,
        tokens=steps * ROWS * CONTEXT,
        steps=steps,
        global_batch=ROWS,
        micro_batch=MICRO_BATCH,
        eval_every=0,
        eval_sequences=4,
        ramp_start=None,
    )
    return dataclasses.replace(
        run,
        model=model,
        train=train,
        parallel=dataclasses.replace(run.parallel, data=data, pipeline=pipeline, tensor=tensor),
        optim=dataclasses.replace(run.optim, warmup_tokens=ROWS * CONTEXT),
        checkpoint=dataclasses.replace(run.checkpoint, every=every, keep=3),
        heal=dataclasses.replace(run.heal, hang_seconds=3.0),
        report=dataclasses.replace(run.report, every=10, samples=0),
    )
