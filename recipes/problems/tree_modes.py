"""A distribution over spanning trees with two modes, by the degrees that a tree may have."""

from __future__ import annotations

import networkx as nx
import numpy as np

from problems.spanning_tree import SpanningTreeProblem


def largest_degree(problem: SpanningTreeProblem, chosen: list[int]) -> int:
    """The most edges that meet in one node."""
    graph = nx.Graph([problem.edges[index] for index in chosen])
    return max(int(degree) for _, degree in graph.degree())


def two_modes(problem: SpanningTreeProblem) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Half its mass on star-like trees, half on path-like ones, uniform within each mode, none on those between.

    Star-like are the trees whose largest degree is as high as it can be, path-like those whose largest degree is as low
    as it can be.

    Returns:
        The trees of the support, their probabilities `[n]`, and `[n]` whether each is star-like.

    Raises:
        ValueError: where all trees have the same largest degree, so that there are no two modes.
    """
    texts = [text for text in problem.all_texts() if problem.cost_of(text) == 0]
    degrees = np.array([largest_degree(problem, problem.parse(text) or []) for text in texts])
    if degrees.min() == degrees.max():
        raise ValueError("all spanning trees of this graph have the same largest degree: there are no two modes")
    star, path = degrees == degrees.max(), degrees == degrees.min()
    p = star / (2 * star.sum()) + path / (2 * path.sum())
    support = np.flatnonzero(p)
    return [texts[index] for index in support], p[support], star[support]
