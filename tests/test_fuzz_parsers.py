"""The problems of the recipes can evaluate any text: 100,000 texts, most of them almost well-formed."""

import asyncio
import itertools
import math

import hypothesis.strategies as st
import networkx as nx
import numpy as np
import pytest
from conftest import fuzz
from hypothesis import given
from problems.clustering import ClusteringProblem
from problems.line_scheduling import LineSchedulingProblem
from problems.round_trips import RoundTripProblem
from problems.spanning_tree import SpanningTreeProblem, load_problem
from problems.tree_modes import largest_degree

pytestmark = pytest.mark.slow

TEXTS = 50
"""Texts per example of Hypothesis, which makes about a thousand examples per second."""

# Digits of other scripts (int() reads the first two, isdigit() accepts all but the last), signs, blanks, surrogates,
# which are not valid Unicode text, and characters that cause trouble in text files.
ODD = [
    *("٣", "３", "²", "Ⅷ", "+1", "-1", "01", "1_0", "1e1", "1.0", "0", "9" * 5000, "\0", "\ud800", "\udfff", "\ufeff"),
    *(
        "\t",
        "\n",
        "\r\n",
        "\x0b",
        "\x1c",
        "\x85",
        "\xa0",
        "\u2028",
        "\u3000",
        "\u200b",
        " ",
        "  ",
        ",",
        ", ",
        ",,",
        "-",
    ),
    *("<|endoftext|>", "a\u0301", "\U0001f600", "A", "a" * 10_000),
]
BLANKS = ["", "", " ", "\n", "\t ", "\x1c", "\x85", "\u3000"]

TREES = SpanningTreeProblem.from_graph(nx.cycle_graph(["3", "1", "2", "٣"]))
PROBLEMS = {
    "trees": TREES,
    "trees with disconnected choices": SpanningTreeProblem.from_graph(nx.lollipop_graph(4, 1)),
    "line": LineSchedulingProblem(stations=3, longest_visit=12, phase=2),
    "clusters": ClusteringProblem.load("iris", 6),
    "trips": RoundTripProblem(),
}


def encoded(text):
    return text.encode(errors="surrogatepass")


def texts_near(problem):
    """Lists of texts: any text, and strings of the problem with words left out, repeated, moved or replaced."""
    pieces = st.sampled_from([*problem.words, problem.separator, *ODD])
    joined = st.lists(st.sampled_from([*problem.words, *problem.words, *ODD]), max_size=8).map(problem.separator.join)
    size = len(next(problem.all_texts()).split(problem.separator))
    disordered = st.lists(st.sampled_from(problem.words), min_size=size, max_size=size).map(problem.separator.join)
    whole = st.sampled_from(list(itertools.islice(problem.all_texts(), 2000)))
    cut = st.tuples(whole, st.integers(0, 30), pieces).map(lambda t: t[0][: t[1]] + t[2] + t[0][t[1] :])
    framed = st.tuples(st.sampled_from(BLANKS), whole, st.sampled_from(BLANKS)).map("".join)
    any_text = st.text(st.characters(exclude_categories=()), max_size=8)
    return st.lists(any_text | joined | disordered | cut | framed, min_size=TEXTS, max_size=TEXTS)


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_text_has_a_cost_and_only_strings_of_the_problem_a_meaning(name):
    problem = PROBLEMS[name]
    every = set(problem.all_texts())
    assert len(every) == problem.number_of_strings()
    worst, seen, read = problem.worst_cost, 0, 0

    @fuzz(examples=410)
    @given(texts_near(problem))
    def check(texts):
        nonlocal seen, read
        costs = problem.cost([""] * len(texts), texts) if name != "trips" else list(map(problem.cost_of, texts))
        for text, cost in zip(texts, costs, strict=True):
            assert type(cost) is float
            assert 0 <= cost <= worst * (1 + 1e-9) < math.inf, "the trainer accepts it under objective_range=D"
            assert problem.cost_of(text) == cost, "it does not depend on the rest of the batch"
            # Blanks around a string are ignored, except for trips, which continue where the prompt ends.
            string = text if name == "trips" else text.strip()
            assert string in every or cost == worst
            if name != "trips":
                parsed = problem.parse(text)
                assert (parsed is not None) == (string in every)
                assert parsed is None or problem.to_text(parsed) == string
            read += string in every
        seen += len(texts)

    check()
    assert seen >= 20_000
    assert seen / 100 < read < seen / 2, "there are strings and malformed texts"


