"""What a run tells while it trains, from its first rank: console, records, events, loggers. Other ranks are silent."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from megagpt import config, ledger
from megagpt.files import write_whole
from megagpt.hardware import peak_flops
from megagpt.ops import select
from megagpt.parallel.ranks import sum_over_ranks
from megagpt.report.console import Console
from megagpt.report.loggers import open_loggers
from megagpt.report.metrics import (
    EvaluationRecord,
    StepRecord,
    open_evaluations,
    open_events,
    open_metrics,
    read_records,
    record_event,
)
from megagpt.report.plan import plan_rows

if TYPE_CHECKING:
    from megagpt.evaluate import Evaluation
    from megagpt.parallel.engine import Step


class Journal:
    """Use it as a context. Until `open`, only warnings can be told; on a rank that does not speak nothing ever is."""

    def __init__(self, run: config.Run, out: Path, device: torch.device, *, speak: bool) -> None:
        """Every rank must make one: a CPU's peak is measured on all ranks at the same time."""
        self._run, self._out, self._device = run, out, device
        peak = peak_flops(device, run.train.precision)
        self._peak_flops_per_s = sum_over_ranks([peak.flops_per_s])[0]
        self._peak_source = peak.source
        self._speak = speak
        self._steps = config.steps_of(run)
        self._console = Console(
            steps=self._steps,
            total_tokens=min(run.train.tokens, self._steps * run.train.global_batch * run.model.context),
            every=run.report.every,
        )
        self._files = contextlib.ExitStack()
        self._records = self._files.enter_context(contextlib.ExitStack())

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def open(self, *, step: int, tokens: int) -> None:
        """Begin to record after `step`, of a run that may have been further before: later records are dropped."""
        if not self._speak:
            return
        write_whole(self._out / "run.toml", config.to_toml(self._run))
        self._open_records(step)
        self._events = self._files.enter_context(open_events(self._out))
        self._loggers = open_loggers(self._run, self._out, step)
        for logger in self._loggers:
            self._files.callback(logger.close)
        self._files.enter_context(self._console)
        rows = plan_rows(self._run)
        rows.append(("kernels", select(self._run.model.kernels).choice))
        rows.append(("peak", f"{self._peak_flops_per_s / 1e12:,.2f} TFLOP/s, {self._peak_source}"))
        self._console.plan(f"{self._out}", rows)
        if step:
            self._console.note(f"continuing after step {step:,}, {tokens:,} tokens")
        record_event(self._events, "resumed" if step else "started", step=step, tokens=tokens)

    def _open_records(self, step: int) -> None:
        self._metrics = self._records.enter_context(open_metrics(self._out, step))
        self._evaluations = self._records.enter_context(open_evaluations(self._out, step))

    def step(
        self,
        done: Step,
        *,
        step: int,
        tokens: int,
        sequences: int,
        lr: float,
        seconds: float,
        waited: float,
        documents: list[int] | None,
    ) -> None:
        """Record one optimizer step, which took `seconds` in all, of which `waited` for data.

        `documents` are the lengths that attention was kept inside of, in this rank's part of the batch.
        """
        if not self._speak:
            return
        tokens_per_s = sequences * self._run.model.context / seconds
        flops = ledger.flops_per_token(self._run.model, self._run.train.recompute, documents)
        known = self._peak_flops_per_s > 0
        speeds = {"tokens_per_s": tokens_per_s, "peak_flops_per_s": self._peak_flops_per_s}
        record = StepRecord(
            step=step,
            loss=done.loss,
            grad_norm=done.grad_norm,
            lr=lr,
            tokens=tokens,
            tokens_per_s=tokens_per_s,
            mfu=ledger.mfu(flops, **speeds) if known else None,
            hfu=ledger.hfu(flops, **speeds) if known else None,
            batch=sequences,
            seconds=seconds,
            data_wait_seconds=waited,
            memory_gib=_memory_bytes(self._device) / 2**30,
            loss_scale=done.loss_scale if self._run.train.precision == "fp16" else None,
            skipped=done.skipped,
        )
        self._metrics.append(record)
        self._console.step(record)
        for logger in self._loggers:
            logger.step(record)

    def evaluation(self, result: Evaluation, *, step: int, tokens: int) -> None:
        """Record the loss on one corpus' held-out documents."""
        if not self._speak:
            return
        record = EvaluationRecord(
            step=step,
            tokens=tokens,
            corpus=result.corpus,
            loss=result.loss,
            perplexity=result.perplexity,
            bits_per_byte=result.bits_per_byte,
            sequences=result.sequences,
        )
        self._evaluations.append(record)
        self._console.evaluation(record)
        for logger in self._loggers:
            logger.evaluation(record)

    def warn(self, text: str) -> None:
        if self._speak:
            self._console.warn(text)

    def note(self, text: str) -> None:
        if self._speak:
            self._console.note(text)

    def sync(self) -> None:
        """Put every record on disk: to be called before the checkpoint that covers them."""
        if self._speak:
            self._metrics.sync()
            self._evaluations.sync()

    def event(self, event: str, **details: Any) -> None:
        """Record what befell the run, with step, rank, cause and action, and tell it."""
        if self._speak:
            record_event(self._events, event, **details)
            rank = "" if details["rank"] is None else f", rank {details['rank']}"
            self._console.warn(f"step {details['step']:,}{rank}: {event}, {details['cause']}; {details['action']}")

    def events(self) -> list[dict[str, Any]]:
        """All events of the run so far, on the rank that speaks; on others none."""
        return read_records(self._out / "events.jsonl") if self._speak else []

    def went_back(self, step: int) -> None:
        """The run goes on after `step` again: later records are dropped."""
        if self._speak:
            self._records.close()
            self._open_records(step)

    def saved(self, step: int, folder: object, *, seconds: float) -> None:
        if self._speak:
            record_event(self._events, "checkpoint", step=step, folder=str(folder), seconds=round(seconds, 3))
            self._console.note(f"saved {folder} in {seconds:.1f} s")

    def ended(self, step: int, *, finished: bool) -> None:
        """The run is done, or was told to stop."""
        if not self._speak:
            return
        record_event(self._events, "finished" if finished else "stopped", step=step)
        if not finished:
            self._console.note(f"stopped after step {step:,} as told; the same command continues.")


def _memory_bytes(device: torch.device) -> int:
    """The most that this rank has held: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
