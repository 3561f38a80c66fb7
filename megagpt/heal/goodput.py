"""Goodput: how much of a run's wall time, over all its attempts, went into steps that count.

    start, compile, steps, repeated, data, evaluation, save    rank 0's phases (heal/clock.py) in every attempt
    hang     from a rank's last progress to the watchdog's end of the attempt
    lost     from an attempt's last sign of life to the next one's command: nobody was there

They add up to the time from the first command to the last sign of life. `compile` is what first steps took beyond a
usual one. Beside it stands what is expected of the run's own numbers (Young 1974, CACM 17(9); Daly 2006, FGCS 22(3)):

    share of steps = tau / (M exp(R / M) (exp((tau + delta) / M) - 1)),  without failures tau / (tau + delta)
    best tau       = sqrt(2 delta M)                          (Young)
                   = sqrt(2 delta M) (1 + sqrt(delta / 2 M) / 3 + delta / 18 M) - delta, at most M      (Daly)

tau: time of steps that count between saves; delta: a save's stall; M: time between failures; R: a restart, from the
last sign of life to the next step. Failures cut restarts short as well, to M (1 - exp(-R / M)) in the mean, so R is
more than the mean that is measured. The measured share that compares with it leaves out the first start and
evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megagpt.checkpoint.interval import best_interval
from megagpt.heal.attempts import Beat, first_rank_beats

KINDS = ("steps", "repeated", "data", "save", "evaluation", "start", "compile", "hang", "lost")
_KIND_OF = {"step": "steps", "end": "start"}


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What Daly's model expects of the run's own save time, interval, restarts and failures."""

    interval: float
    """Seconds of steps between two saves: tau."""
    save: float
    """Seconds that one save holds up training: delta."""
    restart: float
    """Seconds of one that no failure cuts short: R."""
    failures: int
    mtbf: float | None
    """Seconds between failures: as seen, else as set; None if it is neither."""
    share: float
    """Of the time, in steps that count."""
    young_interval: float | None
    """The best interval of saves, in seconds; None without an mtbf."""
    daly_interval: float | None


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """The wall time of a run, split."""

    wall: float
    seconds: dict[str, float]
    """By KINDS; they add up to `wall`."""
    attempts: int
    predicted: Prediction | None
    """None before the second save."""

    comparable: float
    """Share of steps and their waits for data in the time that the prediction is about."""

    def share(self) -> float:
        """Of the wall time, in steps that count, their waits for data not included."""
        return self.seconds["steps"] / self.wall if self.wall else 0.0


def goodput(out: Path, *, mtbf_hours: float) -> Goodput | None:
    """Of the run in `out`, as far as it has come; None if no attempt left a trace.

    `mtbf_hours` is checkpoint.mtbf_hours, which stands for the time between failures where none was seen; 0: unknown.
    """
    beats = first_rank_beats(out)
    if not beats:
        return None
    seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for number, beat in enumerate(beats):
        for kind, value in _attempt(beat).items():
            seconds[kind] += value
        if number:
            seconds["lost"] += max(0.0, beat.began - beats[number - 1].beat)
    wall = beats[-1].beat - beats[0].began
    apart = seconds["evaluation"] + beats[0].seconds.get("start", 0.0)
    return Goodput(
        wall=wall,
        seconds=seconds,
        attempts=len(beats),
        comparable=(seconds["steps"] + seconds["data"]) / (wall - apart) if wall > apart else 0.0,
        predicted=_prediction(beats, seconds, wall, mtbf_hours * 3600),
    )


def _attempt(beat: Beat) -> dict[str, float]:
    """One attempt's time by kind."""
    found: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for phase, seconds in beat.seconds.items():
        found[_KIND_OF.get(phase, phase)] += seconds
    if beat.ended == "hang":
        stuck = min(beat.beat - beat.since, beat.seconds[beat.phase])
        found[_KIND_OF.get(beat.phase, beat.phase)] -= stuck
        found["hang"] += stuck
    usual = min(found["compile"], beat.median_step)
    found["compile"] -= usual
    found["repeated" if beat.repeats_first else "steps"] += usual
    return found


def _prediction(
    beats: Sequence[Beat], seconds: Mapping[str, float], wall: float, mtbf_seconds: float
) -> Prediction | None:
    saves = sum(beat.saves for beat in beats)
    if saves < 2 or not seconds["steps"]:
        return None
    interval = (seconds["steps"] + seconds["data"]) / saves
    save = seconds["save"] / saves
    failures = sum(beat.ended not in ("finished", "stopped") for beat in beats[:-1])
    mtbf = wall / failures if failures else mtbf_seconds
    restart = seconds["start"] + seconds["compile"]
    if failures:
        restarting = restart - beats[0].seconds.get("start", 0.0) + seconds["lost"] + seconds["hang"]
        restart = -mtbf * math.log1p(-restarting / wall)
    if mtbf:
        share = expected_share(interval=interval, save=save, restart=restart, mtbf=mtbf)
    else:
        share = interval / (interval + save)
    return Prediction(
        interval=interval,
        save=save,
        restart=restart,
        failures=failures,
        mtbf=mtbf or None,
        share=share,
        young_interval=young(save, mtbf) if mtbf else None,
        daly_interval=best_interval(save_seconds=save, mtbf_seconds=mtbf) if mtbf else None,
    )


def expected_share(*, interval: float, save: float, restart: float, mtbf: float) -> float:
    """Daly's expected share of the time in steps that count; all in seconds."""
    if (restart + interval + save) / mtbf > 700:  # exp's end: it never gets anywhere
        return 0.0
    return interval / (mtbf * math.exp(restart / mtbf) * math.expm1((interval + save) / mtbf))


def young(save: float, mtbf: float) -> float:
    """Young's best interval of saves, in seconds."""
    return math.sqrt(2 * save * mtbf)
