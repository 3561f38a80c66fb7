"""A beat of rank 0 in the middle of a run, for tests to change what they are about."""

from megagpt.heal.attempts import Beat

BEAT = Beat(
    rank=0,
    host="node1",
    began=1000.0,
    beat=1100.0,
    phase="step",
    step=40,
    since=1099.0,
    place="train.py:90 step",
    waiting=False,
    hanging=False,
    ended="",
    saves=4,
    repeats_first=False,
    median_step=1.5,
    seconds={"start": 10.0, "compile": 6.5, "data": 1.0, "step": 70.5, "save": 8.0, "evaluation": 4.0},
)
