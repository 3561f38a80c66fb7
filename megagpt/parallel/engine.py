"""One face for both of DeepSpeed's engines: train on a step's micro-batches, evaluate, and reach the optimizer's state
by global name.

The loss is the mean over all unmasked target tokens of the global batch, however they fall on micro-batches and ranks:

    loss = sum over replicas and micro-batches of (sum of token losses)  /  (unmasked tokens of the global batch)

DeepSpeed averages gradients over the data-parallel ranks, so each micro-batch's sum is scaled by replicas / tokens.
The global norm of the gradient is summed over the elements that ranks own, each of them one element of the model; the
clipping by it happens inside AdamW, the same on every ZeRO stage and layout. A loss or gradient that is not finite on
any rank makes the norm such, on all of them and before the update: AdamW then takes no step.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagpt.checkpoint import proof
from megagpt.config import Optim, Run
from megagpt.data.batch import IGNORE, Batch
from megagpt.mesh import Groups, Mesh, groups_of
from megagpt.parallel import guard, ranks, state
from megagpt.parallel.pipeline import Pipeline, stage_bounds
from megagpt.parallel.place import Part, Placed, part_of, whole_shapes
from megagpt.parallel.stopwatch import Stopwatch
from megagpt.parallel.whole import Axes, Whole
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
    """The loss or a gradient was not a finite number, so weights and moments did not change."""
    seen_by: int | None
    """If skipped: the lowest rank whose own loss or gradients were not finite, if one's were not."""
    loss_scale: float
    """fp16's loss scale that the step used; 1 elsewhere."""
    next_loss_scale: float
    """The one that the next step will use."""


