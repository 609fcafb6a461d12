import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from aldrift_hf.algorithm.diagnostics import effective_sample_size
from aldrift_hf.algorithm.ladders.adaptive import AdaptiveLadder, adaptive_tau
from aldrift_hf.algorithm.ladders.base import LadderState
from aldrift_hf.algorithm.ladders.linear import linear_ladder
from aldrift_hf.types import Completions, Proposals


def test_the_papers_steps():
    assert linear_ladder(2.0, 0.5) == [0.5, 1.0, 1.5, 2.0]


def test_the_last_step_is_clipped_to_t_exactly():
    assert linear_ladder(1.0, 0.4) == [0.4, 0.8, 1.0]
    assert linear_ladder(0.3, 1.0) == [0.3]
    assert len(linear_ladder(6.0, 0.1)) == 60  # 6.0 / 0.1 is a hair above 60 or below, by rounding


@given(st.floats(0.01, 100), st.floats(0.05, 10))
def test_it_rises_to_t_by_steps_no_larger_than_asked(tau_max, step):
    ladder = linear_ladder(tau_max, step)
    differences = [b - a for a, b in zip([0.0, *ladder], ladder)]
    assert ladder[-1] == tau_max
    assert all(0 < difference <= step * (1 + 1e-6) for difference in differences)


@pytest.mark.parametrize(("tau_max", "step"), [(0, 1), (1, 0), (-1, 1), (math.inf, 1), (1, math.nan)])
def test_bad_steps_are_refused(tau_max, step):
    with pytest.raises(ValueError, match="positive and finite"):
        linear_ladder(tau_max, step)


def test_adaptive_step_in_closed_form():
    """Draws of the prior, half of them of cost 1: ESS/n = (1 + e^-τ)² / (2 (1 + e^-2τ))."""
    cost = torch.tensor([[0.0, 1.0] * 50], dtype=torch.float64)
    ratio = torch.zeros_like(cost)
    for threshold in (0.95, 0.8, 0.6):
        tau = adaptive_tau(ratio, cost, 0.0, 10.0, threshold * 100)
        share = (1 + math.exp(-tau)) ** 2 / (2 * (1 + math.exp(-2 * tau)))
        assert share == pytest.approx(threshold, abs=1e-4)
    assert adaptive_tau(ratio, cost, 0.0, 10.0, 49.0) == 10.0, "half the draws are never lost"


def test_adaptive_step_uses_the_full_weights():
    """A model that has learnt p_1 already: its ratio undoes the cost, and the step is counted from there."""
    cost = torch.tensor([[0.0, 1.0] * 50], dtype=torch.float64)
    from_prior = adaptive_tau(torch.zeros_like(cost), cost, 0.0, 10.0, 80.0)
    assert adaptive_tau(cost, cost, 1.0, 10.0, 80.0) == pytest.approx(1 + from_prior, abs=1e-4)
    behind = torch.zeros_like(cost)  # a model that has learnt nothing on the way to τ = 5
    assert adaptive_tau(behind, cost, 5.0, 10.0, 80.0) == 5.0, "the effective sample size is too small already"


def test_adaptive_step_stops_where_the_sample_size_first_falls():
    """With two tails it falls, recovers and falls again."""
    cost = torch.tensor([[0.0] * 10 + [1.0] * 10 + [2.0] * 10], dtype=torch.float64)
    ratio = torch.tensor([[0.0] * 10 + [4.0] * 10 + [0.0] * 10], dtype=torch.float64)
    share = [effective_sample_size(ratio - at * cost).item() for at in (0.0, 4.0)]
    assert share[0] < 0.4 < 0.6 < share[1]
    assert adaptive_tau(ratio, cost, 0.0, 8.0, 0.5 * 30) == 0.0
    first = adaptive_tau(ratio, cost, 3.9, 8.0, 0.5 * 30)
    assert 4 < first < 8
    assert effective_sample_size(ratio - first * cost).item() == pytest.approx(0.5, abs=1e-3)


