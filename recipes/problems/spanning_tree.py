"""Spanning trees of a graph as text: the local constraints are in the prior, the global one is in the cost.

A string names `n-1` distinct edges of a graph with `n` nodes, in the graph's own order, as in
`"Acciaiuoli-Medici, Albizzi-Ginori, …"`. The prior is uniform over such strings. Whether the edges connect the graph is
left to the cost, `d = components - 1`: the strings of cost 0 are the spanning trees.

Exact references come for free: Kirchhoff's matrix-tree theorem counts the spanning trees and gives the share of them
that contain each edge (its effective resistance). For small graphs all strings can be enumerated as well.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np

from problems.text_problem import TextProblem

SEPARATOR = ", "


def _florentine_core() -> nx.Graph:
    """Without the families that have a single marriage, an edge of every tree: the number of trees stays 1,208."""
    return nx.k_core(nx.florentine_families_graph(), 2)


_NAMED = {
    "florentine": nx.florentine_families_graph,
    "florentine-core": _florentine_core,
    "davis": nx.davis_southern_women_graph,
    "tutte": nx.tutte_graph,
    "karate": nx.karate_club_graph,
}


@dataclass(frozen=True)
class SpanningTreeProblem(TextProblem):
    """A connected graph with a fixed order of its edges, whose names do not contain the separator.

    Attributes:
        nodes: names of the nodes.
        edges: pairs of indices into `nodes`, in the order in which a string names them.
        names: names of the edges, `"A-B"`.
    """

    nodes: list[str]
    edges: list[tuple[int, int]]
    names: list[str]

    @classmethod
    def from_graph(cls, graph: nx.Graph) -> SpanningTreeProblem:
        """From any connected undirected graph. Characters that the text form uses are replaced in the nodes' names.

        Raises:
            ValueError: for a graph that is directed, disconnected, or has fewer than two nodes.
        """
        if graph.is_directed() or graph.number_of_nodes() < 2 or not nx.is_connected(graph):
            raise ValueError("the graph must be undirected and connected, with at least two nodes")
        labels = {node: _label(node) for node in graph}
        if len(set(labels.values())) < len(labels):
            raise ValueError("two nodes have the same name once commas, hyphens and spaces are replaced; rename one")
        nodes = sorted(labels.values(), key=_natural)
        position = {name: index for index, name in enumerate(nodes)}
        pairs = {tuple(sorted((position[labels[a]], position[labels[b]]))) for a, b in graph.edges() if a != b}
        edges = sorted((int(a), int(b)) for a, b in pairs)
        return cls(nodes, edges, [f"{nodes[a]}-{nodes[b]}" for a, b in edges])

    @property
    def words(self) -> list[str]:
        """The names of the edges."""
        return self.names

    @property
    def separator(self) -> str:
        """The text between two edges."""
        return SEPARATOR

    @property
    def size(self) -> int:
        """`n-1`, the number of edges in a string."""
        return len(self.nodes) - 1

    @property
    def worst_cost(self) -> int:
        """D: an upper bound on `components - 1` for any `n-1` distinct edges, and the cost of malformed text.

        A set of edges has rank `r` if the graph with these edges alone has `n - r` components. If the edges form `c`
        components, they touch `r + c` nodes. So their number is at most half the sum of the `r + c` largest degrees,
        and at most the number of edges of one clique and `c - 1` single edges. D is `n - 1 - r` for the smallest rank
        `r` that allows `n-1` edges; but at least 1, so that malformed text does not count as a tree.
        """
        degrees = np.bincount(np.array(self.edges).ravel(), minlength=len(self.nodes))
        half = np.concatenate([[0], np.sort(degrees)[::-1].cumsum()]) // 2

        def room(rank: int) -> int:
            return max(
                min(int(half[min(rank + c, len(self.nodes))]), math.comb(rank - c + 2, 2) + c - 1)
                for c in range(1, rank + 1)
            )

        smallest = next(rank for rank in range(1, self.size + 1) if rank == self.size or room(rank) >= self.size)
        return max(1, self.size - smallest)

    def to_text(self, chosen: Sequence[int]) -> str:
        """The string of a set of edges, given by their indices."""
        return SEPARATOR.join(self.names[index] for index in sorted(chosen))

    def parse(self, text: str) -> list[int] | None:
        """The indices of the edges in a text; `None` unless it names `n-1` distinct edges in the graph's order."""
        index = {name: position for position, name in enumerate(self.names)}
        chosen = [index.get(name, -1) for name in text.strip().split(SEPARATOR)]
        ascending = all(a < b for a, b in itertools.pairwise(chosen))
        return chosen if len(chosen) == self.size and chosen[0] >= 0 and ascending else None

    def components(self, chosen: Sequence[int]) -> int:
        """The number of connected components of the graph with these edges alone."""
        graph = nx.empty_graph(len(self.nodes))
        graph.add_edges_from(self.edges[index] for index in chosen)
        return int(nx.number_connected_components(graph))

    def cost_of(self, text: str) -> float:
        """`components - 1`; D for malformed text."""
        chosen = self.parse(text)
        return float(self.worst_cost if chosen is None else self.components(chosen) - 1)

    def random_texts(self, count: int, rng: np.random.Generator) -> list[str]:
        """Draw strings uniformly."""
        # The positions of the n-1 smallest of independent uniform numbers are a uniform subset.
        order = rng.random((count, len(self.edges))).argsort(axis=1)[:, : self.size]
        return [self.to_text(row.tolist()) for row in order]

    def number_of_strings(self) -> int:
        """The number of strings, `C(edges, n-1)`."""
        return math.comb(len(self.edges), self.size)

    def all_texts(self) -> Iterator[str]:
        """Every string."""
        return map(self.to_text, itertools.combinations(range(len(self.edges)), self.size))

    def number_of_trees(self) -> float:
        """The number of spanning trees, by Kirchhoff's theorem: the determinant of the reduced Laplacian."""
        sign, log_determinant = np.linalg.slogdet(self._laplacian()[1:, 1:])
        return float(sign * np.exp(log_determinant))

    def tree_marginals(self) -> np.ndarray:
        """The share of spanning trees that contain each edge, `[edges]`: its effective resistance."""
        inverse = np.linalg.pinv(self._laplacian(), hermitian=True)
        a, b = np.array(self.edges).T
        resistance: np.ndarray = inverse[a, a] + inverse[b, b] - 2 * inverse[a, b]
        return resistance

    def marginals(self, texts: Sequence[str], weights: np.ndarray | None = None) -> np.ndarray:
        """The share of strings that contain each edge.

        Args:
            texts: any texts; malformed ones are ignored.
            weights: one weight per text; `None` weights all texts equally.

        Returns:
            `[edges]`; NaN if all texts are malformed.
        """
        used = np.zeros((len(texts), len(self.edges)))
        well_formed = np.zeros(len(texts), dtype=bool)
        for row, text in enumerate(texts):
            chosen = self.parse(text)
            if chosen is not None:
                used[row, chosen], well_formed[row] = 1.0, True
        weights = well_formed * (1.0 if weights is None else weights)
        with np.errstate(invalid="ignore"):
            share: np.ndarray = weights @ used / weights.sum()
        return share

    def to_networkx(self) -> nx.Graph:
        """The graph, its nodes named as in texts."""
        graph = nx.Graph()
        graph.add_nodes_from(self.nodes)
        graph.add_edges_from((self.nodes[a], self.nodes[b]) for a, b in self.edges)
        return graph

    def _laplacian(self) -> np.ndarray:
        laplacian = np.zeros((len(self.nodes), len(self.nodes)))
        for a, b in self.edges:
            laplacian[[a, b], [a, b]] += 1
            laplacian[[a, b], [b, a]] -= 1
        return laplacian


