"""The algorithm where costs and weights are extreme: all equal, all 0, too far apart, in tiny or in huge units."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import pool_of

from aldrift_hf.algorithm import diagnostics
from aldrift_hf.algorithm.goals import KLBudget, TargetCost
from aldrift_hf.algorithm.ladders import AdaptiveLadder, LadderState, LinearLadder
from aldrift_hf.algorithm.metrics import proposal_metrics
from aldrift_hf.algorithm.samplers.chains import run_chains
from aldrift_hf.algorithm.samplers.kept import KeptDraws
from aldrift_hf.algorithm.samplers.kernels import systematic_resample


def test_the_last_tooth_falls_on_a_weight(monkeypatch):
    """Rounding leaves the sum of the shares below 1; the last draw is one that can be drawn all the same."""
    monkeypatch.setattr(torch, "rand", lambda shape, **kwargs: torch.full(shape, 1 - 2**-53, dtype=torch.float64))
    log_weight = torch.tensor([[0.0] * 10 + [-math.inf] * 2], dtype=torch.float64)
    assert log_weight.softmax(-1).cumsum(-1)[0, -1] <= 1 - 2**-53, "the test shows nothing otherwise"
    assert systematic_resample(log_weight, 1, torch.Generator()).item() == 9


def test_of_equal_weights_each_is_drawn_once_however_many_there_are():
    index = systematic_resample(torch.zeros(1, 300_000), 300_000, torch.Generator().manual_seed(0))
    assert torch.equal(index[0], torch.arange(300_000))


def test_chains_of_different_prompts_have_their_own_variates():
    weights = torch.randn(1, 200 * 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(2, -1)
    one, other = run_chains(weights, 200, torch.Generator().manual_seed(1)).index
    assert not torch.equal(one, other)


def test_weights_too_far_apart_to_be_fitted_stay_as_they_are():
    """Next to the largest all others are 0 in fp64: no tail of numbers is left."""
    log_weight = -1000.0 * torch.arange(100, dtype=torch.float64)[None]
    assert torch.equal(diagnostics.pareto_smoothed(log_weight), log_weight)


def test_draws_that_all_cost_nothing_have_no_t_yet():
    pool = pool_of(torch.zeros(1, 8, dtype=torch.float64), torch.zeros(1, 8, dtype=torch.float64))
    state = KLBudget(1.0).aim(LadderState.start(1, None), pool)
    assert math.isinf(state.tau_max)
    assert AdaptiveLadder(0.5, 8).next_tau(state, pool) == 4.0


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_t_has_the_unit_of_the_cost(unit):
    cost = torch.arange(8, dtype=torch.float64)[None]
    pool = pool_of(unit * cost, torch.zeros_like(cost))
    exact = float((-0.5 * cost).softmax(-1)[0] @ cost[0])  # at τ = 0.5
    assert TargetCost(unit * exact).aim(LadderState.start(1, None), pool).tau_max == pytest.approx(0.5 / unit)


def test_without_a_t_a_rung_leaps_to_four_times_its_tau_or_to_four_over_the_largest_cost():
    cost = torch.tensor([[2.0] * 8], dtype=torch.float64)
    for before, after in ((0.0, 2.0), (0.1, 2.0), (0.5, 2.0), (3.0, 12.0)):
        state = replace(LadderState.start(1, None), taus=(before,))
        assert AdaptiveLadder(0.5, 8).next_tau(state, pool_of(cost, torch.zeros_like(cost))) == after


def test_figures_of_draws_of_two_prompts():
    cost = torch.rand(2, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cost[1] = 0.5  # no tail to fit
    pool = pool_of(cost, torch.full_like(cost, -3.0))
    pool.log_model = pool.log_model - 1.0
    figures = proposal_metrics(pool, 8.0, 0.3)
    assert figures["objective_best"] == cost.min().item() < cost.amin(-1).mean().item()
    assert figures["kl_to_prior"] == pytest.approx(2.0)
    assert figures["khat"] == diagnostics.pareto_khat(pool.log_weight(8.0))[0].item()
    assert figures["success"] == pytest.approx((cost <= 0.3).double().mean().item())


def test_kept_draws_of_many_prompts_come_back():
    kept, again = KeptDraws("best"), KeptDraws("best")
    kept.put(pool_of(torch.rand(12, 2, dtype=torch.float64), torch.zeros(12, 2, dtype=torch.float64)))
    again.load_state_dict(kept.state_dict())
    for prompt in range(12):
        assert torch.equal(again.of(prompt).objective, kept.of(prompt).objective)


def test_equal_steps_towards_a_t_that_is_found_late():
    """However long the ladder stood at a T that was estimated too low, its next step is no larger than the others."""
    pool = pool_of(torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64))
    state, taus = replace(LadderState.start(1, None), tau_max_error=0.1), []
    for estimate in (0.9, 0.9, 0.9, 0.9, 5.0, 5.0, 5.0):
        state = replace(state, tau_max=estimate)
        taus.append(min(LinearLadder(0.5).next_tau(state, pool), estimate))
        state = replace(state, taus=tuple(taus))
    assert taus == [0.5, 0.9, 0.9, 0.9, 1.0, 1.5, 2.0]