@fuzz(examples=50)
@given(st.data())
def test_shares_of_a_batch_are_those_of_its_well_formed_texts(data):
    for problem, figures in (
        (TREES, TREES.marginals),
        (PROBLEMS["line"], PROBLEMS["line"].visit_shares),
    ):
        texts = data.draw(texts_near(problem))
        well_formed = [text.strip() for text in texts if problem.parse(text) is not None]
        np.testing.assert_allclose(figures(texts), figures(well_formed))
    line = PROBLEMS["line"]
    finite = np.isfinite(line.log_probs(line.marginals(1.0), texts))
    assert finite.tolist() == [line.parse(text) is not None for text in texts]
    assert all(1 <= largest_degree(TREES, TREES.parse(text)) <= 2 for text in TREES.all_texts())


@fuzz(examples=100)
@given(prompts=texts_near(RoundTripProblem()), completions=texts_near(RoundTripProblem()))
def test_a_trip_is_its_prompt_and_what_follows(recipe_module, prompts, completions):
    ours, recipe = RoundTripProblem(), recipe_module("custom_objective")
    starts = [prompt if index % 2 else ours.words[index % 7] for index, prompt in enumerate(prompts)]
    for costs, worst in (
        (ours.cost(starts, completions), ours.worst_cost),
        (recipe.cost(starts, completions), 20.0),
    ):
        assert all(type(cost) is float and 0 <= cost <= worst for cost in costs)


@fuzz(examples=100)
@given(printed=st.lists(st.binary() | st.sampled_from([f" {odd}\n" for odd in ODD]).map(encoded), min_size=20))
def test_whatever_a_program_prints_has_a_cost(recipe_module, printed):
    programs = recipe_module("external_objective")
    costs = [programs.cost_of(output) for output in printed]
    assert all(type(cost) is float and 0 <= cost <= programs.D for cost in costs)


def test_whatever_a_program_is_it_has_a_cost(recipe_module):
    programs = recipe_module("external_objective")
    texts = ["print(42)", "print('\ud800')", "print('٤٢')", "print(٤٢)", "²", "\0", "(" * 10_000, "print(10**5000)"]
    costs = asyncio.run(programs.Programs(timeout=10.0, outages=0.0)([""] * len(texts), texts))
    assert costs == [0.0] + [programs.D] * 7


def loaded(name):
    """The problem of a graph, or the error message."""
    try:
        return load_problem(name), ""
    except ValueError as error:
        return None, str(error)


NAMES = [
    "random:",
    "random:12,0.4",
    "random:3,",
    "1",
    ",",
    "٣",
    "-",
    "nan",
    "inf",
    "0.5",
    ".",
    "/",
    "\0",
    "a" * 300,
    "\ud800",
]


@fuzz(examples=500)
@given(st.text(max_size=20) | st.lists(st.sampled_from(NAMES), max_size=4).map("".join))
def test_a_graph_is_loaded_or_refused_by_name(name):
    problem, why = loaded(name)
    assert "graph" in why or problem.parse(next(problem.all_texts())) is not None


LINES = st.lists(st.sampled_from(["a", "b", "A-", "-", "_", ",", "#", "{}", "1", "01", "٣", "²", "é", " "]), max_size=4)


@fuzz(examples=300)
@given(st.binary(max_size=20) | st.lists(LINES.map(" ".join), max_size=8).map(lambda lines: "\n".join(lines).encode()))
def test_an_edge_list_is_a_graph_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "edges"
    path.write_bytes(content)
    problem, why = loaded(str(path))
    assert problem is not None or f"graph {str(path)!r}" in why
    if problem is not None:
        text = next(problem.all_texts())
        assert problem.to_text(problem.parse(text)) == text
        assert all(0 <= problem.cost_of(other) <= problem.worst_cost for other in (text, "", text + "\n", text * 2))
