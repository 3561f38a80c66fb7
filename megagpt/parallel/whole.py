"""A model of one stage under DeepSpeed's engine, with ZeRO 0 to 3 over the data axis and tensor parallelism inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megagpt.data.batch import Batch
from megagpt.mesh import Groups, Mesh, lines
from megagpt.model import GPT


class Axes:
    """The grid in the words that DeepSpeed asks for (its `mpu`)."""

    def __init__(self, mesh: Mesh, groups: Groups) -> None:
        self._mesh, self._groups = mesh, groups

    def get_data_parallel_rank(self) -> int:
        return self._mesh.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.data

    def get_data_parallel_group(self) -> Any:
        return self._groups.data

    def get_data_parallel_group_ranks(self) -> list[int]:
        return next(ranks for ranks in lines(self._mesh, "data") if self._mesh.rank in ranks)

    def get_model_parallel_rank(self) -> int:
        return self._mesh.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.tensor

    def get_model_parallel_group(self) -> Any:
        return self._groups.tensor

    def get_tensor_model_parallel_rank(self) -> int:
        return self._mesh.tensor_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._mesh.tensor

    def get_tensor_model_parallel_group(self) -> Any:
        return self._groups.tensor


class Whole:
    """A model of one stage, as one rank drives it."""

    def __init__(self, gpt: GPT, mesh: Mesh, groups: Groups, *, config: dict[str, Any], optimizer: Any) -> None:
        import deepspeed

        made = deepspeed.initialize(
            model=gpt, optimizer=optimizer, config=config, mpu=Axes(mesh, groups), dist_init_required=False
        )
        self.engine: Any = made[0]

    def train(
        self, batches: Sequence[Batch], count: int, *, scale: float, before_step: Callable[[Tensor], None]
    ) -> Tensor:
        """Forward, backward and update on the micro-batches, whose summed losses count times `scale`.

        Returns the sum of losses, fp64.
        """
        assert count == len(batches)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        self.engine.train()
        for index, batch in enumerate(batches):
            last = index == count - 1
            self.engine.set_gradient_accumulation_boundary(last)
            loss = self.engine(batch)
            self.engine.backward(loss * scale, scale_wrt_gas=False)
            loss_sum += loss.detach().double()
            if last:
                before_step(loss_sum)
            self.engine.step()
        return loss_sum

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], count: int) -> Tensor:
        """The sum of the losses of the micro-batches, fp64."""
        assert count == len(batches)
        self.engine.eval()
        losses = [self.engine(batch.to(self.engine.device)).double() for batch in batches]
        return torch.stack(losses).sum()
