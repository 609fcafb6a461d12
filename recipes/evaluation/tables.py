"""The tables that recipes print and write as Markdown."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def mean_of(values: Sequence[float], spec: str, spread: str = "") -> str:
    """The mean over runs and, with a format for it, the standard deviation if there are several."""
    deviation = f" ± {format(statistics.stdev(values), spread)}" if spread and len(values) > 1 else ""
    return format(statistics.mean(values), spec) + deviation


@dataclass
class Comparison:
    """A table with one column for each thing that is compared.

    Attributes:
        title: the title above the table.
        columns: names of the columns.
        rows: each row's label, and its cells in the columns' order.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]] = field(default_factory=list)

    def add(self, label: str, cells: Mapping[str, float | None], spec: str = ".2f") -> None:
        """Append a row.

        Args:
            label: the row's label.
            cells: numbers by column. Columns that are missing, `None` or NaN are left empty.
            spec: format of the numbers.
        """
        values = [cells.get(column) for column in self.columns]
        known = [value is not None and not math.isnan(value) for value in values]
        self.rows.append((label, [format(value, spec) if is_known else "" for value, is_known in zip(values, known)]))

    def print(self) -> None:
        """Print the table to the terminal. Where it is too wide, rows and columns change places if that is narrower."""
        console = Console()
        unlimited = console.options.update_width(sys.maxsize)
        table = self._on_a_terminal()
        width = console.measure(table, options=unlimited).maximum
        if width > console.width:
            columns = [*zip(*(cells for _, cells in self.rows))]
            rows = [(column, list(cells)) for column, cells in zip(self.columns, columns)]
            turned = Comparison(self.title, [label for label, _ in self.rows], rows)._on_a_terminal()
            table = min(table, turned, key=lambda each: console.measure(each, options=unlimited).maximum)
        console.print(table)

    def _on_a_terminal(self) -> Table:
        table = Table("", title=self.title)
        for column in self.columns:
            table.add_column(escape(column), justify="right")
        for label, cells in self.rows:
            table.add_row(escape(label), *cells)
        return table

    def write_markdown(self, path: str | Path) -> None:
        """Write the table to a file."""
        Path(path).write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [
            f"**{self.title}**",
            "",
            _line(["", *self.columns]),
            _line(["---", *("---:" for _ in self.columns)]),
            *(_line([label, *cells]) for label, cells in self.rows),
        ]
        return "\n".join(lines) + "\n"


def publish(tables: Sequence[Comparison], path: Path) -> None:
    """Print several tables, and write them to one file."""
    for table in tables:
        table.print()
    path.write_text("\n".join(table.markdown() for table in tables), encoding="utf-8")


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
