"""The table and the figure that compare a run on spanning trees with the exact target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from problems.spanning_tree import SpanningTreeProblem

from evaluation.enumeration import Enumeration, kl_divergence, total_variation
from evaluation.figures import figure, plot_along_ladder, plot_edge_marginals, plot_marginals
from evaluation.tables import Comparison


def compare(
    problem: SpanningTreeProblem,
    draws: dict[str, list[str]],
    strings: Enumeration | None,
    log_probs: dict[str, np.ndarray],
) -> Comparison:
    """A table with one column per source of draws. If all strings are enumerated, it contains exact distances.

    Args:
        problem: the graph.
        draws: drawn texts by source; one of the sources is `"model"`.
        strings: every string of the problem; `None` if there are too many.
        log_probs: exact log-probabilities over `strings`, by source; one of the sources is `"exact p_T"`.
    """
    table = Comparison(f"{len(draws['model']):,} draws each", list(draws))
    trees = {name: [text for text in texts if problem.cost_of(text) == 0] for name, texts in draws.items()}
    kirchhoff = problem.tree_marginals()

    def row(label: str, figure_of: Callable[[str], float], spec: str = ".2f") -> None:
        table.add(label, {name: figure_of(name) for name in draws}, spec)

    row("success: share of trees", lambda name: len(trees[name]) / len(draws[name]), ".3f")
    row(f"distinct trees, of {problem.number_of_trees():,.6g}", lambda name: len(set(trees[name])), ",d")
    row("mean cost", lambda name: float(np.mean([problem.cost_of(text) for text in draws[name]])), ".3f")
    row(
        "edge marginals of trees: largest error against Kirchhoff",
        lambda name: float(np.abs(problem.marginals(trees[name]) - kirchhoff).max()),
        ".3f",
    )
    if strings is not None:
        log_p = log_probs["exact p_T"]
        p = np.exp(log_p)
        exact = {name: log_probs[name] for name in draws if name in log_probs}
        kl = {name: kl_divergence(log_p, log_q) for name, log_q in exact.items()}
        tv = {name: total_variation(p, np.exp(log_q)) for name, log_q in exact.items()}
        table.add("KL(p_T || ·) in nats, over all strings", kl)
        table.add("TV to p_T, over all strings", tv)
        row(
            "TV to p_T of the draws, sampling noise included",
            lambda name: total_variation(p, strings.counts(draws[name]) / len(draws[name])),
        )
    return table


def uncounted_trees(problem: SpanningTreeProblem, texts: Sequence[str], log_model: Sequence[float]) -> float:
    """The log ratio of the number of spanning trees (Kirchhoff) to the number estimated from a model's draws, nats.

    The mean of `1/q(s)` over draws of `q`, where draws that are not trees count as 0, estimates the number of trees
    that `q` covers, whatever else it draws.

    Args:
        problem: the graph.
        texts: uncorrected draws of a model `q`.
        log_model: their log-probabilities under `q`, nats.
    """
    is_tree = np.array([problem.cost_of(text) == 0 for text in texts])
    if not is_tree.any():
        return math.inf
    log_counted = float(np.logaddexp.reduce(-np.array(log_model)[is_tree])) - math.log(len(texts))
    return math.log(problem.number_of_trees()) - log_counted


def draw_figure(
    problem: SpanningTreeProblem, draws: dict[str, list[str]], records: list[dict[str, Any]], path: Path
) -> None:
    """Draw the graph with learned and exact edge marginals; and metrics of the run."""
    kirchhoff = problem.tree_marginals()
    trees = {name: [text for text in texts if problem.cost_of(text) == 0] for name, texts in draws.items()}
    marginals = {name: problem.marginals(found) for name, found in trees.items() if found and name != "exact p_T"}
    with figure(path, [["graph", "graph", "scatter"], ["cost", "share", "mass"]], (13, 8)) as axes:
        learned = marginals.get("corrected", np.zeros(len(problem.edges)))
        pairs = [(problem.nodes[a], problem.nodes[b]) for a, b in problem.edges]
        plot_edge_marginals(axes["graph"], problem.to_networkx(), dict(zip(pairs, learned)), kirchhoff)
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
        plot_along_ladder(axes["share"], records, shares, "share of the rung's proposals")
        plot_along_ladder(axes["mass"], records, {"missing_mass": "missing mass"}, "missing mass (nats)")
