"""The distribution over trees with two modes, and the sentences in which recipes state their results."""

import networkx as nx
import numpy as np
import pytest
from evaluation.line_scheduling import first_waitless_rung, preference_in_words
from problems.line_scheduling import LineSchedulingProblem
from problems.spanning_tree import SpanningTreeProblem, load_problem
from problems.tree_modes import largest_degree, two_modes


@pytest.mark.slow
def test_two_modes_of_the_florentine_families():
    problem = load_problem("florentine")
    texts, p, star = two_modes(problem)
    assert p.sum() == pytest.approx(1)
    assert p[star].sum() == pytest.approx(0.5)
    assert len(set(p[star])) == len(set(p[~star])) == 1, "uniform within each mode"
    degrees = [max(dict(nx.Graph([problem.edges[i] for i in problem.parse(text)]).degree()).values()) for text in texts]
    assert [degree == 6 for degree in degrees] == star.tolist(), "the Medici have six marriages"
    assert [degree == 3 for degree in degrees] == (~star).tolist()
    assert all(problem.cost_of(text) == 0 for text in texts)


def test_largest_degree():
    problem = SpanningTreeProblem.from_graph(nx.complete_graph(4))
    assert largest_degree(problem, problem.parse("0-1, 0-2, 0-3")) == 3
    assert largest_degree(problem, problem.parse("0-1, 1-2, 2-3")) == 2
    texts, p, star = two_modes(problem)
    assert (star.sum(), (~star).sum()) == (4, 12), "of the 16 trees on four nodes, 4 are stars and 12 paths"
    assert sorted(set(p)) == pytest.approx([1 / 24, 1 / 8])
    assert len(texts) == 16


def test_one_mode_is_refused():
    with pytest.raises(ValueError, match="the same largest degree"):
        two_modes(SpanningTreeProblem.from_graph(nx.cycle_graph(5)))


def test_coverage_verdict(recipe_module):
    verdict = recipe_module("coverage").verdict
    entries = [{"step": step, "coverage": value} for step, value in ((10, 4.0), (20, 2.0), (80, 2.0 + 3 * np.log(4)))]
    assert verdict(64, entries, 32) == (
        "m = 64: sup p/L is smallest, exp(2.0), after 20 updates (10 passes); then it grows to exp(6.2), on average "
        "like updates^3.0"
    )
    assert verdict(64, entries[:2], 32).endswith("the last measurement: overfitting has not begun")


def test_ladder_verdict(recipe_module):
    verdict = recipe_module("ladder_stress").verdict
    runs = {step: {"exact_kl": kl} for step, kl in ((1, 1.5), (2, 0.9), (4, 0.3), (8, 0.4), (16, 2.0))}
    told = verdict(runs, {step: f"{step}/D" for step in runs}, 1.0)
    assert told.startswith("closest to p_T: steps of 4/D.")
    assert "larger ones: 16/D" in told
    assert told.endswith("fewer samples per rung: 1/D")
    assert verdict({4: {"exact_kl": 0.1}}, {4: "4/D"}, 1.0).count("none") == 2


def test_ablation_verdict(recipe_module):
    chains = [{"exact_kl": kl} for kl in (0.1, 0.2, 0.3)]
    without = [{"exact_kl": kl} for kl in (0.1, 0.5, 1.3)]
    told = recipe_module("correction_ablation").verdict({"metropolis_hastings": chains, "reweight": without})
    assert told.endswith("+0.00 nats after the first rung, +0.30 halfway, +1.00 at the end")


def test_line_scheduling_in_words():
    records = [{"rung": rung, "sample_objective_mean": wait} for rung, wait in enumerate((3.0, 0.6, 0.4, 0.7))]
    assert first_waitless_rung(records) == 3
    assert first_waitless_rung(records[:2]) is None
    problem = LineSchedulingProblem(stations=2, longest_visit=4, headway=2, preference=1.0)
    draws = {"prior": ["1, 3"], "model": ["2, 4", "4, 4"]}
    exact = problem.preference_gap(problem.marginals(1.0))
    assert preference_in_words(problem, draws, 1.0).endswith(
        f"2.0 minutes in the prior, {exact:.1f} in the exact p_T, 1.0 in the model"
    )
