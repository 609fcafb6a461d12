"""Ehrlich functions as an optimiser's problem: what a run evaluated, its measures, the table and the figure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from problems.ehrlich import EhrlichProblem

from evaluation.figures import figure
from evaluation.kept_runs import Run
from evaluation.tables import Comparison, mean_of

DRAWS = 4096
"""Draws of a final model."""
Runs = Mapping[str, Mapping[str, list[Run]]]
"""By function and method; those of one method differ in the seed."""


@dataclass(frozen=True)
class MeasuredEhrlich(EhrlichProblem):
    """An Ehrlich function that keeps what was evaluated.

    Attributes:
        values: the value of each distinct text, in the order of evaluation.
    """

    values: dict[str, float] = field(default_factory=dict, compare=False)

    def value_of(self, text: str) -> float:
        """The function's value of a text, which is kept."""
        if text not in self.values:
            self.values[text] = super().value_of(text)
        return self.values[text]

    def search(self, budget: int) -> dict[str, Any]:
        """The measures of what was found with the first `budget` evaluations."""
        best = np.maximum.accumulate([*self.values.values()][:budget])
        rises = [0, *(np.flatnonzero(np.diff(best)) + 1).tolist()]
        return {
            "calls": len(best),
            "best": float(best[-1]),
            "solved_at": int(best.argmax()) + 1 if best[-1] >= 1 else None,
            "rises": [[place + 1, float(best[place])] for place in rises],
        }


def draws_measured(problem: EhrlichProblem, texts: list[str]) -> dict[str, Any]:
    """Measures of a final model's draws: the share that is feasible, their mean value, and distinct solutions."""
    feasible = [text for text in texts if problem.is_feasible(text)]
    values = {text: EhrlichProblem.value_of(problem, text) for text in {*feasible}}  # not as evaluations
    return {
        "feasible": len(feasible) / len(texts),
        "mean_value": sum(values[text] for text in feasible) / len(texts),
        "solutions": sum(value >= 1 for value in values.values()),
    }


def table(name: str, made: Mapping[str, list[Run]]) -> Comparison:
    """One function: a row per method."""
    (first, *_) = made.values()
    columns = ["solved", "calls until solved, each seed", "best value", "feasible draws", "distinct solutions drawn"]
    columns += ["mean value of draws", "calls", "CPU seconds"]
    comparison = Comparison(f"{name}: seeds {[run['seed'] for run in first]}", columns)
    for method, runs in made.items():
        calls = ", ".join("-" if run["solved_at"] is None else f"{run['solved_at']:,}" for run in runs)
        cells = [f"{sum(run['solved_at'] is not None for run in runs)} of {len(runs)}", calls]
        cells.append(mean_of([run["best"] for run in runs], ".2f", ".2f"))
        for measure, spec in (("feasible", ".4f"), ("solutions", ",.0f"), ("mean_value", ".2f")):
            cells.append(mean_of([run[measure] for run in runs], spec) if measure in runs[0] else "")
        cells += [mean_of([run[measure] for run in runs], ",.0f") for measure in ("calls", "cpu_seconds")]
        comparison.rows.append((f"{method} {runs[0]['setting']}".strip(), cells))
    return comparison


def draw(runs: Runs, path: Path) -> None:
    """The best value so far against the calls, the mean over seeds, a panel per function."""
    with figure(path, [[*runs]], (4.5 * len(runs), 3.4)) as axes:
        for name, made in runs.items():
            most = max(run["calls"] for each in made.values() for run in each)
            grid = np.arange(1, most + 1)
            for method, each in made.items():
                axes[name].plot(grid, [*map(statistics.mean, zip(*(curve(run, grid) for run in each)))], label=method)
            axes[name].set_title(name, fontsize=8)
            axes[name].set_xlabel("evaluations")
            axes[name].set_ylabel("best value")
        axes[name].legend(fontsize=7)


def curve(run: Run, grid: np.ndarray) -> list[float]:
    """The best value of a run after each number of evaluations."""
    at, values = np.array(run["rises"]).T
    best: list[float] = values[np.searchsorted(at, grid, side="right") - 1].tolist()
    return best
