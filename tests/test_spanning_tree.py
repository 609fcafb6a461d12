"""Spanning trees: the cost of every string, Kirchhoff's theorem, and the graphs that have names."""

import itertools
import math
from functools import cache

import hypothesis.strategies as st
import networkx as nx
import numpy as np
import pytest
import torch
from conftest import fuzz
from evaluation.spanning_tree import uncounted_trees
from hypothesis import given
from problems.spanning_tree import SEPARATOR, SpanningTreeProblem, load_problem

from aldrift_hf.selftest.exact import chi_square_p


@cache
def florentine():
    """The problem, all its strings and their costs."""
    problem = load_problem("florentine")
    texts = list(problem.all_texts())
    return problem, texts, np.array(problem.cost([""] * len(texts), texts))


def small(*edges):
    return SpanningTreeProblem.from_graph(nx.Graph(edges))


DIAMOND = small(("a", "b"), ("b", "c"), ("c", "d"), ("d", "a"), ("a", "c"))  # a 4-cycle and a chord


@st.composite
def connected_graphs(draw):
    """A tree on 2 to 7 nodes, and up to four more edges."""
    nodes = draw(st.integers(2, 7))
    graph = nx.Graph([(draw(st.integers(0, node - 1)), node) for node in range(1, nodes)])
    pair = st.tuples(st.integers(0, nodes - 1), st.integers(0, nodes - 1))
    graph.add_edges_from((a, b) for a, b in draw(st.lists(pair, max_size=4)) if a != b)
    return SpanningTreeProblem.from_graph(graph)


def components(nodes, edges):
    """The number of components by union-find, as a reference."""
    parent = list(range(nodes))

    def root(node):
        while parent[node] != node:
            node = parent[node]
        return node

    for a, b in edges:
        parent[root(a)] = root(b)
    return sum(parent[node] == node for node in range(nodes))


@pytest.mark.slow
def test_florentine_families():
    problem, texts, cost = florentine()
    assert (len(problem.nodes), len(problem.edges), problem.size) == (15, 20, 14)
    assert len(texts) == len(set(texts)) == problem.number_of_strings() == 38_760
    trees = int((cost == 0).sum())
    assert trees == 1208
    assert problem.number_of_trees() == pytest.approx(trees)
    assert nx.number_of_spanning_trees(nx.florentine_families_graph()) == pytest.approx(trees)
    assert cost.min() >= 0
    assert cost.max() <= problem.worst_cost


@pytest.mark.slow
def test_marginals_of_trees_are_effective_resistances():
    problem, texts, cost = florentine()
    counted = problem.marginals([text for text, value in zip(texts, cost) if value == 0])
    assert problem.tree_marginals() == pytest.approx(counted)
    assert counted.sum() == pytest.approx(problem.size)
    bridges = {tuple(sorted(pair)) for pair in nx.bridges(problem.to_networkx())}
    names = [tuple(name.split("-")) for name in problem.names]
    assert [value == pytest.approx(1.0) for value in counted] == [tuple(sorted(name)) in bridges for name in names]


@given(connected_graphs())
@fuzz(60)
def test_every_string_of_small_graphs(problem):
    subsets = list(itertools.combinations(range(len(problem.edges)), problem.size))
    texts = list(problem.all_texts())
    cost = problem.cost([""] * len(texts), texts)
    expected = [components(len(problem.nodes), [problem.edges[index] for index in subset]) - 1 for subset in subsets]
    assert cost == expected
    assert all(isinstance(value, float) for value in cost)
    assert max(cost) <= problem.worst_cost
    assert len(set(texts)) == problem.number_of_strings() == math.comb(len(problem.edges), problem.size)
    assert problem.number_of_trees() == pytest.approx(cost.count(0))
    counted = problem.marginals([text for text, value in zip(texts, cost) if value == 0])
    assert problem.tree_marginals() == pytest.approx(counted)


def test_worst_cost_bounds_two_cliques_and_a_path():
    """All `n-1` edges can lie inside the cliques; the bound by degrees also counts edges that leave a clique."""
    graph = nx.disjoint_union(nx.complete_graph(4), nx.complete_graph(4))
    nx.add_path(graph, [0, 8, 9, 10, 11, 12, 4])
    problem = SpanningTreeProblem.from_graph(graph)
    cliques = [index for index, (a, b) in enumerate(problem.edges) if max(a, b) < 8]
    assert len(cliques) == problem.size
    assert problem.worst_cost >= problem.cost_of(problem.to_text(cliques))


