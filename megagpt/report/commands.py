"""`megagpt report`: write a run's page again, or print its numbers."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from megagpt.report.html import write_report
from megagpt.report.summary import read_run, summarise


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write a run's report.html again, also while it trains."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    json: bool = False
    """Print the run's numbers as JSON, and write nothing."""


def run_report(options: Report) -> int:
    """Write the page, or print the numbers. Raises UserError if the folder is not that of a run."""
    if options.json:
        print(json.dumps(dataclasses.asdict(summarise(options.run, read_run(options.run))), indent=2))
    else:
        print(write_report(options.run))
    return 0
