"""One face for DeepSpeed: train on a step's micro-batches, evaluate, and reach the optimizer's state by global name.

The loss is the mean over all unmasked target tokens of the global batch, however they fall on micro-batches and ranks:

    loss = sum over ranks and micro-batches of (sum of token losses)  /  (unmasked tokens of the global batch)

DeepSpeed averages gradients over the data-parallel ranks, so each micro-batch's sum is scaled by ranks / tokens.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagpt.config import Optim, Run
from megagpt.data.batch import IGNORE, Batch
from megagpt.mesh import Mesh
from megagpt.model import GPT, build, initial_value, initialise
from megagpt.parallel import ranks, state
from megagpt.parallel.zero import deepspeed_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one optimizer step did, the same on every rank."""

    loss: float
    """Mean over the global batch's unmasked tokens, in nats."""
    grad_norm: float
    """Global norm of the mean gradient, before clipping."""
    tokens: int
    """Unmasked target tokens of the global batch."""
    skipped: bool
    """fp16: the gradients overflowed, so the weights did not change."""
    loss_scale: float
    """fp16's loss scale that the step used; 1 elsewhere."""


class Engine:
    """A GPT under DeepSpeed's ZeRO 0-3."""

    def __init__(self, run: Run, mesh: Mesh) -> None:
        """Build the model of `run` on this rank, with the weights that its seed gives, and its optimizer."""
        deepspeed = ranks.import_deepspeed()
        self.mesh = mesh
        self.device = torch.device("cuda", torch.cuda.current_device()) if ranks.gpu_present() else torch.device("cpu")
        config = deepspeed_config(run)
        gpt = _build(run, config, self.device)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints memory reports that nobody asked for
            self._engine, _, _, _ = deepspeed.initialize(
                model=gpt, optimizer=_adamw(gpt, run.optim), config=config, dist_init_required=False
            )
        self._clip_norm = run.optim.clip_norm
        self._half = run.train.precision != "fp32"
        state.create(self._engine)

    @property
    def module(self) -> GPT:
        return self._engine.module

    def train_batch(self, micro_batches: Sequence[Batch], *, lr: float) -> Step:
        """One optimizer step on this rank's micro-batches, of which there is at least one. Every rank must call it."""
        batches = [batch.to(self.device) for batch in micro_batches]
        counts = torch.stack([(batch.targets_BT != IGNORE).sum() for batch in batches])
        tokens = self._sum_over_ranks(counts.sum())
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        loss_scale, own_scale = state.loss_scale(self._engine), state.own_scale(self._engine)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._engine.train()
        for index, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            loss = self._engine(batch)
            self._engine.backward(loss * (own_scale * self.mesh.data / tokens), scale_wrt_gas=False)
            loss_sum += loss.detach().double()
            if index < len(batches) - 1:
                self._engine.step()
        grad_norm = self._fp32_grad_norm()
        self._engine.step()
        if grad_norm is None:
            grad_norm = float(self._engine.get_global_grad_norm()) / own_scale
        total = self._sum_over_ranks(loss_sum)
        return Step(
            loss=float(total / tokens),
            grad_norm=grad_norm,
            tokens=int(tokens),
            skipped=self._engine.fp16_enabled() and bool(self._engine.optimizer.overflow),
            loss_scale=loss_scale,
        )

    @torch.no_grad()
    def eval_batch(self, batch: Batch) -> Tensor:
        """Sum of the losses (nats) of a micro-batch's unmasked tokens, on this rank. Every rank must call it."""
        self._engine.eval()
        return self._engine(batch.to(self.device))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the whole model's parameters, by global name, in forward order."""
        return {name: tuple(_shape(parameter)) for name, parameter in self.module.named_parameters()}

    def held(self) -> list[state.Slice]:
        """The optimizer's state on this rank, as views by global name: writing into them is how a checkpoint loads."""
        return state.held(self._engine)

    def owned(self) -> list[state.Slice]:
        """The part of it that this rank saves; all ranks' parts together are the whole, once."""
        return state.owned(self._engine, self.mesh)

    def counters(self) -> dict[str, Any]:
        """What the optimizer knows beside tensors: applied steps and fp16's loss scale."""
        return state.counters(self._engine)

    def restored(self, counters: dict[str, Any]) -> None:
        """Take over `counters`, and the weights from the masters that were written into `held()`."""
        state.restore(self._engine, counters)

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    def _fp32_grad_norm(self) -> float | None:
        """The global norm where DeepSpeed does not tell it: ZeRO 0 in fp32 keeps whole, reduced gradients."""
        if self._half or self._engine.zero_optimization_stage() > 0:
            return None
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))


def _build(run: Run, config: dict[str, Any], device: torch.device) -> GPT:
    """The GPT with the weights of the run's seed; under ZeRO 3 no rank ever holds the whole of it."""
    if run.parallel.zero_stage < 3:
        gpt = build(run.model, seed=run.seed, recompute=run.train.recompute)
        initialise(gpt, run.model, seed=run.seed)
        return gpt.to(device=device, dtype=DTYPES[run.train.precision])
    deepspeed = ranks.import_deepspeed()
    with deepspeed.zero.Init(config_dict_or_path=config):  # its dtype argument turns fp32 into bf16 on a CPU
        gpt = build(run.model, seed=run.seed, recompute=run.train.recompute)
    for name, parameter in gpt.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.data.copy_(initial_value(name, _shape(parameter), run.model, seed=run.seed))
    return gpt


def _adamw(gpt: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW with decay on matrices and embeddings alone. Its rate is set at every step; 0 here, since DeepSpeed steps
    some optimizers once, on zero gradients, to make their state.
    """
    decayed = [p for p in gpt.parameters() if len(_shape(p)) > 1]
    others = [p for p in gpt.parameters() if len(_shape(p)) <= 1]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=0.0,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
    if optim.clip_value > 0:
        adamw.register_step_pre_hook(lambda optimizer, *_: _clip_values(optimizer, optim.clip_value))
    return adamw


def _clip_values(optimizer: torch.optim.Optimizer, limit: float) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.clamp_(-limit, limit)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
