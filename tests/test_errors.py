"""Standard errors against the spread of the estimates over thousands of independent repetitions."""

import math

import pytest
import torch
from test_diagnostics import COST, LOG_L, LOG_Q, exact_log_z

from aldrift_hf.algorithm import diagnostics
from aldrift_hf.algorithm.errors import mean_error, pooled_influence
from aldrift_hf.algorithm.ladders import LadderState
from aldrift_hf.algorithm.metrics import share_error
from aldrift_hf.algorithm.samplers import ArchiveSampler, MetropolisHastings
from aldrift_hf.types import Completions, Proposals

REPETITIONS = 4000
TOLERANCE = 0.06
"""Of a standard deviation from as many repetitions: five of its standard errors, `1/sqrt(2·4000)`."""


def drawn(log_q: torch.Tensor, n: int, seed: int) -> Proposals:
    """`n` states of 8 per repetition; a repetition is a prompt, for prompts have nothing in common."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.multinomial(log_q.exp(), REPETITIONS * n, True, generator=generator).view(REPETITIONS, n)
    completions = Completions(states.view(-1, 1), torch.ones(REPETITIONS * n, dtype=torch.long))
    return Proposals(
        torch.arange(REPETITIONS).repeat_interleave(n), completions, COST[states], LOG_L[states], log_q[states]
    )


class Policy:
    """Models whose log-probabilities are known: that of the rung being drawn, and those of rungs before."""

    def __init__(self):
        self.present = LOG_L

    def snapshot(self):
        return {} if self.present is LOG_L else {"log_q": self.present}

    def log_prob(self, snapshot, proposals):
        log_q = self.present if snapshot is None else snapshot["log_q"]
        return log_q[proposals.completions.ids].view_as(proposals.objective)


def climb(sampler, rungs):
    """The state, the draws and the influence after the last of `rungs`: pairs of a model and an inverse temperature."""
    policy, state = Policy(), LadderState.start(REPETITIONS, 1.0)
    for seed, (log_q, tau, n) in enumerate(rungs):
        policy.present = log_q
        proposals = drawn(log_q, n, seed)
        pool = sampler.pool(proposals, policy)
        influence = sampler.influence(pool, state, tau)
        log_z = sampler.log_z(pool, state, tau)
        state = state.reached(torch.arange(REPETITIONS), tau, log_z, influence.error())
    return state, proposals, influence


def assert_right(estimates, errors):
    """The errors are as large as the estimates' spread."""
    assert errors.square().mean().sqrt().item() == pytest.approx(estimates.std().item(), rel=TOLERANCE)


RUNGS = [(LOG_L, 0.5, 150), (LOG_Q, 1.0, 250), ((LOG_L - COST).log_softmax(0), 1.0, 200)]


@pytest.mark.slow
@pytest.mark.parametrize("rungs", [RUNGS[:1], RUNGS[:2], RUNGS], ids=["first", "second", "third"])
@pytest.mark.parametrize("make", [ArchiveSampler, lambda: MetropolisHastings(10)], ids=["pooled", "step by step"])
def test_errors_of_a_rung(make, rungs):
    state, proposals, influence = climb(make(), rungs)
    log_weight = proposals.log_weight(state.tau)
    assert (state.log_z - exact_log_z(state.tau)).mean().abs() < 0.01
    assert_right(state.log_z, state.log_z_error)
    assert_right(diagnostics.reverse_kl(log_weight, state.log_z), influence.error(log_weight / log_weight.shape[-1]))
    missing = diagnostics.missing_mass(state.log_z, log_weight)
    errors = influence.error(log_weight.softmax(-1))
    if len(rungs) == 1:
        assert missing.abs().max() < 1e-9, "the prior's own draws are all there is"
        assert errors.max() < 1e-9
    else:
        assert_right(missing, errors)


def test_the_errors_of_two_estimates_do_not_add_up():
    """What the archive's log Z shares with the fresh draws' cancels in the missing mass."""
    state, proposals, influence = climb(ArchiveSampler(), [(LOG_L, 1.0, 20), (LOG_Q, 1.0, 400)])
    log_weight = proposals.log_weight(1.0)
    alone = pooled_influence(log_weight, [400]).error()
    assert (influence.error(log_weight.softmax(-1)) < 0.5 * (alone.square() + state.log_z_error.square()).sqrt()).all()


def test_success_and_means_over_prompts():
    cost = drawn(LOG_L, 100, 3).objective.view(-1, 4, 100)  # four prompts in each repetition
    successes = (cost <= 0.5).double()
    assert_right(successes.mean((1, 2)), torch.tensor([share_error(each) for each in successes]))
    assert mean_error(torch.tensor([3.0, 4.0])) == pytest.approx(2.5)


def test_one_draw_has_no_error():
    assert math.isnan(pooled_influence(torch.zeros(1, 1), [1]).error().item())
    assert math.isnan(share_error(torch.zeros(1, 1)))
