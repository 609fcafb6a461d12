"""How close a run came on a spanning-tree problem: as a table, as a figure, and in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ..diagnostics import MISSING_MASS_WARNING
from .enumeration import Enumeration, kl_divergence, total_variation
from .figures import figure, plot_along_ladder, plot_edge_marginals, plot_marginals
from .spanning_tree import SpanningTreeProblem


def compare(
    problem: SpanningTreeProblem,
    draws: dict[str, list[str]],
    strings: Enumeration | None,
    log_probs: dict[str, np.ndarray],
) -> Table:
    """A column for each source of draws; where all strings are enumerated, exact distances beside what was drawn.

    Args:
        problem: the graph.
        draws: texts by source; one of them is `"model"`.
        strings: every string of the problem, or `None` where they are too many.
        log_probs: exact log-probabilities over `strings`, by source; `"exact p_T"` among them.
    """
    table = Table("", title=f"{len(draws['model']):,} draws each")
    trees = {name: [text for text in texts if problem.cost_of(text) == 0] for name, texts in draws.items()}
    kirchhoff = problem.tree_marginals()

    def row(label: str, cell: Callable[[str], str]) -> None:
        table.add_row(label, *map(cell, draws))

    for name in draws:
        table.add_column(name, justify="right")
    row("success: share of trees", lambda name: f"{len(trees[name]) / len(draws[name]):.3f}")
    row(f"distinct trees, of {problem.number_of_trees():,.6g}", lambda name: f"{len(set(trees[name])):,}")
    row("mean cost", lambda name: f"{np.mean([problem.cost_of(text) for text in draws[name]]):.3f}")
    row(
        "edge marginals of trees: largest error against Kirchhoff",
        lambda name: f"{np.abs(problem.marginals(trees[name]) - kirchhoff).max():.3f}",
    )
    if strings is not None:
        log_p = log_probs["exact p_T"]
        p = np.exp(log_p)
        exact = {name: log_probs[name] for name in draws if name in log_probs}
        row(
            "KL(p_T || ·) in nats, over all strings",
            lambda n: f"{kl_divergence(log_p, exact[n]):.2f}" if n in exact else "",
        )
        row(
            "TV to p_T, over all strings", lambda n: f"{total_variation(p, np.exp(exact[n])):.2f}" if n in exact else ""
        )
        row(
            "TV to p_T of the draws, noise of counting included",
            lambda name: f"{total_variation(p, strings.counts(draws[name]) / len(draws[name])):.2f}",
        )
    return table


def draw_figure(
    problem: SpanningTreeProblem, draws: dict[str, list[str]], records: list[dict[str, Any]], path: Path
) -> None:
    """The graph with learnt against exact marginals, and the run along its ladder."""
    kirchhoff = problem.tree_marginals()
    trees = {name: [text for text in texts if problem.cost_of(text) == 0] for name, texts in draws.items()}
    marginals = {name: problem.marginals(found) for name, found in trees.items() if found and name != "exact p_T"}
    with figure(path, [["graph", "graph", "scatter"], ["cost", "share", "mass"]], (13, 8)) as axes:
        learnt = marginals.get("corrected", np.zeros(len(problem.edges)))
        pairs = [(problem.nodes[a], problem.nodes[b]) for a, b in problem.edges]
        plot_edge_marginals(axes["graph"], problem.to_networkx(), dict(zip(pairs, learnt)), kirchhoff)
        plot_marginals(axes["scatter"], marginals, kirchhoff)
        plot_along_ladder(
            axes["cost"], records, {"objective_mean": "proposals", "sample_objective_mean": "samples"}, "mean cost d"
        )
        shares = {
            "success": "success",
            "acceptance_rate": "acceptance rate",
            "ess": "ESS / n",
            "distinct_proposals": "distinct",
        }
        plot_along_ladder(axes["share"], records, shares, "shares of a rung's proposals")
        plot_along_ladder(axes["mass"], records, {"missing_mass": "missing mass"}, "missing mass (nats)")


def missing_mass_in_words(nats: float | None) -> str:
    """The verdict on the final model; `None` where it was not measured."""
    if nats is None:
        return "missing mass: not measured, the budget of objective calls is spent"
    verdict = "the model covers the target" if nats <= MISSING_MASS_WARNING else "the model has LOST part of the target"
    share = min(1.0, float(np.exp(-nats)))
    return f"missing mass: {nats:.2f} nats: by the ladder's log Z its draws account for {share:.0%} of p_T; {verdict}"
