"""Fill in a run's layout from nodes x GPUs: parallel.data always, tensor and pipeline where both were left at 1."""

from __future__ import annotations

import dataclasses

from megagpt import ledger
from megagpt.checks import checked, nearest_layouts
from megagpt.config import Run
from megagpt.errors import UserError

MODEL_SHARE = 0.6  # of a GPU's memory for weights, gradients and optimizer; the rest is for activations and NCCL


def fill_layout(run: Run, *, nodes: int, gpus_per_node: int, gpu_memory_gib: int) -> Run:
    """`run` on nodes x gpus_per_node ranks, checked.

    Raises UserError with the nearest layouts if the GPUs cannot be cut so, or with the broken rule if no cut is legal.
    """
    for name, value in (("nodes", nodes), ("gpus_per_node", gpus_per_node)):
        if value < 1:
            raise UserError(f"{name} = {value} must be at least 1.")
    world, parallel = nodes * gpus_per_node, run.parallel
    group = parallel.pipeline * parallel.tensor
    if world % group:
        near = nearest_layouts(parallel, run.model, world)
        raise UserError(
            f"{world:,} GPUs cannot be cut into tensor {parallel.tensor} x pipeline {parallel.pipeline} = groups of "
            f"{group}.",
            f"Use a multiple of {group} GPUs"
            + (f", or data x pipeline x tensor = {' or '.join(near)}." if near else "."),
        )
    if parallel.tensor > gpus_per_node or gpus_per_node % parallel.tensor:
        raise UserError(
            f"parallel.tensor = {parallel.tensor} does not divide gpus_per_node = {gpus_per_node}: tensor ranks would "
            "talk through the network in every layer.",
            "Use a divisor of gpus_per_node, and more parallel.pipeline.",
        )
    plain = _cut(run, world, parallel.tensor, parallel.pipeline)
    if group > 1:
        return _checked(plain)
    for tensor, pipeline in _cuts(run, world, gpus_per_node):
        candidate = _cut(run, world, tensor, pipeline)
        if _fits(candidate, gpu_memory_gib) and _legal(candidate):
            return candidate
    return _checked(plain)


def _cuts(run: Run, world: int, gpus_per_node: int) -> list[tuple[int, int]]:
    """(tensor, pipeline) from the least to the most communication: few ranks a replica first, then few stages."""
    tensors = [size for size in range(1, gpus_per_node + 1) if gpus_per_node % size == 0]
    pairs = [(t, p) for t in tensors for p in range(1, run.model.layers + 1) if world % (t * p) == 0]
    return sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[1]))


def _cut(run: Run, world: int, tensor: int, pipeline: int) -> Run:
    data = world // (tensor * pipeline)
    return dataclasses.replace(
        run, parallel=dataclasses.replace(run.parallel, data=data, pipeline=pipeline, tensor=tensor)
    )


def _checked(run: Run) -> Run:
    """Every rule but that of the data, which a dry run may be without."""
    checked(dataclasses.replace(run, data=dataclasses.replace(run.data, mixture={"corpus": 1})))
    return run


def _legal(run: Run) -> bool:
    try:
        _checked(run)
    except UserError:
        return False
    return True


def _fits(run: Run, gpu_memory_gib: int) -> bool:
    parallel = run.parallel
    count = ledger.parameters(run.model).total() // (parallel.tensor * parallel.pipeline)
    held = ledger.training_bytes(
        count, precision=run.train.precision, zero_stage=parallel.zero_stage, data=parallel.data
    )
    return held.total() < MODEL_SHARE * gpu_memory_gib * 2**30
