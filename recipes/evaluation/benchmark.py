"""The tables and the figure of the benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from evaluation.figures import figure, plot_lines
from evaluation.kept_runs import Run
from evaluation.tables import Comparison, mean_of, publish

COLUMNS = {
    "TV": ("tv", ".2f"),
    "KL(p_T‖q)": ("kl", ".3g"),
    "KL(q‖p_T)": ("reverse_kl", ".3g"),
    "success": ("success", ".3f"),
    "distinct solutions": ("distinct", ",.0f"),
    "TV of corrected draws": ("corrected_tv", ".2f"),
    "proposals": ("proposals", ",.0f"),
    "objective calls": ("calls", ",.0f"),
    "seconds": ("seconds", ",.0f"),
}
"""The tables' columns: for each, the measure that it shows and the format of its numbers."""


def report(groups: Mapping[str, list[list[Run]]], folder: Path) -> None:
    """Print the tables, and write them and the figure.

    Args:
        groups: for each problem its groups of runs; runs of one group differ in the seed alone.
        folder: the folder to write to.
    """
    tables = []
    for problem, runs in groups.items():
        table = Comparison(f"{problem}: means over seeds {[run['seed'] for run in runs[-1]]}", [*COLUMNS])
        for group in runs:
            first = group[0]
            label = first["method"] + (f", lr {first['learning_rate']:g}" if first["learning_rate"] else "")
            table.rows.append((label, [_cell(group, *column) for column in COLUMNS.values()]))
        tables.append(table)
    publish(tables, folder / "benchmark.md")
    with figure(folder / "benchmark.png", [[*groups]], (5 * len(groups), 4.5)) as axes:
        for problem, runs in groups.items():
            lines: dict[str, tuple[list[float], list[float]]] = {}
            for group in runs:
                if group[0]["budget"]:
                    x, y = lines.setdefault(group[0]["method"], ([], []))
                    x.append(statistics.mean(run["calls"] for run in group))
                    y.append(statistics.mean(run["kl"] for run in group))
            plot_lines(axes[problem], lines, "distinct objective calls", "KL(p_T || q) (nats)", log="xy")
            axes[problem].set_title(problem)
    Console().print(f"figure and table: {folder}/benchmark.*   every run: {folder}/runs.jsonl")


def _cell(group: list[Run], name: str, spec: str) -> str:
    """The mean over seeds; for the main measures also the standard deviation."""
    values = [run[name] for run in group if name in run]
    return mean_of(values, spec, spec if name in ("kl", "success") else "") if values else ""
