"""Clustering: partitions as text, the sum of squares, and the hints that the prior learns."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import fuzz
from hypothesis import given
from problems.clustering import ClusteringProblem
from sklearn.datasets import load_iris
from sklearn.metrics import adjusted_rand_score

from aldrift_hf.selftest.exact import chi_square_p

RNG = np.random.default_rng(3)
SMALL = ClusteringProblem(
    points=np.concatenate([RNG.normal(0, 1, (3, 2)), RNG.normal(3, 1, (3, 2))]),
    species=np.array([0, 0, 0, 1, 1, 1]),
    clusters=3,
    must_link=np.array([False, True, False, False, False, True]),
)
IRIS = ClusteringProblem.load("iris", 24)


def test_every_partition_has_one_string():
    texts = list(SMALL.all_texts())
    partitions = {
        frozenset(frozenset(i for i, label in enumerate(labels) if label == cluster) for cluster in set(labels))
        for labels in itertools.product(range(3), repeat=6)
    }
    assert len(texts) == len(set(texts)) == SMALL.number_of_strings() == len(partitions) == 122
    assert {SMALL.to_text(labels) for labels in itertools.product(range(3), repeat=6)} == set(texts)
    for text in texts:
        labels = SMALL.parse(text)
        assert SMALL.to_text(labels) == text
        assert SMALL.parse(f" {text}\n") == labels


@pytest.mark.parametrize("n", [3, 5, 8])
def test_number_of_strings(n):
    problem = ClusteringProblem(np.zeros((n, 1)), np.zeros(n, int), 2, np.zeros(n, bool))
    assert problem.number_of_strings() == 2 ** (n - 1)


def test_sum_of_squares_by_hand():
    for text in SMALL.all_texts():
        labels = np.array(SMALL.parse(text))
        parts = [SMALL.points[labels == cluster] for cluster in set(labels)]
        expected = sum(((part - part.mean(0)) ** 2).sum() for part in parts)
        assert SMALL.sum_of_squares(labels) == pytest.approx(expected)


def test_best_known_is_the_best_of_all():
    """On a small instance k-means finds the optimum, and a single cluster is the worst."""
    texts = list(SMALL.all_texts())
    squares = [SMALL.sum_of_squares(SMALL.parse(text)) for text in texts]
    costs = SMALL.cost([""] * len(texts), texts)
    assert SMALL.best_known == pytest.approx(min(squares))
    assert min(costs) == pytest.approx(0, abs=1e-9)
    assert max(costs) == pytest.approx(SMALL.worst_cost)
    assert costs[squares.index(max(squares))] == SMALL.cost_of("a a a a a a")
    assert costs == pytest.approx([10 * (value / min(squares) - 1) for value in squares], abs=1e-9)


def test_known_figure_of_iris():
    """The within-cluster sum of squares of iris with three clusters is known to be 78.85."""
    problem = ClusteringProblem.load("iris", 150)
    assert problem.best_known == pytest.approx(78.85, abs=0.005)
    assert sorted(map(tuple, problem.points)) == sorted(map(tuple, load_iris().data))
    assert problem.kmeans(5, 0).inertia_ == pytest.approx(problem.sum_of_squares(problem.kmeans(5, 0).labels_))


@given(st.lists(st.integers(0, 2), min_size=6, max_size=6), st.permutations(range(3)))
def test_the_names_of_clusters_do_not_matter(labels, names):
    renamed = [names[label] for label in labels]
    assert SMALL.to_text(renamed) == SMALL.to_text(labels)
    assert SMALL.sum_of_squares(renamed) == pytest.approx(SMALL.sum_of_squares(labels))
    assert adjusted_rand_score(SMALL.parse(SMALL.to_text(labels)), labels) == 1
    assert 0 <= SMALL.cost_of(SMALL.to_text(labels)) <= SMALL.worst_cost + 1e-9


@pytest.mark.slow
@given(st.text() | st.lists(st.sampled_from(["a", "b", "c", "d", "A", "", "aa"]), max_size=8).map(" ".join))
@fuzz(200)
def test_arbitrary_text(text):
    """No text raises an error, and every text that is not a partition has the worst cost."""
    assert SMALL.cost_of(text) == SMALL.worst_cost or text.strip() in set(SMALL.all_texts())


def test_damaged_texts_cost_the_worst():
    for text in (
        "",
        "a",
        "a a a a a",
        "a a a a a a a",
        "b a a a a a",
        "a c a a a a",
        "a  a a a a a",
        "aaaaaa",
        "a a b c d a",
    ):
        assert SMALL.parse(text) is None, text
        assert SMALL.cost_of(text) == SMALL.worst_cost > 0, text


def test_draws_follow_the_hints():
    """A chain: the previous point's cluster with probability `same`, otherwise any other with equal probability."""
    texts = list(SMALL.all_texts())
    k = SMALL.clusters
    probability = np.zeros(len(texts))
    for labels in itertools.product(range(k), repeat=6):
        kept = np.diff(labels) == 0
        chance = np.where(kept, SMALL.same[1:], (1 - SMALL.same[1:]) / (k - 1)).prod() / k
        probability[texts.index(SMALL.to_text(labels))] += chance
    assert probability.sum() == pytest.approx(1)
    draws = SMALL.random_texts(20_000, np.random.default_rng(0))
    counts = torch.tensor([draws.count(text) for text in texts])
    assert chi_square_p(counts, torch.tensor(probability)) > 1e-4