@given(st.data())
def test_text_and_back(data):
    problem = data.draw(connected_graphs())
    order = data.draw(st.permutations(range(len(problem.edges))))[: problem.size]
    text = problem.to_text(order)
    assert problem.parse(text) == sorted(order)
    assert problem.parse(f" {text}\n") == sorted(order)


EDGE_NAMES = st.sampled_from(load_problem("florentine").names)


@given(st.text() | st.lists(EDGE_NAMES | st.text(max_size=3), max_size=20).map(SEPARATOR.join))
@fuzz(200)
def test_arbitrary_text(text):
    """No text raises an error, and every text that is not a string of the problem has the worst cost."""
    problem, texts, _ = florentine()
    cost = problem.cost_of(text)
    assert cost == problem.worst_cost or text.strip() in texts


@given(st.data())
@fuzz(60)
def test_damaged_strings(data):
    problem = data.draw(connected_graphs())
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    words = problem.random_texts(1, rng)[0].split(SEPARATOR)
    spot = data.draw(st.integers(0, len(words) - 1))
    damaged = {
        "missing": words[:spot] + words[spot + 1 :],
        "doubled": [*words[: spot + 1], *words[spot:]],
        "replaced": [*words[:spot], words[spot] + "x", *words[spot + 1 :]],
        "reversed edge": [*words[:spot], "-".join(reversed(words[spot].split("-"))), *words[spot + 1 :]],
        "unicode": [*words[:spot], words[spot].replace("-", "\u2010"), *words[spot + 1 :]],
        "extra": [*words, problem.names[-1]],
        "empty word": [*words, ""],
        "empty": [],
    }
    if len(words) > 1:
        damaged["unordered"] = [*words[1:], words[0]]
        damaged["duplicated in place"] = [words[0], *words[:-1]]
    for what, broken in damaged.items():
        assert problem.cost_of(SEPARATOR.join(broken)) == problem.worst_cost > 0, what
    if len(words) > 1:
        assert problem.cost_of(",".join(words)) == problem.worst_cost


def test_a_graph_that_is_a_tree():
    problem = small(("a", "b"), ("b", "c"))
    assert list(problem.all_texts()) == ["a-b, b-c"]
    assert problem.cost(["", ""], ["a-b, b-c", "a-b"]) == [0.0, 1.0]
    assert problem.number_of_trees() == pytest.approx(1)


def test_random_texts_are_uniform():
    texts = list(DIAMOND.all_texts())
    draws = DIAMOND.random_texts(20_000, np.random.default_rng(0))
    counts = torch.tensor([draws.count(text) for text in texts])
    assert counts.sum() == len(draws), "only strings of the problem"
    assert chi_square_p(counts, torch.ones(len(texts))) > 1e-4
    assert DIAMOND.random_texts(5, np.random.default_rng(0)) == DIAMOND.random_texts(5, np.random.default_rng(0))


def test_random_texts_of_a_large_graph_are_well_formed():
    problem = load_problem("davis")
    draws = problem.random_texts(200, np.random.default_rng(1))
    assert all(problem.parse(text) is not None for text in draws)
    assert len(set(draws)) == 200
    share = problem.marginals(draws)
    assert np.abs(share - problem.size / len(problem.edges)).max() < 0.2


def test_marginals_with_weights():
    """Malformed text is ignored, whatever its weight."""
    texts = ["a-b, a-c, a-d", "b-c, a-b", "a-b, b-c, c-d"]
    assert DIAMOND.names == ["a-b", "a-c", "a-d", "b-c", "c-d"]
    assert DIAMOND.marginals(texts) == pytest.approx([1, 0.5, 0.5, 0.5, 0.5])
    weighted = DIAMOND.marginals(texts, np.array([3.0, 100.0, 1.0]))
    assert weighted == pytest.approx([1, 0.75, 0.75, 0.25, 0.25])


@pytest.mark.parametrize("texts", [[], [""], ["nonsense", "a-b"]])
@pytest.mark.filterwarnings("error")
def test_marginals_of_nothing_are_nan(texts):
    share = DIAMOND.marginals(texts)
    assert share.shape == (5,)
    assert np.isnan(share).all()


