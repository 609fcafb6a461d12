"""Round trips: distances, completions of a prompt, and which texts are trips."""

import itertools

import numpy as np
import pytest
from problems.round_trips import CAPITALS, RoundTripProblem

PROBLEM = RoundTripProblem()


def test_a_trip_is_as_long_from_everywhere_and_both_ways_round():
    trip = ["Lisbon", "Madrid", "Paris", "London", "Berlin", "Vienna", "Rome"]
    length = PROBLEM.cost_of(", ".join(trip))
    for shift, step in itertools.product(range(7), (1, -1)):
        turned = [trip[(shift + step * k) % 7] for k in range(7)]
        assert PROBLEM.cost_of(", ".join(turned)) == pytest.approx(length)
        assert PROBLEM.cost([turned[0]], [", ".join(turned[1:])]) == pytest.approx([length])


def test_known_distances():
    """London and Paris are 344 km apart; positions are given to a tenth of a degree."""
    two = RoundTripProblem({name: CAPITALS[name] for name in ("London", "Paris")})
    assert two.cost_of("London, Paris") == pytest.approx(2 * 0.344, abs=0.02)


def test_every_prompt_has_every_order_of_the_others():
    assert PROBLEM.prompts == list(CAPITALS)
    for prompt in PROBLEM.prompts:
        rest = list(PROBLEM.completions(prompt))
        assert len(set(rest)) == 720
        assert not any(prompt in text for text in rest)
        costs = PROBLEM.cost([prompt] * 720, rest)
        assert max(costs) < PROBLEM.worst_cost
        assert min(costs) == pytest.approx(5.88, abs=0.01)
    assert PROBLEM.number_of_strings() == len(set(PROBLEM.all_texts())) == 5040


@pytest.mark.parametrize("rest", ["", "Lisbon", "Berlin, Lisbon, London, Madrid, Paris, Rome", "x, y", "Rome " * 6])
def test_anything_else_costs_the_most(rest):
    assert PROBLEM.cost(["Berlin"], [rest]) == [PROBLEM.worst_cost]


def test_random_trips_are_whole():
    texts = PROBLEM.random_texts(50, np.random.default_rng(0))
    assert all(PROBLEM.cost_of(text) < PROBLEM.worst_cost for text in texts)
    assert len(set(texts)) > 40
