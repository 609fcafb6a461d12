"""Clusterings of real measurements as text: local hints are in the prior, the global fit is in the cost.

The points of a data set are in a fixed order, a tour that goes from each point to the nearest one not yet visited. A
string names the cluster of each point in this order, as in `"a a b b a c …"`. Clusters are named in order of appearance
(the first point's is `a`, the next new one is `b`), so every partition has exactly one string.

The local rule is a chain of hints between consecutive points of the tour. A *must-link*, given to some pairs of one
species, puts both points into the same cluster. A *prefer-link* does so with a probability that falls with their
distance. With `k` clusters and the distance `g_i` from point `i-1` to point `i`,

    P(same cluster as point i-1) = 1/k + (1 - 1/k)·exp(-g_i / mean g),  or 1 for a must-link,

and all other clusters share the rest equally. The cost is the within-cluster sum of squares `W`, relative to the best
known one `W*`:

    d = 10·(W / W* - 1),    W = Σ_clusters Σ_points ‖x - mean‖².

`W*` is the best of 100 runs of k-means, which ignores the hints. D is the cost of a single cluster, because no
partition has a larger `W`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import comb, factorial
from typing import Any, cast

import numpy as np
from sklearn.cluster import KMeans
from sklearn.datasets import load_iris, load_wine
from sklearn.preprocessing import StandardScaler

from problems.text_problem import TextProblem

_DATASETS = {"iris": load_iris, "wine": load_wine}


@dataclass(frozen=True, eq=False)
class ClusteringProblem(TextProblem):
    """Points in the order of their tour.

    Attributes:
        points: `[n, features]`.
        species: `[n]`, the class of each point. The hints depend on it, the cost does not.
        clusters: k, from 2 to 26.
        must_link: `[n]`, whether a point must be in the same cluster as the previous one; false for the first.

    Raises:
        ValueError: if there are not more points than clusters, or more clusters than letters.
    """

    points: np.ndarray
    species: np.ndarray
    clusters: int
    must_link: np.ndarray

    def __post_init__(self) -> None:
        if not 2 <= self.clusters <= min(26, len(self.points) - 1):
            raise ValueError(
                f"clusters must be from 2 to 26 and fewer than the points, got {self.clusters} for {len(self.points)}"
            )

    @classmethod
    def load(
        cls, name: str, points: int, clusters: int = 3, must_link_share: float = 0.3, seed: int = 0
    ) -> ClusteringProblem:
        """Points of one of scikit-learn's data sets.

        Args:
            name: `iris` (in cm) or `wine` (standardised).
            points: number of points to take, in equal shares of the species; all of them if there are fewer.
            clusters: k.
            must_link_share: share of must-links among the consecutive pairs of one species.
            seed: random seed of the choice of must-links.

        Raises:
            ValueError: if there is no such data set, or a number is out of range.
        """
        if name not in _DATASETS:
            raise ValueError(f"there is no data set {name!r}: use {' or '.join(_DATASETS)}")
        if not 0 <= must_link_share <= 1:
            raise ValueError(f"must_link_share must be in [0, 1], got {must_link_share}")
        features, species = cast(tuple[np.ndarray, np.ndarray], _DATASETS[name](return_X_y=True))
        if name == "wine":  # each feature has its own unit
            features = StandardScaler().fit_transform(features)
        # The data sets are sorted by species, so evenly spaced rows contain every species in proportion.
        chosen = np.unique(np.linspace(0, len(features) - 1, max(points, 1)).round().astype(int))
        tour = chosen[_tour(features[chosen])]
        alike = np.append(False, species[tour][1:] == species[tour][:-1])
        must_link = alike & (np.random.default_rng(seed).random(len(tour)) < must_link_share)
        return cls(features[tour], species[tour], clusters, must_link)

    @property
    def words(self) -> list[str]:
        """The names of the clusters."""
        return [chr(ord("a") + cluster) for cluster in range(self.clusters)]

    @property
    def separator(self) -> str:
        """The text between two points."""
        return " "

    @cached_property
    def best_known(self) -> float:
        """`W*`, the smallest within-cluster sum of squares among 100 runs of k-means."""
        return float(self.kmeans(runs=100, seed=0).inertia_)

    @property
    def worst_cost(self) -> float:
        """D, the cost of a single cluster with all points."""
        return 10 * (self.sum_of_squares([0] * len(self.points)) / self.best_known - 1)

    @cached_property
    def same(self) -> np.ndarray:
        """The probability that a point is in the same cluster as the previous one, `[n]`; 0 for the first."""
        gaps = np.linalg.norm(np.diff(self.points, axis=0), axis=1)
        k = self.clusters
        prefer = 1 / k + (1 - 1 / k) * np.exp(-gaps / gaps.mean())
        return np.append(0.0, np.where(self.must_link[1:], 1.0, prefer))

    def sum_of_squares(self, labels: Sequence[int]) -> float:
        """`W`, the within-cluster sum of squares; `labels` are `[n]` indices of clusters."""
        one_hot = np.eye(self.clusters)[np.asarray(labels)]
        sizes = np.maximum(one_hot.sum(0), 1)
        means = (one_hot.T @ self.points) / sizes[:, None]
        return float(((self.points - means[np.asarray(labels)]) ** 2).sum())

    def kmeans(self, runs: int, seed: int) -> Any:
        """A fitted scikit-learn `KMeans`, the best of a number of runs."""
        return KMeans(self.clusters, n_init=runs, random_state=seed).fit(self.points)

    def links_kept(self, labels: Sequence[int]) -> float:
        """The share of must-links whose two points are in one cluster; NaN if there are no must-links."""
        kept = np.diff(np.asarray(labels))[self.must_link[1:]] == 0
        return float(kept.mean()) if len(kept) else float("nan")

    def to_text(self, labels: Sequence[int]) -> str:
        """The string of a partition. `labels` may number the clusters in any order."""
        order = {label: name for name, label in enumerate(dict.fromkeys(labels))}
        return self.separator.join(self.words[order[label]] for label in labels)

    def parse(self, text: str) -> list[int] | None:
        """The cluster of each point, as a text names it; `None` unless the text is the string of a partition."""
        position = {word: index for index, word in enumerate(self.words)}
        labels = [position.get(word, self.clusters) for word in text.strip().split(self.separator)]
        newest = -1
        for label in labels:
            if label > newest + 1:
                return None
            newest = max(newest, label)
        return labels if len(labels) == len(self.points) and newest < self.clusters else None

    def cost_of(self, text: str) -> float:
        """`10·(W / W* - 1)`, at least 0; D for malformed text."""
        labels = self.parse(text)
        if labels is None:
            return self.worst_cost
        return max(0.0, 10 * (self.sum_of_squares(labels) / self.best_known - 1))

    def random_texts(self, count: int, rng: np.random.Generator) -> list[str]:
        """Draw strings by the hints alone."""
        labels = np.zeros((count, len(self.points)), dtype=int)
        labels[:, 0] = rng.integers(self.clusters, size=count)
        for point in range(1, len(self.points)):
            before = labels[:, point - 1]
            other = (before + rng.integers(1, self.clusters, size=count)) % self.clusters
            labels[:, point] = np.where(rng.random(count) < self.same[point], before, other)
        return [self.to_text(row) for row in labels.tolist()]

    def number_of_strings(self) -> int:
        """The number of partitions into at most `k` clusters: a sum of Stirling numbers of the second kind."""
        n = len(self.points)
        return sum(_partitions(n, blocks) for blocks in range(1, self.clusters + 1))

    def all_texts(self) -> Iterator[str]:
        """Every partition."""

        def grow(labels: list[int], newest: int) -> Iterator[list[int]]:
            if len(labels) == len(self.points):
                yield labels
                return
            for label in range(min(newest + 2, self.clusters)):
                yield from grow([*labels, label], max(newest, label))

        return map(self.to_text, grow([], -1))


def _partitions(n: int, blocks: int) -> int:
    """The Stirling number of the second kind, by inclusion and exclusion over empty blocks."""
    onto = sum((-1 if j % 2 else 1) * comb(blocks, j) * pow(blocks - j, n) for j in range(blocks + 1))
    return int(onto // factorial(blocks))


def _tour(points: np.ndarray) -> list[int]:
    """The indices of the points in tour order, from the point farthest from the mean always to the nearest one left."""
    left = list(range(len(points)))
    tour = [int(np.linalg.norm(points - points.mean(0), axis=1).argmax())]
    left.remove(tour[0])
    while left:
        gaps = np.linalg.norm(points[left] - points[tour[-1]], axis=1)
        tour.append(left.pop(int(gaps.argmin())))
    return tour
