"""Ehrlich functions: the same as in the packages that define them, and as a problem of the recipes."""

import json
from pathlib import Path

import numpy as np
import pytest
from problems.ehrlich import Ehrlich, EhrlichProblem, holo

KNOWN = json.loads((Path(__file__).parent / "data" / "ehrlich.json").read_text())
"""Sequences and their values, as `Ehrlich(*numbers, quantization=k, random_seed=seed)` of pytorch-holo 0.0.5 and
`EhrlichBlackBox(seed=…)` of poli-core 1.3.1 computed them; null is -inf, an infeasible one. The first of each is the
package's optimum; then come draws, optima whose end repeats one state, and sequences of uniform states."""


@pytest.mark.parametrize("known", KNOWN["pytorch-holo 0.0.5"], ids=lambda known: "-".join(map(str, known["numbers"])))
def test_the_functions_of_holo(known):
    function = holo(*known["numbers"], seed=known["seed"])
    agree(function, known)
    assert function.transitions.sum(1) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("known", KNOWN["poli-core 1.3.1"], ids=lambda known: str(known["quantization"]))
def test_the_values_of_poli(known):
    parts = (np.array(known[name]) for name in ("allowed", "motifs", "places"))
    agree(Ehrlich(*parts, known["quantization"]), known)


def agree(function, known):
    codes = np.array(known["sequences"])
    values = [0.0 if value is None else value for value in known["values"]]
    assert function(codes).tolist() == values
    assert function.is_feasible(codes).tolist() == [value is not None for value in known["values"]]
    assert values[0] == 1
    assert len({*values}) >= 3


def test_motifs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="4 motifs of 4 states do not fit into 15"):
        holo(8, 15, 4, 4, seed=0)


SMALL = EhrlichProblem(states=7, length=4, motifs=1, size=3, function_seed=1)


def test_all_feasible_sequences_are_enumerated():
    texts = [*SMALL.all_texts()]
    assert len(texts) == len({*texts}) == SMALL.number_of_strings() < 7**4
    assert all(map(SMALL.is_feasible, texts))
    assert max(map(SMALL.value_of, texts)) == 1


def test_the_prior_draws_feasible_sequences_by_the_transitions():
    drawn = SMALL.random_texts(40_000, np.random.default_rng(0))
    assert {*drawn} <= {*SMALL.all_texts()}
    codes = np.array([[*map(int, text.split(" "))] for text in drawn])
    pairs = np.zeros((7, 7))
    np.add.at(pairs, (codes[:, :-1].ravel(), codes[:, 1:].ravel()), 1)
    assert pairs / pairs.sum(1, keepdims=True) == pytest.approx(SMALL.function.transitions, abs=0.02)
    assert np.bincount(codes[:, 0]) / len(codes) == pytest.approx(1 / 7, abs=0.01)


def test_the_cost_is_the_logarithm_of_the_value():
    problem = EhrlichProblem(*KNOWN["pytorch-holo 0.0.5"][0]["numbers"], function_seed=0)
    known = KNOWN["pytorch-holo 0.0.5"][0]
    for text, value in zip(problem.texts(np.array(known["sequences"])), known["values"]):
        assert problem.cost_of(text) == pytest.approx(1 - np.log(16 * value) / np.log(16) if value else 1)
    assert problem.cost_of(problem.texts(np.array(known["sequences"][:1]))[0]) == 0
    assert problem.worst_cost == 1


@pytest.mark.parametrize("text", ["", "0 1", "0 1 2 3 4", "0 1 2 x", "0 1 2 7", "0  1 2"])
def test_malformed_text_has_no_value(text):
    assert SMALL.value_of(text) == 0
    assert not SMALL.is_feasible(text)
    assert SMALL.cost_of(text) == 1