@pytest.mark.parametrize(
    ("name", "nodes", "edges", "trees"),
    [
        ("florentine", 15, 20, "1.208e+03"),
        ("florentine-core", 10, 15, "1.208e+03"),
        ("tutte", 46, 69, "1.6e+15"),
        ("davis", 32, 89, "1.8e+19"),
        ("karate", 34, 78, "5.1e+15"),
        ("random:12,0.4", 12, 17, "1.193e+03"),
    ],
)
def test_graphs_by_name(name, nodes, edges, trees):
    problem = load_problem(name)
    assert (len(problem.nodes), len(problem.edges)) == (nodes, edges)
    digits = len(trees.split("e")[0].split(".")[1])
    assert f"{problem.number_of_trees():.{digits}e}" == trees
    assert problem.tree_marginals().sum() == pytest.approx(problem.size)
    assert len(set(problem.names)) == edges
    for word in problem.names:
        assert word.count("-") == 1
        assert not set(word) & set(", \t\n")
    assert problem == load_problem(name)
    assert nx.utils.graphs_equal(
        SpanningTreeProblem.from_graph(problem.to_networkx()).to_networkx(), problem.to_networkx()
    )


def test_graph_from_an_edge_list(tmp_path):
    path = tmp_path / "square.edgelist"
    path.write_text("# a square\n10 2\n2 1\n1 9\n9 10\n")
    problem = load_problem(str(path))
    assert problem.nodes == ["1", "2", "9", "10"], "numbers in numerical order"
    assert problem.names == ["1-2", "1-9", "2-10", "9-10"]
    assert problem.number_of_trees() == pytest.approx(4)


def test_self_loops_and_parallel_edges_are_left_out():
    problem = SpanningTreeProblem.from_graph(nx.MultiGraph([(0, 1), (1, 0), (1, 1), (1, 2)]))
    assert problem.names == ["0-1", "1-2"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown", "florentine, florentine-core, davis, tutte, karate, random:N,P"),
        ("", "florentine"),
        ("random:x", r"random:12,0\.4"),
        ("random:12", r"random:12,0\.4"),
        ("random:12,0.4,1", r"random:12,0\.4"),
        ("random:a,b", r"random:12,0\.4"),
        ("random:5,0.01", "not connected; raise N or P"),
        ("random:1,0.5", "raise N or P"),
        ("random:0,0.5", "raise N or P"),
        ("random:-3,0.5", "random:"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(ValueError, match=message):
        load_problem(name)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (nx.DiGraph([(0, 1)]), "undirected"),
        (nx.empty_graph(0), "at least two nodes"),
        (nx.empty_graph(1), "at least two nodes"),
        (nx.empty_graph(2), "connected"),
        (nx.Graph([("a b", "ab")]), "two nodes have the same name"),
        (nx.Graph([("a-b", "a,b")]), "two nodes have the same name"),
        (nx.Graph([(1, "1")]), "two nodes have the same name"),
    ],
    ids=["directed", "none", "one", "disconnected", "space", "hyphen", "types"],
)
def test_bad_graphs(graph, message):
    with pytest.raises(ValueError, match=message):
        SpanningTreeProblem.from_graph(graph)


def test_a_disconnected_edge_list(tmp_path):
    path = tmp_path / "two.edgelist"
    path.write_text("a b\nc d\n")
    with pytest.raises(ValueError, match="connected"):
        load_problem(str(path))


def test_names_are_made_to_fit():
    problem = small(("Evelyn Jefferson", "Anne-Marie"), ("Anne-Marie", "Smith, J."), ("Smith, J.", "\tÉve\u00a0D\n"))
    assert problem.nodes == ["Anne_Marie", "EvelynJefferson", "Smith_J.", "ÉveD"]
    text = problem.to_text(range(problem.size))
    assert text == "Anne_Marie-EvelynJefferson, Anne_Marie-Smith_J., Smith_J.-ÉveD"
    assert problem.cost_of(text) == 0


def test_a_node_named_by_a_superscript():
    assert small(("²", "a")).names == ["a-²"]


def test_trees_that_a_model_does_not_draw_are_missing():
    """For a model that draws half of the trees and other strings, from the probabilities of its draws alone."""
    problem = load_problem("florentine-core")
    trees = [text for text in problem.all_texts() if problem.cost_of(text) == 0]
    others = [text for text in problem.all_texts() if problem.cost_of(text) > 0][:100]
    half = trees[: len(trees) // 2]
    for reached, missing in ((trees, 0.0), (half, np.log(2))):
        texts = reached * 2 + others * 4  # each in exact proportion to its probability
        share = {text: count / len(texts) for rows, count in ((reached, 2), (others, 4)) for text in rows}
        log_model = [np.log(share[text]) for text in texts]
        assert uncounted_trees(problem, texts, log_model) == pytest.approx(missing, abs=1e-9)
    assert uncounted_trees(problem, others, [0.0] * 100) == np.inf
