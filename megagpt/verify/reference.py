"""The truth that layouts are compared with: the same three steps in fp64, one process, plain torch, no DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megagpt.config import Run
from megagpt.data.batch import IGNORE
from megagpt.model import GPT, build
from megagpt.verify import task

WATCHED = (
    "embedding.token", "embedding.position", "embedding", "attention_norm", "attention.query_key_value",
    "attention.output", "feed_forward_norm", "feed_forward.up", "feed_forward.gate_up",
    "feed_forward.down", "feed_forward_dropout", "head.norm", "head.output",
)  # fmt: skip
"""Modules whose outputs are compared, by the ends of their names, in forward order within a layer."""


@dataclass
class Outcome:
    """What three steps gave."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    activations: dict[str, Tensor] = field(default_factory=dict)
    """Of the first step: the output of each watched module, by its name, in the order in which they were computed."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of the first step, before clipping, by global name in forward order; and so on."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    exp_avg: dict[str, Tensor] = field(default_factory=dict)
    exp_avg_sq: dict[str, Tensor] = field(default_factory=dict)


def watch(name: str, module: nn.Module, found: dict[str, Tensor]) -> Any:
    """Keep the module's first output in `found`; returns the hook's handle."""

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        found.setdefault(name, value.detach().clone())

    return module.register_forward_hook(keep)


def watched(name: str) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in WATCHED)


def compute(run: Run, *, dtype: torch.dtype = torch.float64) -> Outcome:
    """Three steps of `run`'s model on whole batches."""
    gpt = build(run.model, seed=run.seed)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            parameter.copy_(task.weight(name, parameter.shape, run.seed))
    gpt = gpt.to(dtype).train()
    adamw = _adamw(gpt, run)
    outcome = Outcome()
    hooks = [watch(name, module, outcome.activations) for name, module in gpt.named_modules() if watched(name)]
    for step in range(task.STEPS):
        batch = task.rows(run, step, 0, task.ROWS)
        loss = gpt(batch) / (batch.targets_BT != IGNORE).sum()
        loss.backward()
        if step == 0:
            outcome.gradients = {name: _gradient(parameter) for name, parameter in gpt.named_parameters()}
            for hook in hooks:
                hook.remove()
        outcome.losses.append(loss.item())
        outcome.norms.append(float(torch.nn.utils.clip_grad_norm_(gpt.parameters(), run.optim.clip_norm)))
        adamw.step()
        adamw.zero_grad()
    for name, parameter in gpt.named_parameters():
        outcome.weights[name] = parameter.detach()
        outcome.exp_avg[name] = adamw.state[parameter]["exp_avg"]
        outcome.exp_avg_sq[name] = adamw.state[parameter]["exp_avg_sq"]
    return outcome


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.clone()


def _adamw(gpt: GPT, run: Run) -> torch.optim.AdamW:
    decayed = [parameter for parameter in gpt.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in gpt.parameters() if parameter.dim() <= 1]
    make = partial(torch.optim.AdamW, lr=run.optim.lr, betas=(run.optim.beta1, run.optim.beta2), eps=run.optim.eps)
    return make([{"params": decayed, "weight_decay": run.optim.weight_decay}, {"params": others, "weight_decay": 0.0}])
