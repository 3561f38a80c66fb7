"""Pipeline parallelism: stages of the list of layers under DeepSpeed's PipelineModule, one forward, one backward.

    stage 0     embedding, blocks ...      reads tokens and sample numbers
    stage s     blocks ...                 receives and sends x_BTD, sample numbers and document starts
    last stage  blocks ..., head           reads targets, and computes the loss

A stage is one module to DeepSpeed; which layers it has is ours (`stage_bounds`). A tied embedding has a copy on the
first and on the last stage, whose gradients are added before the update: both copies then take the same step.
(Huang et al. 2019, arXiv:1811.06965; Narayanan et al. 2021, arXiv:2104.04473, section 2.2.)

Letters: B batch, T tokens, D width, R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagpt.config import Model
from megagpt.data.batch import Batch, document_starts
from megagpt.ledger import layer_flops, layer_parameters
from megagpt.mesh import Groups, Mesh
from megagpt.model import Head
from megagpt.parallel import state
from megagpt.parallel.place import Part


def stage_bounds(model: Model, stages: int) -> list[int]:
    """Of the layers [embedding, *blocks, head], stage s has [bounds[s], bounds[s + 1]), at least one.

    Of all contiguous cuts this has the smallest largest stage, in FLOPs and then in parameters; found exactly, by
    dynamic programming over the layers. Raises ValueError if there are more stages than layers.
    """
    costs = list(zip(layer_flops(model), layer_parameters(model), strict=True))
    if stages > len(costs):
        raise ValueError(f"{len(costs)} layers cannot make {stages} stages")
    sums = [(0.0, 0)]
    for flops, parameters in costs:
        sums.append((sums[-1][0] + flops, sums[-1][1] + parameters))

    def cost(first: int, stop: int) -> tuple[float, int]:
        return sums[stop][0] - sums[first][0], sums[stop][1] - sums[first][1]

    best: dict[int, tuple[tuple[float, int], list[int]]] = {0: ((0.0, 0), [0])}
    for stage in range(1, stages + 1):
        reached: dict[int, tuple[tuple[float, int], list[int]]] = {}
        for stop in range(stage, len(costs) - (stages - stage) + 1):
            choices = []
            for first, (largest, bounds) in best.items():
                if first < stop:
                    flops, parameters = cost(first, stop)
                    choices.append(((max(largest[0], flops), max(largest[1], parameters)), [*bounds, stop]))
            reached[stop] = min(choices)
        best = reached
    return best[len(costs)][1]


class Stage(nn.Module):
    """A run of layers, between tuples of tensors: (tokens or x, [document starts,] sample numbers)."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, carry: tuple[Tensor, ...]) -> tuple[Tensor, ...] | Tensor:
        """The next stage's carry, or of the last stage the logits, with padding."""
        inner: Any = (carry[0], carry[1] if len(carry) == 3 else None, carry[-1])
        for layer in self.layers:
            if isinstance(layer, Head):
                return layer.output(layer.norm(inner[0]))
            inner = layer(inner)
        return tuple(tensor for tensor in inner if tensor is not None)


class Pipeline:
    """A model in stages, as one rank drives its own."""

    def __init__(
        self, part: Part, model: Model, mesh: Mesh, groups: Groups, *, config: dict[str, Any], optimizer: Any
    ) -> None:
        import deepspeed
        from deepspeed.pipe import PipelineModule
        from deepspeed.runtime.pipe.schedule import OptimizerStep, ReduceTiedGrads
        from deepspeed.runtime.pipe.topology import ProcessTopology

        self._mesh, self._ends = mesh, groups.ends
        self._head = cast(Head, part.layers[-1])
        found = [item for item in part.placed if item.name == "embedding.token.weight"]
        self._tied = found[0].parameter if model.tied and found else None
        self._scale = 0.0
        self._losses: list[Tensor] = []
        self._before_step: Callable[[Tensor], None] | None = None
        own = Stage(part.layers[part.first : part.stop])
        stages = [own if stage == mesh.pipeline_rank else nn.Identity() for stage in range(mesh.pipeline)]
        topology = ProcessTopology(axes=["data", "pipe", "model"], dims=[mesh.data, mesh.pipeline, mesh.tensor])
        module = PipelineModule(stages, topology=topology, loss_fn=self._loss, partition_method="uniform")
        made = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
        self.engine: Any = made[0]
        self.engine._INSTRUCTION_MAP = {
            **self.engine._INSTRUCTION_MAP,
            ReduceTiedGrads: self._add_tied_gradients,
            OptimizerStep: self._optimizer_step,
        }

    def train(
        self, batches: Sequence[Batch], count: int, *, scale: float, before_step: Callable[[Tensor], None]
    ) -> Tensor:
        """Forward, backward and update on `count` micro-batches, whose summed losses count times `scale`.

        `batches` are needed on the first and last stage only. Returns the sum of losses, fp64, on the last stage; 0 on
        the others.
        """
        engine = self.engine
        if engine.micro_batches != count:
            engine.set_train_batch_size(count * engine.train_micro_batch_size_per_gpu() * self._mesh.data)
        # DeepSpeed takes the mean over micro-batches, and the losses are to be summed.
        self._scale, self._before_step, self._losses = scale * count, before_step, []
        engine.train_batch(self._feed(batches))
        return self._loss_sum()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], count: int) -> Tensor:
        """The sum of the losses of `count` micro-batches, fp64, on the last stage; 0 on the others."""
        self._scale, self._losses = 1.0, []
        self.engine.eval_batch(self._feed(batches), num_micro_batches=count, bcast_loss=False)
        return self._loss_sum()

    def _feed(self, batches: Sequence[Batch]) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        for host in batches:
            batch = host.to(self.engine.device)
            inputs: tuple[Tensor, ...] = (batch.tokens_BT, batch.samples_B)
            if batch.cu_seqlens_S is not None:
                start_BT = document_starts(batch.cu_seqlens_S, *batch.tokens_BT.shape)
                inputs = (batch.tokens_BT, start_BT, batch.samples_B)
            yield inputs, batch.targets_BT

    def _loss(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        loss = self._head.ops.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), vocabulary=self._head.vocabulary
        ).sum()
        self._losses.append(loss.detach().double())
        return loss * self._scale

    def _loss_sum(self) -> Tensor:
        zero = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        return torch.stack(self._losses).sum() if self._losses else zero

    def _add_tied_gradients(self, _engine: Any) -> None:
        if self._tied is not None:
            dist.all_reduce(state.accumulated_gradient(self.engine, self._tied), group=self._ends)

    def _optimizer_step(self, engine: Any, lr_kwargs: dict[str, Any] | None = None) -> None:
        assert self._before_step is not None
        self._before_step(self._loss_sum())
        engine._exec_optimizer_step(lr_kwargs)
