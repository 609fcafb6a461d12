"""`aldrift report`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console

from ..reporting import health, outcome
from ..reporting.record import RunRecord
from ..reporting.report import write_report

USAGE = "usage: aldrift report RUN\n\nWrites RUN/report.html from the files of a run, finished or not."


def main(argv: Sequence[str]) -> int:
    """Write a run's report and print its outcome."""
    if len(argv) != 1 or argv[0].startswith("-"):
        print(USAGE)
        return 0 if argv[:1] in (["--help"], ["-h"]) else 2
    try:
        record = RunRecord.read(argv[0])
        write_report(record, argv[0])
        print_outcome(record, argv[0], health.run_warnings(record))
    except (ValueError, OSError) as error:
        raise SystemExit(f"aldrift report: {error}") from None
    except (LookupError, TypeError, AttributeError) as error:  # a figure is missing, or is not a number
        raise SystemExit(f"aldrift report: the files in {argv[0]} are incomplete or damaged: {error!r}") from None
    return 0


def print_outcome(record: RunRecord, folder: str, warnings: Iterable[str] = ()) -> None:
    """The outcome, warnings that have not been logged before, and where the report is."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(outcome.outcome(record), markup=False)
    for warning in warnings:
        console.print(f"warning: {warning}", markup=False, style="yellow")
    console.print(f"report: {folder}/report.html", markup=False)
