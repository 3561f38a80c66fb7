"""How long this rank's own layers take in the forward passes of training: by the host's clock, on a GPU by its own."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn


class Stopwatch:
    """Times the forward passes of `module` while it trains."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._passes: list[tuple[Any, Any]] = []
        self._began: Any = None
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)

    def seconds(self) -> float:
        """Of all passes since the last call. On a GPU they must be done: after a step they are."""
        passes, self._passes = self._passes, []
        if self._on_gpu:
            return sum(began.elapsed_time(ended) for began, ended in passes) / 1e3
        return sum(ended - began for began, ended in passes)

    def _start(self, module: nn.Module, _inputs: Any) -> None:
        self._began = self._moment() if module.training else None

    def _stop(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        if self._began is not None:
            self._passes.append((self._began, self._moment()))

    def _moment(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
