"""A distribution over spanning trees with two modes: star-like trees and path-like trees."""

from __future__ import annotations

import networkx as nx
import numpy as np

from problems.spanning_tree import SpanningTreeProblem


def largest_degree(problem: SpanningTreeProblem, chosen: list[int]) -> int:
    """The largest number of edges (given by their indices) that meet in one node."""
    graph = nx.Graph([problem.edges[index] for index in chosen])
    return max(int(degree) for _, degree in graph.degree())


def two_modes(problem: SpanningTreeProblem) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Half of the mass is uniform over the star-like trees, the other half is uniform over the path-like trees.

    A tree is star-like if its largest degree is the highest among all spanning trees, and path-like if its largest
    degree is the lowest.

    Returns:
        The `n` trees of the support, their probabilities `[n]`, and whether each is star-like `[n]`.

    Raises:
        ValueError: if all spanning trees have the same largest degree, so that the two modes are the same.
    """
    texts = [text for text in problem.all_texts() if problem.cost_of(text) == 0]
    degrees = np.array([largest_degree(problem, problem.parse(text) or []) for text in texts])
    if degrees.min() == degrees.max():
        raise ValueError(
            "all spanning trees of this graph have the same largest degree, so there are no two modes. Choose another "
            "graph."
        )
    star, path = degrees == degrees.max(), degrees == degrees.min()
    p = star / (2 * star.sum()) + path / (2 * path.sum())
    support = np.flatnonzero(p)
    return [texts[index] for index in support], p[support], star[support]
