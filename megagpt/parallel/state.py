"""The optimizer's state under any ZeRO stage, by global name and without gathering.

Each rank holds, of every parameter, one range of its elements in row-major order (possibly none):
    ZeRO 0       the whole, of which each data-parallel rank saves an equal share
    ZeRO 1, 2    where the rank's flat fp32 partition meets the parameter (DeepSpeed's _hp_mapping)
    ZeRO 3       the rank's shard of the parameter
A `Slice` holds views into DeepSpeed's own tensors: writing into them is how a checkpoint is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagpt.mesh import Mesh

SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Slice:
    """A parameter's elements [start, start + n) in row-major order: their fp32 master and both moments, each [n]."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def create(engine: Any) -> None:
    """Give every master its moments now, as zeros, instead of at the first step or at DeepSpeed's step on nothing."""
    optimizer = _adamw(engine)
    for master in _masters(engine):
        optimizer.state[master] = {
            "step": torch.zeros((), dtype=torch.float32, device=master.device),
            "exp_avg": torch.zeros_like(master.data),
            "exp_avg_sq": torch.zeros_like(master.data),
        }
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def held(engine: Any) -> list[Slice]:
    """What this rank keeps of every parameter, in forward order: what a load must fill."""
    find = {0: _whole, 1: _flat_partition, 2: _flat_partition, 3: _shard}[engine.zero_optimization_stage()]
    found = (find(engine, name, parameter) for name, parameter in engine.module.named_parameters())
    return [part for part in found if part is not None and part.weight.numel()]


def owned(engine: Any, mesh: Mesh) -> list[Slice]:
    """What this rank saves: of what it holds, its share of whatever other data-parallel ranks hold as well."""
    if engine.zero_optimization_stage() > 0:
        return held(engine)
    return [share for part in held(engine) if (share := _share(part, mesh)).weight.numel()]


def counters(engine: Any) -> dict[str, Any]:
    """The steps that AdamW applied, and the dynamic loss scale of fp16."""
    scaler = _scaler(engine)
    steps = [int(values["step"]) for values in _adamw(engine).state.values()]
    scale = {name: getattr(scaler, name) for name in SCALER_FIELDS if hasattr(scaler, name)}
    return {"optimizer_steps": max(steps, default=0), "loss_scaler": scale}


def restore(engine: Any, saved: dict[str, Any]) -> None:
    """Set the counters, and make the weights that the model computes with from the masters."""
    for values in _adamw(engine).state.values():
        values["step"].fill_(saved["optimizer_steps"])
    for name, value in saved["loss_scaler"].items():
        if hasattr(_scaler(engine), name):
            setattr(_scaler(engine), name, value)
    _weights_from_masters(engine)


def loss_scale(engine: Any) -> float:
    """fp16's loss scale, or 1."""
    return float(getattr(_scaler(engine), "cur_scale", 1.0)) if engine.fp16_enabled() else 1.0


def own_scale(engine: Any) -> float:
    """The loss scale that is ours to apply, and still in DeepSpeed's gradient norm: with ZeRO 0 and fp16 DeepSpeed
    0.19.8 divides the gradients by the scale without having multiplied the loss. With ZeRO 1-3 it does both.
    """
    return loss_scale(engine) if engine.zero_optimization_stage() == 0 else 1.0


def _adamw(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


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
    for group in _adamw(engine).param_groups:
        yield from group["params"]


def _whole(engine: Any, name: str, parameter: nn.Parameter) -> Slice:
    master = _whole_masters(engine).get(id(parameter), parameter)
    state = _adamw(engine).state[master]
    views = [tensor.data.view(-1) for tensor in (master, state["exp_avg"], state["exp_avg_sq"])]
    return Slice(name, tuple(parameter.shape), 0, *views)


def _share(part: Slice, mesh: Mesh) -> Slice:
    count = part.weight.numel()
    start, stop = (count * rank // mesh.data for rank in (mesh.data_rank, mesh.data_rank + 1))
    views = [tensor[start:stop] for tensor in (part.weight, part.exp_avg, part.exp_avg_sq)]
    return Slice(part.name, part.shape, part.start + start, *views)


def _whole_masters(engine: Any) -> dict[int, Tensor]:
    """Half precision with ZeRO 0: the fp32 copy of each parameter, by the parameter's id."""
    if not hasattr(engine.optimizer, "fp32_groups"):
        return {}
    groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {id(half): full for halves, fulls in groups for half, full in zip(halves, fulls, strict=True)}


def _flat_partition(_engine: Any, name: str, parameter: Any) -> Slice | None:
    fragment = parameter._hp_mapping
    if fragment is None:
        return None
    views = [fragment.get_hp_fragment(key).detach() for key in (None, "exp_avg", "exp_avg_sq")]
    return Slice(name, tuple(parameter.shape), fragment.lp_fragment_address.start, *views)


def _shard(engine: Any, name: str, parameter: Any) -> Slice:
    group, offset, size = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
    flat = engine.optimizer.fp32_partitioned_groups_flat[group]
    state = _adamw(engine).state[flat]
    start = parameter.partition_numel() * dist.get_rank(parameter.ds_process_group)
    owned = max(0, min(size, parameter.ds_numel - start))  # the last shard is padded
    views = [tensor.data[offset : offset + owned] for tensor in (flat, state["exp_avg"], state["exp_avg_sq"])]
    return Slice(name, tuple(parameter.ds_shape), start, *views)


def _weights_from_masters(engine: Any) -> None:
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif stage > 0:
        optimizer.update_lp_params()
    else:
        masters = _whole_masters(engine)
        for parameter in engine.module.parameters():
            if (master := masters.get(id(parameter))) is not None:
                parameter.data.copy_(master.data)
