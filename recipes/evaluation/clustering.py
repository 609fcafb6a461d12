"""The table and the figure that compare the partitions drawn by a model with those of k-means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from problems.clustering import ClusteringProblem
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score

from aldrift_hf.reporting.figure_style import PALETTE
from evaluation.figures import figure, plot_along_ladder
from evaluation.tables import Comparison

KMEANS = "k-means"


def kmeans_draws(problem: ClusteringProblem, count: int) -> list[str]:
    """Partitions from single runs of scikit-learn's k-means, each from its own random start."""
    return [problem.to_text(problem.kmeans(runs=1, seed=seed).labels_.tolist()) for seed in range(count)]


def compare(problem: ClusteringProblem, draws: dict[str, list[str]]) -> Comparison:
    """A table with one column per source of partitions; one of them is k-means."""
    counts = ", ".join(f"{len(texts):,} of {name}" for name, texts in draws.items())
    table = Comparison(f"draws: {counts}", list(draws))
    labels = {name: [problem.parse(text) for text in texts] for name, texts in draws.items()}
    well_formed = {name: [row for row in rows if row is not None] for name, rows in labels.items()}
    squares = {name: np.array(list(map(problem.sum_of_squares, rows))) for name, rows in well_formed.items()}

    def row(label: str, figure_of: Callable[[str], Any], spec: str = ".2f") -> None:
        table.add(label, {name: figure_of(name) for name in draws}, spec)

    row("well-formed", lambda name: len(well_formed[name]) / len(draws[name]), ".3f")
    row("sum of squares W: mean", lambda name: squares[name].mean() if len(squares[name]) else np.nan)
    row(f"sum of squares W: best (W* = {problem.best_known:.2f})", lambda name: squares[name].min(initial=np.inf))
    row("within 5 % of W*", lambda name: (squares[name] <= 1.05 * problem.best_known).sum() / len(draws[name]), ".3f")
    if problem.must_link.any():
        kept = {name: [problem.links_kept(row) == 1 for row in rows] for name, rows in well_formed.items()}
        row(f"all {problem.must_link.sum()} must-links kept", lambda name: sum(kept[name]) / len(draws[name]), ".3f")
    scores = {name: [adjusted_rand_score(problem.species, row) for row in rows] for name, rows in well_formed.items()}
    row("adjusted Rand index to the species, mean", lambda name: np.mean(scores[name]) if scores[name] else np.nan)
    row("distinct partitions", lambda name: len(set(map(tuple, well_formed[name]))), ",d")
    return table


def draw_figure(
    problem: ClusteringProblem, draws: dict[str, list[str]], records: list[dict[str, Any]], path: Path
) -> None:
    """Draw the points by species and by the best partitions of k-means and corrected draws; and metrics of the run."""
    flat = PCA(2).fit_transform(problem.points)
    best = {name: problem.parse(min(draws[name], key=problem.cost_of)) for name in (KMEANS, "corrected")}
    panels = {"species": problem.species, **{name: labels for name, labels in best.items() if labels is not None}}
    top = [*panels, *["."] * (3 - len(panels))]
    with figure(path, [top, ["cost", "share", "mass"]], (13, 8)) as axes:
        for name, kinds in panels.items():
            for start in np.flatnonzero(problem.must_link):
                pair = flat[start - 1 : start + 1]
                axes[name].plot(pair[:, 0], pair[:, 1], color="black", linewidth=1.5, zorder=1)
            colours = [PALETTE[kind % len(PALETTE)] for kind in np.asarray(kinds)]
            axes[name].scatter(flat[:, 0], flat[:, 1], c=colours, s=28, zorder=2)
            title = "species; lines are must-links" if name == "species" else f"best partition of {name}"
            axes[name].set(xlabel="first principal component", ylabel="second principal component", title=title)
        costs = {"objective_mean": "proposals", "sample_objective_mean": "samples", "objective_best": "best"}
        plot_along_ladder(axes["cost"], records, costs, "cost d = 10 (W / W* - 1)")
        shares = {"acceptance_rate": "acceptance rate", "ess": "ESS / n", "distinct_samples": "distinct samples"}
        plot_along_ladder(axes["share"], records, shares, "share")
        plot_along_ladder(axes["mass"], records, {"missing_mass": "missing mass"}, "missing mass (nats)")
