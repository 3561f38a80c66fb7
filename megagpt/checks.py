"""Every rule that a run must obey, tried before any rank starts; each refusal names the setting, its value, the rule
and what to do instead.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable

from megagpt.config import Data, Heal, Model, Optim, Parallel, Run, Train
from megagpt.errors import UserError


def checked(run: Run) -> Run:
    """`run` itself. Raises UserError at the first rule that it breaks."""
    _check_model(run.model)
    _check_train(run.train, run.parallel)
    _check_ramp(run.train, run.parallel)
    _check_optim(run.optim, run.train)
    _check_parallel(run.parallel, run.model)
    _check_data(run.data)
    _at_least("checkpoint.every", run.checkpoint.every, 0)
    _at_least("checkpoint.keep", run.checkpoint.keep, 1)
    _at_least("checkpoint.keep_every", run.checkpoint.keep_every, 0)
    _at_least("checkpoint.keep_best", run.checkpoint.keep_best, 0)
    _at_least("checkpoint.mtbf_hours", run.checkpoint.mtbf_hours, 0)
    _at_least("checkpoint.local_every", run.checkpoint.local_every, 1)
    _check_heal(run.heal)
    _at_least("report.every", run.report.every, 1)
    _at_least("report.samples", run.report.samples, 0)
    return run


def checked_layout(run: Run) -> Run:
    """`run` itself, if its model can be cut as it says, whatever else it lacks. Raises UserError if not."""
    _check_model(run.model)
    _check_train(run.train, run.parallel)
    _check_parallel(run.parallel, run.model)
    return run


def _check_model(model: Model) -> None:
    for name in ("layers", "width", "heads", "vocabulary", "context"):
        _at_least(f"model.{name}", getattr(model, name), 1)
    for name in ("kv_heads", "hidden", "window"):
        if getattr(model, name) is not None:
            _at_least(f"model.{name}", getattr(model, name), 1)
    if model.width % model.heads:
        raise UserError(
            f"model.width = {model.width:,} is not divisible by model.heads = {model.heads}.",
            f"Widths that are: {_multiples_near(model.width, model.heads)}; "
            f"heads that divide it: {_divisors_near(model.width, model.heads)}.",
        )
    if model.heads % model.key_value_heads():
        raise UserError(
            f"model.heads = {model.heads} is not divisible by model.kv_heads = {model.kv_heads}.",
            f"Nearest divisors: {_divisors_near(model.heads, model.key_value_heads())}.",
        )
    if model.positions == "rotary" and model.head_width() % 2:
        raise UserError(
            f"model.positions = rotary needs an even head width; model.width / model.heads is {model.head_width()}.",
            "Change model.heads or model.width, or use model.positions learned.",
        )
    _between("model.dropout", model.dropout, 0, 1)
    _positive("model.init_std", model.init_std)
    _positive("model.norm_eps", model.norm_eps)
    _positive("model.rotary_base", model.rotary_base)


def _check_train(train: Train, parallel: Parallel) -> None:
    for name in ("tokens", "global_batch", "micro_batch", "eval_sequences"):
        _at_least(f"train.{name}", getattr(train, name), 1)
    if train.steps is not None:
        _at_least("train.steps", train.steps, 1)
    _at_least("train.eval_every", train.eval_every, 0)
    _at_least("train.guard_every", train.guard_every, 0)
    group = train.micro_batch * parallel.data
    if group > 0 and train.global_batch % group:
        raise UserError(
            f"train.global_batch = {train.global_batch} is not a multiple of train.micro_batch x parallel.data = "
            f"{train.micro_batch} x {parallel.data} = {group}.",
            f"Nearest batches: {_multiples_near(train.global_batch, group)}; or change train.micro_batch.",
        )


def _check_ramp(train: Train, parallel: Parallel) -> None:
    if train.ramp_start is None:
        return
    group = train.micro_batch * parallel.data
    _at_least("train.ramp_start", train.ramp_start, 1)
    _at_least("train.ramp_increment", train.ramp_increment, 1)
    _at_least("train.ramp_tokens", train.ramp_tokens, 1)
    if train.ramp_start > train.global_batch or (train.global_batch - train.ramp_start) % train.ramp_increment:
        raise UserError(
            f"train.ramp_start = {train.ramp_start} does not reach train.global_batch = {train.global_batch} in whole "
            f"steps of train.ramp_increment = {train.ramp_increment}.",
            "Choose an increment that divides the difference.",
        )
    for name in ("ramp_start", "ramp_increment"):
        if (value := getattr(train, name)) % group:
            raise UserError(
                f"train.{name} = {value} is not a multiple of train.micro_batch x parallel.data = {group}.",
                f"Nearest: {_multiples_near(value, group)}; or lower train.micro_batch.",
            )


def _check_optim(optim: Optim, train: Train) -> None:
    _positive("optim.lr", optim.lr)
    _positive("optim.eps", optim.eps)
    _between("optim.beta1", optim.beta1, 0, 1)
    _between("optim.beta2", optim.beta2, 0, 1)
    for name in ("weight_decay", "clip_norm", "clip_value", "warmup_tokens"):
        _at_least(f"optim.{name}", getattr(optim, name), 0)
    for name in ("lr_floor", "wsd_decay"):
        if not 0 <= getattr(optim, name) <= 1:
            raise UserError(f"optim.{name} = {getattr(optim, name)} must be a share, from 0 to 1.")
    decay = train.tokens if optim.decay_tokens is None else optim.decay_tokens
    if optim.schedule != "constant" and optim.warmup_tokens >= decay:
        raise UserError(
            f"optim.warmup_tokens = {optim.warmup_tokens:,} leaves nothing to decay over: the schedule ends at "
            f"{decay:,} tokens.",
            "Lower optim.warmup_tokens, or raise train.tokens or optim.decay_tokens.",
        )


def _check_parallel(parallel: Parallel, model: Model) -> None:
    for name in ("data", "pipeline", "tensor"):
        _at_least(f"parallel.{name}", getattr(parallel, name), 1)
    if parallel.pipeline > 1 and parallel.zero_stage > 1:
        raise UserError(
            f"parallel.zero_stage = {parallel.zero_stage} does not work with parallel.pipeline = {parallel.pipeline}: "
            "a stage must keep its whole gradient until its last micro-batch.",
            "Use parallel.zero_stage 1, or parallel.pipeline 1.",
        )
    if parallel.pipeline > model.layers:
        raise UserError(
            f"parallel.pipeline = {parallel.pipeline} stages are more than model.layers = {model.layers}.",
            f"Use at most {model.layers}.",
        )
    if parallel.offload and (parallel.zero_stage == 0 or parallel.pipeline > 1):
        raise UserError(
            "parallel.offload needs optimizer state cut by ZeRO and a model of one stage: parallel.zero_stage is "
            f"{parallel.zero_stage} and parallel.pipeline {parallel.pipeline}.",
            "Use parallel.zero_stage 1, 2 or 3 with parallel.pipeline 1, or no parallel.offload.",
        )
    _check_tensor(parallel, model)


def _check_tensor(parallel: Parallel, model: Model) -> None:
    """What tensor ranks share must divide evenly; the vocabulary is padded, and key and value heads are repeated."""
    shared = {"model.heads": model.heads, "the feed-forward width": model.feed_forward_width()}
    if parallel.sequence_parallel:
        shared["model.context (with parallel.sequence_parallel)"] = model.context
    for name, size in shared.items():
        if size % parallel.tensor:
            raise UserError(
                f"{name} = {size:,} cannot be cut over parallel.tensor = {parallel.tensor} ranks.",
                f"Use parallel.tensor {_divisors_near(math.gcd(*shared.values()), parallel.tensor)}"
                f"{_or_layouts(parallel, model)}.",
            )


def _or_layouts(parallel: Parallel, model: Model) -> str:
    """The nearest ways to use as many ranks, in words that follow a first remedy."""
    near = nearest_layouts(parallel, model, parallel.world_size())
    return f", or of {parallel.world_size()} ranks data x pipeline x tensor = {' or '.join(near)}" if near else ""


def nearest_layouts(parallel: Parallel, model: Model, world: int) -> list[str]:
    """Up to three legal layouts of `world` ranks, as data x pipeline x tensor, the likest to `parallel` first."""
    found = []
    for tensor, pipeline in itertools.product(range(1, world + 1), repeat=2):
        if world % (tensor * pipeline):
            continue
        layout = dataclasses.replace(parallel, data=world // (tensor * pipeline), pipeline=pipeline, tensor=tensor)
        if pipeline <= model.layers and _cuts(layout, model) and not (pipeline > 1 and layout.zero_stage > 1):
            changes = [
                abs(math.log2(getattr(layout, axis) / getattr(parallel, axis)))
                for axis in ("tensor", "pipeline", "data")
            ]
            found.append((sum(changes), changes, f"{layout.data} x {pipeline} x {tensor}"))
    return [words for _, _, words in sorted(found)[:3]]


def _cuts(parallel: Parallel, model: Model) -> bool:
    sizes = [model.heads, model.feed_forward_width()] + ([model.context] if parallel.sequence_parallel else [])
    return all(size % parallel.tensor == 0 for size in sizes)


def check_world(run: Run, world: int) -> None:
    """Raise UserError, with the nearest layouts that fit, unless a launcher's number of ranks is the layout's."""
    parallel = run.parallel
    if world == parallel.world_size():
        return
    near = nearest_layouts(parallel, run.model, world)
    group = parallel.pipeline * parallel.tensor
    raise UserError(
        f"the launcher started {world:,} ranks, and parallel.data x pipeline x tensor = {parallel.data} x "
        f"{parallel.pipeline} x {parallel.tensor} = {parallel.world_size():,}.",
        f"Start a multiple of {group} ranks and set parallel.data to match"
        + (f"; {world:,} ranks fit {' or '.join(near)}." if near else "."),
    )


def costs_of(run: Run) -> list[str]:
    """What is legal but wastes something, and how much: a sentence each."""
    parallel, train = run.parallel, run.train
    found = []
    micro_batches = train.global_batch // (train.micro_batch * parallel.data)
    if micro_batches < parallel.pipeline:
        bubble = (parallel.pipeline - 1) / (micro_batches + parallel.pipeline - 1)
        found.append(
            f"a step has {micro_batches} micro-batches for parallel.pipeline = {parallel.pipeline} stages, which are "
            f"then idle {bubble:.0%} of the time; less with a lower train.micro_batch or a higher train.global_batch."
        )
    return found


def _check_heal(heal: Heal) -> None:
    for name in ("skip_budget", "spike_score", "rollbacks", "recompute_every", "hang_factor"):
        _at_least(f"heal.{name}", getattr(heal, name), 0)
    _at_least("heal.spike_steps", heal.spike_steps, 1)
    _at_least("heal.spike_window", heal.spike_window, 8)
    _at_least("heal.straggler", heal.straggler, 1)
    _positive("heal.hang_seconds", heal.hang_seconds)
    _positive("heal.slow_seconds", heal.slow_seconds)


def _check_data(data: Data) -> None:
    if not data.mixture:
        raise UserError(
            "data.mixture names no corpus.",
            "Build one with 'megagpt data build' and pass --data.mixture FOLDER WEIGHT.",
        )
    for corpus, weight in data.mixture.items():
        if weight < 1:
            raise UserError(
                f"data.mixture gives {corpus} the weight {weight}; weights are whole numbers from 1.",
                "Leave out a corpus that is not to be read.",
            )
    _at_least("data.prefetch", data.prefetch, 1)
    _positive("data.cache_gib", data.cache_gib)
    _at_least("data.patience", data.patience, 0)
    for name, value in (("data.max_epochs", data.max_epochs), ("data.window", data.window)):
        if value is not None:
            _at_least(name, value, 1)
    if data.window is not None and data.packing == "best_fit":
        raise UserError(
            'data.window needs data.packing = "chunk": best_fit puts documents of many shards into one sequence.',
            "Leave out data.window, or read chunks.",
        )


def _at_least(name: str, value: float, least: int) -> None:
    if value < least:
        raise UserError(f"{name} = {value} must be at least {least}.")


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{name} = {value} must be above 0.")


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value < high:
        raise UserError(f"{name} = {value} must be from {low} to below {high}.")


def _multiples_near(value: int, factor: int) -> str:
    below = value // factor * factor
    return _listed(number for number in (below, below + factor) if number > 0)


def _divisors_near(value: int, wanted: int) -> str:
    divisors = [number for number in range(1, value + 1) if value % number == 0]
    return _listed(sorted(sorted(divisors, key=lambda number: abs(number - wanted))[:2]))


def _listed(numbers: Iterable[int]) -> str:
    return " or ".join(f"{number:,}" for number in numbers)
