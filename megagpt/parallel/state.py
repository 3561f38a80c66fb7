"""The optimizer's state and the gradients under any ZeRO stage and layout, by global name and without gathering.

Each rank holds, of every local parameter, one range of its elements in row-major order (possibly none):
    ZeRO 0       the whole, of which each data-parallel rank answers for an equal share
    ZeRO 1, 2    where the rank's flat fp32 partition meets the parameter (DeepSpeed's _hp_mapping)
    ZeRO 3       the rank's shard of the parameter
`place.Placed` says which boxes of the whole model's parameter such a range is. A `Slice` is one of these boxes, as
views into DeepSpeed's own tensors: writing into them is how a checkpoint is loaded. The slices that ranks own are,
over all ranks, every element of the model once: a sum over them counts tied and replicated parameters once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.checkpoint.boxes import Box
from megagpt.mesh import Mesh
from megagpt.parallel.place import Placed

SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


Gradient = tuple[str, Box, Tensor]
"""A parameter's global name, a box of it, and the gradient of that box."""


@dataclass(frozen=True)
class Slice:
    """One box of a whole parameter: its fp32 master and both moments, each of the box's size."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    box: Box
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def empty_slice(name: str, shape: tuple[int, ...], box: Box) -> Slice:
    """A box of a parameter on the CPU, to be filled."""
    return Slice(name, shape, box, *(torch.empty(box.size, dtype=torch.float32) for _ in range(3)))


@dataclass(frozen=True)
class Range:
    """Local elements [start, start + n) of a parameter, and tensors [n] that belong to them."""

    placed: Placed
    start: int
    tensors: tuple[Tensor, ...]

    def share(self, mesh: Mesh) -> Range:
        """The data-parallel rank's equal share of it."""
        count = self.tensors[0].numel()
        start, stop = (count * rank // mesh.data for rank in (mesh.data_rank, mesh.data_rank + 1))
        return Range(self.placed, self.start + start, tuple(tensor[start:stop] for tensor in self.tensors))


def create(engine: Any) -> None:
    """Give every master its moments now, as zeros, instead of at the first step or at DeepSpeed's step on nothing."""
    optimizer = adamw(engine)
    for master in _masters(engine):
        optimizer.state[master] = {
            "step": torch.zeros((), dtype=torch.float32, device=master.device),
            "exp_avg": torch.zeros_like(master.data),
            "exp_avg_sq": torch.zeros_like(master.data),
        }
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def held(engine: Any, placed: Sequence[Placed]) -> list[Slice]:
    """What this rank keeps of every parameter, in forward order: what a load must fill."""
    return [part for part, _ in _slices(_ranges(engine, placed))]


def owned(engine: Any, placed: Sequence[Placed], mesh: Mesh) -> list[Slice]:
    """What this rank saves: of what it holds, its share of whatever other ranks hold as well."""
    return [part for part, owned in _slices(ranges(engine, placed, mesh)) if owned]


def ranges(engine: Any, placed: Sequence[Placed], mesh: Mesh) -> Iterator[Range]:
    """The same as flat ranges of the local parameters, with padding and with what other ranks answer for as well."""
    found = _ranges(engine, placed)
    return (part.share(mesh) for part in found) if cut_like(engine) == 0 else found


def gradients(engine: Any, placed: Sequence[Placed], mesh: Mesh) -> list[Gradient]:
    """The reduced gradients of what this rank owns, times fp16's loss scale; from the last backward to the step."""
    found = []
    for parameter in placed:
        part = _gradient(engine, parameter)
        if part is None:
            continue
        if cut_like(engine) == 0:
            part = part.share(mesh)
        for piece in parameter.pieces_of(part.start, part.tensors[0].numel()):
            if piece.owned:
                found.append((parameter.name, piece.whole, piece.view(part.tensors[0])))
    return found


def counters(engine: Any) -> dict[str, Any]:
    """The steps that AdamW applied, and the dynamic loss scale of fp16."""
    scaler = _scaler(engine)
    steps = [int(values["step"]) for values in adamw(engine).state.values()]
    scale = {name: getattr(scaler, name) for name in SCALER_FIELDS if hasattr(scaler, name)}
    return {"optimizer_steps": max(steps, default=0), "loss_scaler": scale}


def restore(engine: Any, placed: Sequence[Placed], saved: dict[str, Any]) -> None:
    """Set the counters, and make the weights that the model computes with from the masters."""
    set_counters(engine, saved)
    _weights_from_masters(engine, placed)


def set_counters(engine: Any, saved: dict[str, Any]) -> None:
    """What `counters` gave."""
    for values in adamw(engine).state.values():
        values["step"].fill_(saved["optimizer_steps"])
    for name, value in saved["loss_scaler"].items():
        if hasattr(_scaler(engine), name):
            setattr(_scaler(engine), name, value)


def loss_scale(engine: Any) -> float:
    """fp16's loss scale, or 1."""
    return float(getattr(_scaler(engine), "cur_scale", 1.0)) if engine.fp16_enabled() else 1.0


def own_scale(engine: Any) -> float:
    """The loss scale that is ours to apply: with ZeRO 0 and fp16 DeepSpeed 0.19.8 divides the gradients by the scale
    without having multiplied the loss. With ZeRO 1-3 it does both.
    """
    return loss_scale(engine) if engine.zero_optimization_stage() == 0 else 1.0


def adamw(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def cut_like(engine: Any) -> int:
    """The ZeRO stage by which DeepSpeed has cut the state: 1 also for a bf16 pipeline with ZeRO 0."""
    return engine.zero_optimization_stage() or int(hasattr(engine.optimizer, "fp32_groups_flat_partition"))


def accumulated_gradient(engine: Any, parameter: Any) -> Tensor:
    """Where DeepSpeed adds up a parameter's gradient over the micro-batches of a pipeline."""
    if hasattr(parameter, "_hp_grad"):  # BF16_Optimizer
        return parameter._hp_grad
    if getattr(engine.optimizer, "use_grad_accum_attribute", False):
        return parameter.grad_accum
    return parameter.grad


def _slices(found: Iterator[Range]) -> Iterator[tuple[Slice, bool]]:
    for part in found:
        placed = part.placed
        for piece in placed.pieces_of(part.start, part.tensors[0].numel()):
            views = [piece.view(tensor) for tensor in part.tensors]
            yield Slice(placed.name, placed.shape, piece.whole, *views), piece.owned


def _ranges(engine: Any, placed: Sequence[Placed]) -> Iterator[Range]:
    """Master and moments of each parameter, as far as this rank has them."""
    find = {0: _whole, 1: _flat_partition, 2: _flat_partition, 3: _shard}[cut_like(engine)]
    found = (find(engine, parameter) for parameter in placed)
    return (part for part in found if part is not None)


def _scaler(engine: Any) -> Any:
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)


def _masters(engine: Any) -> Iterator[Tensor]:
    """The fp32 tensors that AdamW steps, on this rank."""
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            yield from getattr(optimizer, name)
            return
    for group in adamw(engine).param_groups:
        yield from group["params"]


def _whole(engine: Any, placed: Placed) -> Range:
    master = _whole_masters(engine).get(id(placed.parameter), placed.parameter)
    state = adamw(engine).state[master]
    views = tuple(tensor.data.view(-1) for tensor in (master, state["exp_avg"], state["exp_avg_sq"]))
    return Range(placed, 0, views)


def _whole_masters(engine: Any) -> dict[int, Tensor]:
    """Half precision with ZeRO 0: the fp32 copy of each parameter, by the parameter's id."""
    if not hasattr(engine.optimizer, "fp32_groups"):
        return {}
    groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {id(half): full for halves, fulls in groups for half, full in zip(halves, fulls, strict=True)}


def _flat_partition(_engine: Any, placed: Placed) -> Range | None:
    fragment = placed.parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
    if fragment is None:
        return None
    views = tuple(fragment.get_hp_fragment(key).detach().view(-1) for key in (None, "exp_avg", "exp_avg_sq"))
    return Range(placed, fragment.lp_fragment_address.start, views)


def _shard(engine: Any, placed: Placed) -> Range:
    group, offset, _ = engine.optimizer.grad_position[engine.optimizer.get_param_id(placed.parameter)]
    flat = engine.optimizer.fp32_partitioned_groups_flat[group]
    state = adamw(engine).state[flat]
    start, count = _shard_range(placed.parameter)
    tensors = (flat, state["exp_avg"], state["exp_avg_sq"])
    return Range(placed, start, tuple(tensor.data[offset : offset + count] for tensor in tensors))


def _shard_range(parameter: Any) -> tuple[int, int]:
    """First element and number of elements of this rank's shard; the last shard is padded."""
    start = parameter.partition_numel() * dist.get_rank(parameter.ds_process_group)
    return start, max(0, min(parameter.partition_numel(), parameter.ds_numel - start))


def _gradient(engine: Any, placed: Placed) -> Range | None:
    parameter: Any = placed.parameter
    stage = cut_like(engine)
    if stage == 0:
        return None if parameter.grad is None else Range(placed, 0, (parameter.grad.view(-1),))
    if stage == 3:
        start, count = _shard_range(parameter)
        gradient = engine.optimizer.get_local_fp32_grad_for_param(parameter)
        return Range(placed, start, (gradient.view(-1)[:count],))
    fragment = parameter._hp_mapping
    if fragment is None:
        return None
    address = fragment.lp_fragment_address
    gradient = fragment.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
    if gradient.numel() == parameter.numel():  # BF16_Optimizer keeps the whole gradient
        gradient = gradient[address.start : address.start + address.numel]
    return Range(placed, address.start, (gradient,))


def _weights_from_masters(engine: Any, placed: Sequence[Placed]) -> None:
    optimizer, stage = engine.optimizer, cut_like(engine)
    if stage == 3:
        optimizer._partition_all_parameters()  # else what is gathered of the weights before would stay
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif stage > 0:
        optimizer.update_lp_params()
    else:
        masters = _whole_masters(engine)
        for part in placed:
            if (master := masters.get(id(part.parameter))) is not None:
                part.parameter.data.copy_(master.data)
