"""`aldrift report`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console

from ..command_line import Parser
from ..reporting import health, outcome
from ..reporting.record import RunRecord
from ..reporting.report import Picture, write_report
from .functions import load_function


def main(argv: Sequence[str]) -> None:
    """Write a run's report and print its outcome.

    Raises:
        SystemExit: after one line, for options that cannot be used, and for a folder without a run.
    """
    parser = Parser(
        "aldrift report",
        "aldrift report RUN [--picture FILE.py:FUNCTION]",
        "Writes RUN/report.html from the files of a run, finished or not.",
        [],
    )
    parser.add_argument("run", metavar="RUN", help="The output directory of a run.")
    parser.add_argument(
        "--picture",
        metavar="FILE.py:FUNCTION",
        help="Shows the model's and the target's draws as well: picture(completions, weights), also MODULE:FUNCTION, "
        "returns HTML or SVG.",
    )
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.refuse_unknown(unknown)
    try:
        picture = None if options.picture is None else _picture(options.picture)
        record = RunRecord.read(options.run)
        write_report(record, options.run, picture)
        print_outcome(record, options.run, health.run_warnings(record))
    except (ValueError, OSError) as error:
        raise SystemExit(f"aldrift report: {error}") from None
    except (LookupError, TypeError, AttributeError) as error:  # a figure is missing, or is not a number
        raise SystemExit(f"aldrift report: the files in {options.run} are incomplete or damaged: {error!r}") from None


def _picture(name: str) -> Picture:
    """A function of the user's, whose failures say that they are its own."""
    function = load_function(name, "--picture")

    def picture(completions: Sequence[str], weights: Sequence[float]) -> str:
        try:
            shown = function(completions, weights)
        except Exception as error:
            raise ValueError(f"--picture {name}: {error!r}") from error
        if not isinstance(shown, str):
            raise ValueError(f"--picture {name} returns {type(shown).__name__}; it must return HTML or SVG as a string")
        return shown

    return picture


def print_outcome(record: RunRecord, folder: str, warnings: Iterable[str] = ()) -> None:
    """The outcome, warnings that have not been logged before, and where the report is."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(outcome.outcome(record), markup=False)
    for warning in warnings:
        console.print(f"warning: {warning}", markup=False, style="yellow")
    console.print(f"report: {folder}/report.html", markup=False)