def test_prefer_links_weaken_with_distance():
    gaps = np.linalg.norm(np.diff(SMALL.points, axis=0), axis=1)
    free = ~SMALL.must_link[1:]
    assert SMALL.same[1:][~free] == pytest.approx(1)
    assert (np.argsort(gaps[free]) == np.argsort(-SMALL.same[1:][free])).all()
    assert (SMALL.same[1:] > 1 / 3).all()


def test_must_links_are_kept_and_join_one_species():
    assert IRIS.must_link.sum() > 3
    for start in np.flatnonzero(IRIS.must_link):
        assert IRIS.species[start] == IRIS.species[start - 1]
    draws = IRIS.random_texts(200, np.random.default_rng(0))
    assert all(IRIS.links_kept(IRIS.parse(text)) == 1 for text in draws)
    apart = np.arange(24) % 3
    assert IRIS.links_kept(apart) == 0
    assert ClusteringProblem.load("iris", 24).must_link.tolist() == IRIS.must_link.tolist()


def test_tour_visits_every_point_and_stays_close():
    points = load_iris().data[np.unique(np.linspace(0, 149, 24).round().astype(int))]
    assert sorted(map(tuple, IRIS.points)) == sorted(map(tuple, points))
    step = np.linalg.norm(np.diff(IRIS.points, axis=0), axis=1).mean()
    shuffled = points[np.random.default_rng(0).permutation(24)]
    assert step < 0.5 * np.linalg.norm(np.diff(shuffled, axis=0), axis=1).mean()


def test_wine_is_standardised():
    problem = ClusteringProblem.load("wine", 178)
    assert problem.points.std(axis=0) == pytest.approx(1)
    assert problem.best_known == pytest.approx(1277.9, abs=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "penguins"}, "there is no data set 'penguins': use iris or wine"),
        ({"clusters": 1}, "clusters must be from 2 to 26 and fewer than the points, got 1 for 24"),
        ({"clusters": 27}, "from 2 to 26"),
        ({"clusters": 24}, "fewer than the points"),
        ({"points": 0}, "fewer than the points"),
        ({"must_link_share": 1.5}, "must_link_share must be in"),
    ],
)
def test_bad_problems(settings, message):
    with pytest.raises(ValueError, match=message):
        ClusteringProblem.load(**{"name": "iris", "points": 24, **settings})