def test_adaptive_step_looks_at_the_mean_of_all_prompts():
    cost = torch.tensor([[0.0, 1.0] * 50, [0.0] * 100], dtype=torch.float64)
    tau = adaptive_tau(torch.zeros_like(cost), cost, 0.0, 10.0, 90.0)
    share = effective_sample_size(-tau * cost)
    assert share[1] == 1
    assert share.mean().item() == pytest.approx(0.9, abs=1e-4)


def of_the_prior(prompts, n):
    """Draws of the prior with costs between 0 and 1."""
    cost = torch.rand(prompts, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nothing, rows = torch.zeros_like(cost), torch.arange(prompts).repeat_interleave(n)
    completions = Completions(torch.zeros(prompts * n, 1, dtype=torch.long), torch.ones(prompts * n).long())
    return Proposals(rows, completions, cost, nothing, nothing)


@pytest.mark.parametrize(("rungs", "n", "least"), [(1, 4, 3.6), (2, 4, 7.2), (3, 4, 8.0), (9, 4, 8.0), (1, 100, 50.0)])
def test_few_draws_do_not_pass_for_half_of_the_target(rungs, n, least):
    """The best of four draws look like two effective ones, however far the target is."""
    pool = of_the_prior(50, rungs * n)
    tau = AdaptiveLadder(0.5, n).next_tau(LadderState.start(50, 1000.0), pool)
    assert 0 < tau < 1000
    assert rungs * n * effective_sample_size(-tau * pool.objective).mean().item() == pytest.approx(least, rel=1e-3)


def test_one_draw_for_each_prompt_is_judged_by_those_of_all():
    """Whatever it weighs, a single draw is worth one."""
    pool = of_the_prior(600, 1)
    tau = AdaptiveLadder(0.5, 1).next_tau(LadderState.start(600, 1000.0), pool)
    assert 600 * effective_sample_size(-tau * pool.objective[:, 0]).item() == pytest.approx(300, rel=1e-3)
    alone = of_the_prior(1, 1)
    assert AdaptiveLadder(0.5, 1).next_tau(LadderState.start(1, 1000.0), alone) == 0


def test_of_few_whole_texts_the_threshold_is_a_share():
    """Chains of eight proposals begin at one whole text each: an eighth of them is never worth half of all."""
    pool = of_the_prior(1, 64)
    tau = AdaptiveLadder(0.5, 8 * 64).next_tau(LadderState.start(1, 1000.0), pool)
    assert effective_sample_size(-tau * pool.objective).item() == pytest.approx(0.5, rel=1e-3)


def test_it_gives_up_when_every_prompt_had_its_rungs():
    """Where rungs draw for two of six prompts, a rung says nothing of the others."""
    state = replace(LadderState.start(6, 9.0), taus=(1.0, *[2.0] * 17))
    assert "for 6 rungs" in AdaptiveLadder(0.5, 8).stop_reason(state)
    few = AdaptiveLadder(0.5, 8, prompts_per_rung=2)
    assert few.stop_reason(state) is None
    assert "cannot leave tau = 2: for 18 rungs" in few.stop_reason(replace(state, taus=(1.0, *[2.0] * 18)))


def test_adaptive_step_sees_a_gap_between_two_good_ends():
    cost = torch.tensor([[2.0] * 60 + [1.0] * 10 + [0.0] * 30], dtype=torch.float64)
    ratio = torch.tensor([[12.0] * 60 + [9.0] * 10 + [0.0] * 30], dtype=torch.float64)
    assert 1 < adaptive_tau(ratio, cost, 0.0, 20.0, 25.0) < 8


def test_a_part_of_the_state_is_that_of_its_prompts():
    state = LadderState.start(4, 2.0).reached(
        torch.tensor([3, 1]), 0.5, torch.tensor([7.0, 5.0]), torch.tensor([0.7, 0.5])
    )
    assert state.log_z.tolist() == [0, 5, 0, 7]
    part = state.of(torch.tensor([3, 0]))
    assert (part.log_z.tolist(), part.prompt_tau.tolist()) == ([7, 0], [0.5, 0])
    assert part.log_z_error.tolist() == pytest.approx([0.7, 0])
