"""Line scheduling: the clock, the exact target, and the text form."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import fuzz
from hypothesis import given
from problems.line_scheduling import LineSchedulingProblem

from aldrift_hf.selftest.exact import chi_square_p

SMALL = LineSchedulingProblem(stations=3, longest_visit=6, travel=4, headway=5, phase=2, preference=1.5)


@st.composite
def lines(draw):
    return LineSchedulingProblem(
        stations=draw(st.integers(1, 4)),
        longest_visit=draw(st.integers(1, 7)),
        travel=draw(st.integers(0, 12)),
        headway=draw(st.integers(1, 9)),
        phase=draw(st.integers(-3, 12)),
        preference=draw(st.floats(-3, 3)),
    )


def wait_by_looking_at_the_clock(problem, visits):
    """The waiting time by the definition alone, minute by minute."""
    departures = {problem.phase + problem.headway * n for n in range(-100, 1000)}
    clock, waited = 0, 0
    for visit in visits:
        clock += visit
        while clock not in departures:
            clock += 1
            waited += 1
        clock += problem.travel
    return waited


@given(st.data())
@fuzz(60)
def test_cost_is_what_a_traveller_waits(data):
    problem = data.draw(lines())
    visits = data.draw(
        st.lists(st.integers(1, problem.longest_visit), min_size=problem.stations, max_size=problem.stations)
    )
    cost = problem.cost_of(problem.to_text(visits))
    assert cost == wait_by_looking_at_the_clock(problem, visits)
    assert 0 <= cost <= problem.worst_cost
    assert cost == sum(problem.waits_alone[i, visit - 1] for i, visit in enumerate(visits)), "waits are independent"


@given(lines())
@fuzz(30)
def test_worst_cost_is_reached(problem):
    costs = problem.cost([], list(problem.all_texts()))
    assert len(costs) == problem.number_of_strings() == problem.longest_visit**problem.stations
    assert max(costs) == problem.worst_cost or (max(costs) == 0 and problem.worst_cost == 1)


def test_defaults():
    """Ten stations and a departure every five minutes: the longest waiting time is ten times four minutes."""
    problem = LineSchedulingProblem()
    assert problem.worst_cost == 40
    assert problem.cost_of(", ".join(["10"] * 10)) == 0
    assert problem.cost_of(", ".join(["11"] * 10)) == 40
    assert problem.favourites == [1, 4, 7]
    without_wait = (problem.waits_alone == 0).sum(axis=1)
    assert without_wait.prod() == 4**10


@pytest.mark.parametrize("tau", [0.0, 0.7, 3.0])
def test_exact_target_by_enumeration(tau):
    """The product of marginals is the normalised `L(v)·exp(-τ·d(v))` over all schedules."""
    texts = list(SMALL.all_texts())
    log_prior = SMALL.log_probs(SMALL.marginals(0.0), texts)
    assert np.exp(log_prior).sum() == pytest.approx(1)
    tilted = log_prior - tau * np.array(SMALL.cost([], texts))
    expected = tilted - np.logaddexp.reduce(tilted)
    assert SMALL.log_probs(SMALL.marginals(tau), texts) == pytest.approx(expected)


def test_prior_prefers_long_visits_at_some_stations():
    """`L_i(v) ∝ exp(± preference · v / V)`, written out."""
    rows = SMALL.marginals(0.0)
    ratio = np.exp(SMALL.preference / SMALL.longest_visit)
    assert SMALL.favourites == [1]
    assert rows[1][1:] / rows[1][:-1] == pytest.approx(ratio)
    assert rows[0][1:] / rows[0][:-1] == pytest.approx(1 / ratio)
    means = rows @ np.arange(1, 7)
    assert SMALL.preference_gap(rows) == pytest.approx(means[1] - (means[0] + means[2]) / 2)
    indifferent = LineSchedulingProblem(preference=0.0)
    assert indifferent.preference_gap(indifferent.marginals(0.0)) == pytest.approx(0)


def test_draws_follow_the_marginals():
    marginals = SMALL.marginals(0.4)
    texts = list(SMALL.all_texts())
    draws = SMALL.draw(marginals, 20_000, np.random.default_rng(0))
    position = {text: index for index, text in enumerate(texts)}
    counts = torch.tensor([position[text] for text in draws]).bincount(minlength=len(texts))
    assert chi_square_p(counts, torch.tensor(SMALL.log_probs(marginals, texts)).exp()) > 1e-4
    assert SMALL.visit_shares(draws) == pytest.approx(marginals, abs=0.02)
    assert SMALL.random_texts(3, np.random.default_rng(1)) == SMALL.random_texts(3, np.random.default_rng(1))


@given(lines(), st.data())
@fuzz(60)
def test_text_and_back(problem, data):
    visits = data.draw(
        st.lists(st.integers(1, problem.longest_visit), min_size=problem.stations, max_size=problem.stations)
    )
    text = problem.to_text(visits)
    assert problem.parse(text) == problem.parse(f"\n{text} ") == visits


@pytest.mark.slow
@given(
    st.text() | st.lists(st.sampled_from(["1", "6", "7", "0", "-1", "٣", "1.0", "", "x"]), max_size=5).map(", ".join)
)
def test_arbitrary_text(text):
    """No text raises an error, and every text that is not a schedule has the worst cost."""
    assert SMALL.cost_of(text) == SMALL.worst_cost or text.strip() in set(SMALL.all_texts())


def test_damaged_texts_cost_the_worst():
    for text in ("", "1, 2", "1, 2, 3, 4", "1,2,3", "1, 2, 7", "1, 2, 0", "1, 2, +3", "1, 2, 03", "1, 2, 3."):
        assert SMALL.parse(text) is None, text
        assert SMALL.cost_of(text) == SMALL.worst_cost > 0, text
    assert SMALL.log_probs(SMALL.marginals(0.0), ["nonsense"])[0] == -np.inf


@pytest.mark.filterwarnings("error")
def test_shares_of_nothing_are_nan():
    shares = SMALL.visit_shares(["nonsense"])
    assert shares.shape == (3, 6)
    assert np.isnan(shares).all()


def test_all_texts_are_all():
    expected = [", ".join(map(str, visits)) for visits in itertools.product(range(1, 7), repeat=3)]
    assert list(SMALL.all_texts()) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stations": 0}, "stations must be at least 1, got 0"),
        ({"longest_visit": 0}, "longest_visit"),
        ({"headway": 0}, "headway"),
        ({"travel": -1}, "travel must not be negative"),
    ],
)
def test_bad_lines(settings, message):
    with pytest.raises(ValueError, match=message):
        LineSchedulingProblem(**settings)
