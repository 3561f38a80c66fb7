"""Run a test's work in forked ranks, and get back what each of them found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megagpt.parallel import ranks


def on_ranks(work: Callable[[], Any], count: int, folder: Path) -> list[Any]:
    """The JSON values that `work` returned on each of `count` ranks; fails if one of them died."""

    def found() -> None:
        value = work()
        (folder / f"found-{ranks.rank()}.json").write_text(json.dumps(value))

    assert ranks.run_local(found, count) == 0, "a rank died: see its output above"
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(count)]