class Engine:
    """A GPT under DeepSpeed, on any layout."""

    def __init__(self, run: Run, mesh: Mesh) -> None:
        """Build this rank's part of the model of `run`, with the weights that its seed gives, and its optimizer."""
        ranks.import_deepspeed()
        self.mesh = mesh
        self.groups = groups_of(mesh)
        self.device = torch.device("cuda", torch.cuda.current_device()) if ranks.gpu_present() else torch.device("cpu")
        self._shapes = whole_shapes(run.model)
        self._tied = run.model.tied
        self._update = _Update(run.optim)
        config = deepspeed_config(run)
        self._part = part = _part(run, mesh, self.groups, config, self.device)
        self.placed = part.placed
        optimizer = _adamw(part.placed, run.optim, self._update)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints reports that nobody asked for
            if mesh.pipeline > 1:
                self._driver = Pipeline(part, run.model, mesh, self.groups, config=config, optimizer=optimizer)
            else:
                self._driver = Whole(part.gpt(), mesh, self.groups, config=config, optimizer=optimizer)
        self._engine: Any = self._driver.engine
        state.create(self._engine)
        self._stopwatch = Stopwatch(self._engine.module, self.device)
        self._before_update: Callable[[], None] = _nothing

    def train_batch(
        self,
        micro_batches: Sequence[Batch],
        *,
        lr: float,
        count: int | None = None,
        observe: Callable[[list[state.Gradient]], None] | None = None,
    ) -> Step:
        """One optimizer step on this replica's micro-batches, of which there is at least one. Every rank must call it.

        A rank for which `mesh.reads_data` is false passes none, and their number as `count`. `observe` gets the
        gradients that this rank answers for, before clipping.
        """
        return self._pass(micro_batches, lr=lr, count=count, take_step=True, observe=observe)

    def rehearse(
        self, micro_batches: Sequence[Batch], *, count: int | None, observe: Callable[[list[state.Gradient]], None]
    ) -> Step:
        """Compute a step as `train_batch` does, and take none: nothing that a later step depends on changes."""
        before = self.counters()
        done = self._pass(micro_batches, lr=0.0, count=count, take_step=False, observe=observe)
        state.set_counters(self._engine, before)
        return done

    def _pass(
        self,
        micro_batches: Sequence[Batch],
        *,
        lr: float,
        count: int | None,
        take_step: bool,
        observe: Callable[[list[state.Gradient]], None] | None,
    ) -> Step:
        batches = [batch.to(self.device) for batch in micro_batches]
        tokens = self._over_replicas(sum((_targets(batch) for batch in batches), self._zero()))
        for group in state.adamw(self._engine).param_groups:
            group["lr"] = lr
        loss_scale, own_scale = state.loss_scale(self._engine), state.own_scale(self._engine)
        loss_sum = self._driver.train(
            batches,
            count or len(batches),
            scale=own_scale * self.mesh.data / float(tokens),
            before_step=lambda own_loss: self._before_step(own_loss, loss_scale, take_step, observe),
        )
        return Step(
            loss=float(self._over_replicas(loss_sum) / tokens),
            grad_norm=self._update.norm,
            tokens=int(tokens),
            skipped=self._update.skipped,
            seen_by=self._update.seen_by,
            loss_scale=loss_scale,
            next_loss_scale=state.loss_scale(self._engine),
        )

    def eval_batch(self, batch: Batch) -> Tensor:
        """Sum of the losses (nats) of a micro-batch's unmasked tokens, the same on all ranks of the replica.

        Every rank must call it; only those for which `mesh.reads_data` is true read the batch.
        """
        loss = self._driver.evaluate([batch], 1).double()
        if self.mesh.pipeline > 1:
            dist.all_reduce(loss, group=self.groups.pipeline)  # 0 on all stages but the last
        return loss

    def check_agreement(self, micro_batches: Sequence[Batch]) -> None:
        """Raise UserError or RunFailure on every rank unless ranks that must read or hold the same do."""
        guard.check_batches(micro_batches, self.mesh, self.device)
        stage = self._engine.zero_optimization_stage()
        guard.check_weights(self.placed, self.mesh, self.groups, zero_stage=stage, tied=self._tied)

    def forward_seconds(self) -> float:
        """What this rank's layers took in the forward passes of training since the last call."""
        return self._stopwatch.seconds()

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules of this rank's stage by their names in the whole model, in forward order."""
        names = ["embedding", *(f"blocks.{layer}" for layer in range(len(self._part.layers) - 2)), "head"]
        for index in range(self._part.first, self._part.stop):
            yield from self._part.layers[index].named_modules(prefix=names[index])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the whole model's parameters, by global name, in forward order."""
        return self._shapes

    def held(self) -> list[state.Slice]:
        """The optimizer's state on this rank, as views by global name: writing into them is how a checkpoint loads."""
        return state.held(self._engine, self.placed)

    def owned(self) -> list[state.Slice]:
        """The part of it that this rank saves; all ranks' parts together are the whole, once."""
        return state.owned(self._engine, self.placed, self.mesh)

    def checksums(self, kinds: Sequence[str]) -> dict[tuple[str, str], int]:
        """(parameter, kind) -> the part of the state's checksum that is this rank's; checkpoint.proof defines it."""
        return proof.of_state(state.ranges(self._engine, self.placed, self.mesh), kinds)

    def before_next_update(self, wait: Callable[[], None]) -> None:
        """Have the next update of the state wait for `wait`, which is called on this rank when gradients are there."""
        self._before_update = wait

    def counters(self) -> dict[str, Any]:
        """What the optimizer knows beside tensors: applied steps and fp16's loss scale."""
        return state.counters(self._engine)

    def restored(self, counters: dict[str, Any]) -> None:
        """Take over `counters`, and the weights from the masters that were written into `held()`."""
        state.restore(self._engine, self.placed, counters)

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.device)

    def _over_replicas(self, value: Tensor) -> Tensor:
        """The sum over the replicas, on every rank; of each replica the rank that reports has the value."""
        value = value.double() if self.mesh.reports else self._zero()
        dist.all_reduce(value)
        return value

    def _before_step(
        self,
        own_loss: Tensor,
        loss_scale: float,
        take_step: bool,
        observe: Callable[[list[state.Gradient]], None] | None,
    ) -> None:
        """With the gradients complete, and before DeepSpeed uses them: their global norm, and what AdamW is to do."""
        self._before_update()
        self._before_update = _nothing
        found = state.gradients(self._engine, self.placed, self.mesh)
        if observe is not None:
            observe([(name, box, gradient / loss_scale) for name, box, gradient in found])
        own = [gradient for _, _, gradient in found]
        dtype = own[0].dtype if own else torch.float32
        norm = self.global_norm([*own, (0 * own_loss).to(dtype)]) / loss_scale  # of a finite loss 0, else not a number
        self._update.prepare(norm, take_step=take_step)
        if self._update.skipped:
            finite = all(bool(value.isfinite().all()) for value in (own_loss, *own))
            lowest = ranks.lowest_over_ranks(self.mesh.world_size if finite else self.mesh.rank)
            self._update.seen_by = lowest if lowest < self.mesh.world_size else None

    def global_norm(self, gradients: Sequence[Tensor]) -> float:
        """The norm of all ranks' tensors together, each of which is a part of the model that no other rank has."""
        total = self._zero()
        if gradients:
            norms = torch._foreach_norm(list(gradients), dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
            total = torch.stack(norms).double().square().sum().to(self.device)
        dist.all_reduce(total)
        return float(total.sqrt())


class _Update:
    """What AdamW is to do with the gradients that it gets: clip them by the global norm and by value, or nothing."""

    def __init__(self, optim: Optim) -> None:
        self._largest_norm, self._largest_value = optim.clip_norm, optim.clip_value
        self.norm, self._factor = 0.0, 1.0
        self.seen_by: int | None = None
        self.skipped, self.applies = False, True

    def prepare(self, norm: float, *, take_step: bool) -> None:
        """The next step's gradients have this norm; AdamW takes no step if it is not finite, or not `take_step`."""
        self.norm, self._factor, self.seen_by = norm, 1.0, None
        self.skipped = not math.isfinite(norm)
        self.applies = take_step and not self.skipped
        if 0 < self._largest_norm < norm:
            self._factor = self._largest_norm / (norm + 1e-6)

    def clip(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self._factor < 1 and gradients:
            torch._foreach_mul_(gradients, self._factor)  # pyright: ignore[reportPrivateImportUsage]
        if self._largest_value > 0:
            for gradient in gradients:
                gradient.clamp_(-self._largest_value, self._largest_value)


class _AdamW(torch.optim.AdamW):
    """AdamW that clips first, and takes no step where `update` says so: all of DeepSpeed's optimizers end here."""

    def __init__(self, groups: Any, update: _Update, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self._update = update

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if not self._update.applies:
            return None
        self._update.clip(self)
        return super().step(closure)


def _nothing() -> None:
    """What an update waits for if nobody reads the state."""


def _targets(batch: Batch) -> Tensor:
    return (batch.targets_BT != IGNORE).sum().double()


def _part(run: Run, mesh: Mesh, groups: Groups, config: dict[str, Any], device: torch.device) -> Part:
    """The rank's part of the model; under ZeRO 3 no rank ever holds more than one layer of it whole."""
    dtype = DTYPES[run.train.precision]

    def make(value: Tensor) -> nn.Parameter:
        parameter = nn.Parameter(value.to(device=device, dtype=dtype))
        # DeepSpeed's own norm, which nothing uses, leaves others out, and BF16_Optimizer fails where none is left.
        parameter.model_parallel = True  # pyright: ignore[reportAttributeAccessIssue]
        return parameter

    def finish(layer: nn.Module) -> None:
        if run.parallel.zero_stage == 3:  # a dtype argument would turn fp32 into bf16 on a CPU
            init = ranks.import_deepspeed().zero.Init
            init(module=layer, config_dict_or_path=config, data_parallel_group=groups.data, mpu=Axes(mesh, groups))

    return part_of(run, mesh, groups, bounds=stage_bounds(run.model, mesh.pipeline), make=make, finish=finish)


def _adamw(placed: Sequence[Placed], optim: Optim, update: _Update) -> torch.optim.AdamW:
    """AdamW with decay on matrices and embeddings alone. Its rate is set at every step; 0 here, since DeepSpeed steps
    some optimizers once, on zero gradients, to make their state.
    """
    decayed = [part.parameter for part in placed if len(part.shape) > 1]
    others = [part.parameter for part in placed if len(part.shape) <= 1]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return _AdamW(
        [group for group in groups if group["params"]],
        update,
        lr=0.0,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
