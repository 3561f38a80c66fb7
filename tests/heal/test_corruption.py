"""Which ranks are accused of a wrong result, by what differed where."""

from __future__ import annotations

import pytest

from megagpt.config import Parallel
from megagpt.heal.corruption import accused
from megagpt.mesh import mesh_of

NONE = (-1, -1, -1, -1)


# rank = 2 data + pipeline on the grid of 2 x 2
@pytest.mark.parametrize(
    ("layout", "outputs", "own", "reduced", "expected"),
    [
        (Parallel(data=4), NONE, NONE, NONE, ("", [])),
        (Parallel(tensor=4), (7, 5, 7, 7), (0, 0, 0, 0), NONE, ("output", [1])),
        (Parallel(data=2, pipeline=2), (-1, 3, 9, 0), (2, 2, 2, 2), NONE, ("output", [2])),
        (Parallel(data=2, pipeline=2), NONE, (4, 0, -1, 7), NONE, ("own gradient", [1, 3])),
        (Parallel(data=4), NONE, NONE, (-1, 2, 0, -1), ("reduced gradient", [1, 2])),
    ],
)
def test_the_ranks_are_accused_where_a_difference_came_first(layout, outputs, own, reduced, expected):
    places = {"output": outputs, "own gradient": own, "reduced gradient": reduced}
    assert accused(places, mesh_of(layout, 0)) == expected