def load_problem(name: str) -> SpanningTreeProblem:
    """The problem of a graph given by name.

    Args:
        name: `florentine`, `florentine-core` (without its leaves: 10 families, 5,005 strings), `davis`, `tutte` or
            `karate`, which networkx ships; `random:N,P`, an Erdős-Rényi graph drawn with seed 0; or the path of a file
            with an edge list.

    Raises:
        ValueError: if there is no such graph, if the file is not an edge list, or if the graph is not connected. The
            message says what is allowed.
    """
    if name in _NAMED:
        return SpanningTreeProblem.from_graph(_NAMED[name]())
    if name.startswith("random:"):
        try:
            nodes, probability = name.removeprefix("random:").split(",")
            graph = nx.gnp_random_graph(int(nodes), float(probability), seed=0)
        except (ValueError, nx.NetworkXError) as error:
            raise ValueError(f"graph {name!r} is not random:N,P, as in random:12,0.4 ({error})") from None
        if graph.number_of_nodes() < 2 or not nx.is_connected(graph):
            raise ValueError(f"graph {name!r} is not connected; raise N or P")
        return SpanningTreeProblem.from_graph(graph)
    if os.path.isfile(name):
        try:
            return SpanningTreeProblem.from_graph(nx.read_edgelist(name, data=False))
        except (ValueError, OSError) as error:
            raise ValueError(
                f"graph {name!r} is not the edge list of a connected graph, with two nodes per line: {error}"
            ) from None
    raise ValueError(f"there is no graph {name!r}: use {', '.join(_NAMED)}, random:N,P, or the path of an edge list")


def _label(node: object) -> str:
    """A node's name as in texts: hyphens and commas become underscores, and blanks are removed."""
    return "".join(part for part in str(node).replace("-", "_").replace(",", "_").split())


def _natural(name: str) -> tuple[int, int, str]:
    """A sorting key: numbers in numerical order, before other names."""
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)
