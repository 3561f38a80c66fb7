"""What a run is going to do, in up to 15 lines, from its settings alone."""

from __future__ import annotations

from megagpt import ledger
from megagpt.config import Run, steps_of
from megagpt.report.text import count


def plan_rows(run: Run) -> list[tuple[str, str]]:
    """(name, value) rows for the console."""
    model, train, parallel, optim = run.model, run.train, run.parallel, run.optim
    parameters = ledger.parameters(model).total()
    flops = ledger.flops_per_token(model, train.recompute)
    kept = ledger.training_bytes(
        parameters, precision=train.precision, zero_stage=parallel.zero_stage, data=parallel.data
    )
    steps, context = steps_of(run), model.context
    accumulation = train.global_batch // (train.micro_batch * parallel.data)
    banded = f", every second layer banded to {model.window}" if model.window else ""
    ramp = f", from {train.ramp_start} over {count(train.ramp_tokens)} tokens" if train.ramp_start else ""
    end = train.tokens if optim.decay_tokens is None else optim.decay_tokens
    return [
        ("model", f"{count(parameters)} parameters: {model.layers} layers, {model.width} wide, {model.heads} heads"),
        (
            "",
            f"{model.norm}, {model.positions} positions, {model.feed_forward}{banded}, {model.vocabulary:,} tokens",
        ),
        ("data", ", ".join(f"{corpus} x {weight}" for corpus, weight in run.data.mixture.items())),
        (
            "batch",
            f"{train.global_batch} sequences of {context:,} = {count(train.global_batch * context)} tokens{ramp}",
        ),
        ("", f"micro-batch {train.micro_batch} x {accumulation} accumulated x {parallel.data} data-parallel"),
        ("length", f"{steps:,} steps of {count(train.tokens)} tokens in all"),
        ("rate", f"{optim.lr:g}, {optim.schedule} to {optim.lr_floor:g} x at {count(end)} tokens"),
        ("layout", f"data {parallel.data} x pipeline {parallel.pipeline} x tensor {parallel.tensor}"),
        ("", f"ZeRO {parallel.zero_stage}, {train.precision}, recompute {train.recompute}"),
        ("memory", f"{kept.total() / 2**30:,.2f} GiB a rank for weights and optimizer, activations not counted"),
        (
            "compute",
            f"{flops.useful():.3g} FLOP a token, {flops.useful() * steps * train.global_batch * context:.3g} at most",
        ),
    ]
