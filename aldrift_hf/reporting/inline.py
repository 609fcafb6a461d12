"""A run as a notebook shows it: its outcome in a sentence, and a table of its rungs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from .numbers import COLUMNS, cell
from .outcome import Run, outcome

MAX_ROWS = 12
"""Rungs that are shown; of more, the first ones are left out."""


def run_as_html(record: Run) -> str:
    """The outcome, and the last rungs."""
    return f"<p>{escape(outcome(record))}</p>{rungs_as_html(record.rungs)}"


def rungs_as_html(rungs: list[dict[str, Any]]) -> str:
    """A table of the last rungs' metrics, with the console's columns; empty before the first rung."""
    if not rungs:
        return ""
    shown = rungs[-MAX_ROWS:]
    columns = {name: header for name, (header, _, _) in COLUMNS.items() if any(name in rung for rung in shown)}
    head = "".join(f"<th>{header}</th>" for header in columns.values())
    rows = "".join(f"<tr>{''.join(f'<td>{text}</td>' for text in _cells(rung, columns))}</tr>" for rung in shown)
    left_out = len(rungs) - len(shown)
    note = f"<p>The first {left_out} rungs are left out.</p>" if left_out else ""
    return f"{note}<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _cells(rung: Mapping[str, Any], columns: Iterable[str]) -> list[str]:
    return [cell(rung.get(name), COLUMNS[name][2]) for name in columns]
