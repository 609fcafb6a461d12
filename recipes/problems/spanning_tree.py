"""Spanning trees of a graph as text: local constraints in the prior, the global one in the cost.

A string names `n-1` distinct edges of a graph with `n` nodes, in the graph's own order, as in
`"Acciaiuoli-Medici, Albizzi-Ginori, …"`. The prior is uniform over such strings; that a choice of edges connects the
graph is what the cost says: `d = components - 1`, so the strings of cost 0 are the spanning trees.

Exact references cost nothing: Kirchhoff's matrix-tree theorem counts the trees and gives every edge's share in them
(its effective resistance), and where the strings are few, all of them can be enumerated.
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
    """Without the families of one marriage, whose edge is in every tree: the 1,208 trees are the same."""
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
    """A connected graph with a fixed order of its edges, each with a name that holds no separator.

    Attributes:
        nodes: the nodes' names.
        edges: pairs of indices into `nodes`, in the order in which a string names them.
        names: the edges' names, `"A-B"`.
    """

    nodes: list[str]
    edges: list[tuple[int, int]]
    names: list[str]

    @classmethod
    def from_graph(cls, graph: nx.Graph) -> SpanningTreeProblem:
        """From any connected undirected graph; node names are made to fit into text.

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
        """The edges' names."""
        return self.names

    @property
    def separator(self) -> str:
        """Between two edges."""
        return SEPARATOR

    @property
    def size(self) -> int:
        """`n-1`, the number of edges that a string names."""
        return len(self.nodes) - 1

    @property
    def worst_cost(self) -> int:
        """D: a bound on `components - 1` for any `n-1` distinct edges, and the cost of malformed text.

        Edges of rank `r` (their graph has `n - r` components) that fall into `c` components touch `r + c` nodes.
        So they are no more than half of the `r + c` largest degrees, and no more than one clique and `c - 1` single
        edges have. D is `n - 1 - r` for the least rank that has room for `n-1` edges; at least 1, so that malformed
        text never passes for a tree.
        """
        degrees = np.bincount(np.array(self.edges).ravel(), minlength=len(self.nodes))
        half = np.concatenate([[0], np.sort(degrees)[::-1].cumsum()]) // 2

        def room(rank: int) -> int:
            return max(
                min(int(half[min(rank + c, len(self.nodes))]), math.comb(rank - c + 2, 2) + c - 1)
                for c in range(1, rank + 1)
            )

        least = next(rank for rank in range(1, self.size + 1) if rank == self.size or room(rank) >= self.size)
        return max(1, self.size - least)

    def to_text(self, chosen: Sequence[int]) -> str:
        """The string that names these edges (indices), in the graph's order."""
        return SEPARATOR.join(self.names[index] for index in sorted(chosen))

    def parse(self, text: str) -> list[int] | None:
        """The edges that a string names; `None` unless it names `n-1` distinct edges in the graph's order."""
        index = {name: position for position, name in enumerate(self.names)}
        chosen = [index.get(name, -1) for name in text.strip().split(SEPARATOR)]
        ascending = all(a < b for a, b in itertools.pairwise(chosen))
        return chosen if len(chosen) == self.size and chosen[0] >= 0 and ascending else None

    def components(self, chosen: Sequence[int]) -> int:
        """Connected components of the graph with these edges alone."""
        graph = nx.empty_graph(len(self.nodes))
        graph.add_edges_from(self.edges[index] for index in chosen)
        return int(nx.number_connected_components(graph))

    def cost_of(self, text: str) -> float:
        """`components - 1`; the worst cost for malformed text."""
        chosen = self.parse(text)
        return float(self.worst_cost if chosen is None else self.components(chosen) - 1)

    def random_texts(self, count: int, rng: np.random.Generator) -> list[str]:
        """Strings drawn uniformly: what the prior is made from."""
        # The n-1 smallest of independent uniforms are a uniform subset.
        order = rng.random((count, len(self.edges))).argsort(axis=1)[:, : self.size]
        return [self.to_text(row.tolist()) for row in order]

    def number_of_strings(self) -> int:
        """How many well-formed strings there are, `C(edges, n-1)`."""
        return math.comb(len(self.edges), self.size)

    def all_texts(self) -> Iterator[str]:
        """Every well-formed string."""
        return map(self.to_text, itertools.combinations(range(len(self.edges)), self.size))

    def number_of_trees(self) -> float:
        """Kirchhoff's matrix-tree theorem: the determinant of the reduced Laplacian."""
        sign, log_determinant = np.linalg.slogdet(self._laplacian()[1:, 1:])
        return float(sign * np.exp(log_determinant))

    def tree_marginals(self) -> np.ndarray:
        """Share of spanning trees that hold each edge, `[edges]`: its effective resistance."""
        inverse = np.linalg.pinv(self._laplacian(), hermitian=True)
        a, b = np.array(self.edges).T
        resistance: np.ndarray = inverse[a, a] + inverse[b, b] - 2 * inverse[a, b]
        return resistance

    def marginals(self, texts: Sequence[str], weights: np.ndarray | None = None) -> np.ndarray:
        """Share of well-formed strings that name each edge, `[edges]`, weighted if asked; NaN where there are none."""
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
        """The graph with its text names, for drawing."""
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
    """A graph by name: one of networkx's, `random:N,P` (Erdős-Rényi, seed 0), or the path of an edge list.

    `florentine`, `florentine-core` (without its leaves: 10 families, 5,005 strings), `davis`, `tutte` and `karate` are
    known by name.

    Raises:
        ValueError: for a name that is none of these, saying what there is; or a graph that is not connected.
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
            raise ValueError(f"graph {name!r} is no edge list of one, with two nodes a line: {error}") from None
    raise ValueError(f"no graph {name!r}: take {', '.join(_NAMED)}, random:N,P, or the path of an edge list")


def _label(node: object) -> str:
    """A node's name without what the text form uses: `"Evelyn Jefferson"` becomes `"EvelynJefferson"`."""
    return "".join(part for part in str(node).replace("-", "_").replace(",", "_").split())


def _natural(name: str) -> tuple[int, int, str]:
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)
