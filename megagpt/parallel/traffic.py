"""Communication of one training step: counted on the collectives as they run, and as a formula.

Counted is the payload: the bytes of the tensor that is reduced, gathered (whole) or sent, once for each call.
What a link carries follows from the algorithm: of a ring over n ranks an all-reduce carries 2 (n - 1) / n of its
payload, an all-gather or a reduce-scatter (n - 1) / n. Left out are messages of at most `SMALL` bytes (counts, norms,
flags), the shapes that stages exchange once, and groups of one rank.

For M micro-batches of B rows, x = B T D w bytes of activations, w bytes a number, and a stage of L_s blocks:

    tensor     all-reduce      M x (4 L_s + r + [first stage] + [last])  +  M 4 (3 B T) [last]
    tensor     with sequence parallelism, x being the gathered tensor:
               reduce-scatter  M x (4 L_s + [first] + [last])
               all-gather      M x (6 L_s + [first] + 2 [last])
               all-reduce      M times the weights and biases that see a rank's own tokens
    pipeline   send            M (x + 8 B + [documents] 4 B T) forward, M x backward; x / tensor with sequence
                               parallelism
    ends       all-reduce      the tied embedding's gradient, once
    data       all-reduce      the gradient: P w once (ZeRO 0, 1), every micro-batch (ZeRO 2)
               all-gather      the weights: P w once (ZeRO 1, 2)
               ZeRO 3: reduce-scatter P w every micro-batch, all-gather P w once where all weights are small enough to
               be kept (100,000 numbers), else up to 2 M P w

An all-reduce of 4 a block: two forward (after attention and feed-forward), two backward. r: with full recomputation
one more a block, the sum after attention; the sum after the feed-forward is needed by nothing that is recomputed. The
norms of queries and keys, and repeated key and value heads, add the all-reduce of their gradients.

Letters: B rows of a micro-batch, T tokens, D width, G key and value heads, K head width, P parameters of the rank's
part with padding.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megagpt.config import Run
from megagpt.mesh import Mesh, lines
from megagpt.parallel.cut import vocabulary_rows
from megagpt.parallel.pipeline import stage_bounds

SMALL = 15
_NAMES = {
    "allreduce_": "all-reduce",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "send": "send",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}
_PAYLOAD = {name: int(name == "_reduce_scatter_base_") for name in _NAMES}  # which argument holds the whole tensor


class Traffic(TorchDispatchMode):
    """Counts the bytes of each collective on this rank while it is entered, by axis of the mesh and operation."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self._mesh = mesh
        self.found: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1]
            if name in _PAYLOAD:
                axis, size = self._axis(name, args), _bytes(args[_PAYLOAD[name]])
                if axis is not None and size > SMALL:
                    self.found[axis, _NAMES[name]] += size
        return func(*args, **(kwargs or {}))

    def _axis(self, name: str, args: Any) -> str | None:
        if name == "send":
            return "pipeline"
        group = next(item for item in args if not isinstance(item, Tensor | list | tuple | int))
        ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
        if len(ranks) == 1:
            return None
        for axis in ("tensor", "data", "pipeline"):
            if ranks in lines(self._mesh, axis):
                return axis
        return "world"


def _bytes(payload: Any) -> int:
    if isinstance(payload, Tensor):
        return payload.numel() * payload.element_size()
    return sum(_bytes(item) for item in payload)


def expected(run: Run, mesh: Mesh, parameters: int) -> Counter[tuple[str, str]]:
    """What `Traffic` counts in a step after the second, in fp32, with `parameters` numbers on the rank, padding too.

    Until then DeepSpeed's ZeRO 3 compares, once, the order that its ranks met the modules in.
    ZeRO 3 is the case in which all weights are kept. A pipeline's tied embedding counts on the pipeline axis.
    """
    found: Counter[tuple[str, str]] = Counter()
    for part in (_tensor, _pipeline, _data):
        for key, sizes in part(run, mesh, parameters).items():
            found[key] += sum(size for size in sizes if size > SMALL)
    return Counter({key: size for key, size in found.items() if size})


_Messages = dict[tuple[str, str], list[int]]


def _shape(run: Run, mesh: Mesh) -> tuple[int, int, int]:
    """Micro-batches, bytes of x_BTD in fp32, blocks of this stage."""
    train, model = run.train, run.model
    bounds = stage_bounds(model, mesh.pipeline)
    first, stop = bounds[mesh.pipeline_rank], bounds[mesh.pipeline_rank + 1]
    blocks = min(stop, model.layers + 1) - max(first, 1)
    micro_batches = train.global_batch // (train.micro_batch * mesh.data)
    return micro_batches, 4 * train.micro_batch * model.context * model.width, blocks


def _tensor(run: Run, mesh: Mesh, _parameters: int) -> _Messages:
    if mesh.tensor == 1:
        return {}
    M, x, blocks = _shape(run, mesh)
    first, last = int(mesh.first_stage), int(mesh.last_stage)
    rows = 4 * run.train.micro_batch * run.model.context
    small = M * [rows * last, 2 * rows * last] + M * blocks * _partial_gradients(run, mesh)
    if not run.parallel.sequence_parallel:
        again = blocks if run.train.recompute == "full" else 0
        return {("tensor", "all-reduce"): M * [x] * (4 * blocks + again + first + last) + small}
    norm = [4 * run.model.width] * (2 if run.model.norm == "layernorm" else 1)
    positions = [4 * run.model.context * run.model.width] if run.model.positions == "learned" else []
    biases = [4 * run.model.width] * (2 if run.model.biases != "none" else 0)
    small += M * (blocks * (2 * norm + biases) + first * positions + last * norm)
    return {
        ("tensor", "reduce-scatter"): M * [x] * (4 * blocks + first + last),
        ("tensor", "all-gather"): M * [x] * (6 * blocks + first + 2 * last),
        ("tensor", "all-reduce"): small,
    }


def _partial_gradients(run: Run, mesh: Mesh) -> list[int]:
    """Bytes of a block's weights of which each tensor rank computes a part of the gradient, whatever the tokens."""
    model = run.model
    found = [4 * model.head_width()] * (2 if model.qk_norm else 0)
    if model.key_value_heads() % mesh.tensor:
        rows = 2 * model.key_value_heads() * model.head_width()
        found += [4 * rows * model.width] + ([4 * rows] if model.biases == "all" else [])
    return found


def _pipeline(run: Run, mesh: Mesh, _parameters: int) -> _Messages:
    if mesh.pipeline == 1:
        return {}
    M, x, _ = _shape(run, mesh)
    x //= mesh.tensor if run.parallel.sequence_parallel else 1
    B, T = run.train.micro_batch, run.model.context
    forward = [] if mesh.last_stage else [x, 8 * B] + ([4 * B * T] if run.data.document_mask else [])
    messages: _Messages = {("pipeline", "send"): M * (forward + ([] if mesh.first_stage else [x]))}
    if run.model.tied and mesh.reads_data:
        table = 4 * vocabulary_rows(run.model, mesh.tensor) // mesh.tensor * run.model.width
        messages["pipeline" if mesh.pipeline == 2 else "world", "all-reduce"] = [table]
    return messages


def _data(run: Run, mesh: Mesh, parameters: int) -> _Messages:
    if mesh.data == 1:
        return {}
    M, size, stage = _shape(run, mesh)[0], 4 * parameters, run.parallel.zero_stage
    gradients = [size] * (M if stage >= 2 else 1)
    weights = [size] if stage else []
    return {("data", "reduce-scatter" if stage == 3 else "all-reduce"): gradients, ("data", "all-gather"): weights}
