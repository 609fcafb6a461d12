"""The tables that recipes end with: printed, and kept as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass
class Comparison:
    """Rows of figures, one column for each thing compared.

    Attributes:
        title: stands above the table.
        columns: names of what is compared.
        rows: a label and a cell for each column.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]] = field(default_factory=list)

    def add(self, label: str, cells: Mapping[str, float | None], spec: str = ".2f") -> None:
        """One row: `cells` by column, those without a number left empty; `spec` formats the others."""
        values = [cells.get(column) for column in self.columns]
        known = [value is not None and not math.isnan(value) for value in values]
        self.rows.append((label, [format(value, spec) if is_known else "" for value, is_known in zip(values, known)]))

    def print(self) -> None:
        """To the terminal."""
        table = Table("", title=self.title)
        for column in self.columns:
            table.add_column(escape(column), justify="right")
        for label, cells in self.rows:
            table.add_row(escape(label), *cells)
        Console().print(table)

    def write_markdown(self, path: str | Path) -> None:
        """To a file."""
        lines = [
            f"**{self.title}**",
            "",
            _line(["", *self.columns]),
            _line(["---", *("---:" for _ in self.columns)]),
            *(_line([label, *cells]) for label, cells in self.rows),
        ]
        Path(path).write_text("\n".join(lines) + "\n")


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
