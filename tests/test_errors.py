"""Standard errors against the spread of the estimates over thousands of independent repetitions."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_diagnostics import COST, LOG_L, LOG_Q, exact_log_z

from aldrift_hf.algorithm import diagnostics
from aldrift_hf.algorithm.errors import mean_error, pooled_influence
from aldrift_hf.algorithm.ladders import LadderState
from aldrift_hf.algorithm.metrics import rung_metrics, share_error
from aldrift_hf.algorithm.rung import Rung
from aldrift_hf.algorithm.samplers import ArchiveSampler, MetropolisHastings, Selection
from aldrift_hf.trainer.evaluation import measure
from aldrift_hf.types import Completions, Prompts, Proposals

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


@pytest.mark.parametrize(("at", "sigma"), [(0.5, 0.05), (1.0, 0.05), (1.0, 0.3)])
def test_errors_of_a_measurement(at, sigma):
    """Whether the ladder ends at T or before: figures of all prompts, their spread and their standard errors."""
    noise, exact = (
        sigma * torch.randn(REPETITIONS, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
        exact_log_z(at),
    )
    ladder = LadderState.start(REPETITIONS, 1.0).reached(
        torch.arange(REPETITIONS), at, exact + noise, torch.full((REPETITIONS,), sigma, dtype=torch.float64)
    )
    prompts = Prompts([{"prompt": ""}] * REPETITIONS, [[0]] * REPETITIONS, [""] * REPETITIONS)
    run = SimpleNamespace(
        tau_max=1.0,
        prompts=prompts,
        state=SimpleNamespace(ladder=ladder),
        args=SimpleNamespace(success_threshold=0.5),
        rollout=SimpleNamespace(propose=lambda *args, **kwargs: drawn(LOG_Q, 150, 0)),
    )
    measured = measure(run, prompts, 0, 150)
    metrics, scale = measured.metrics, math.sqrt(REPETITIONS)
    columns = {
        name: torch.tensor([row[name] for row in measured.by_prompt], dtype=torch.float64)
        for name in ("kl", "missing_mass", "success")
    }
    log_p = (LOG_L - COST).log_softmax(0)
    assert metrics["kl"] == pytest.approx((LOG_Q.exp() * (LOG_Q - log_p)).sum().item(), abs=0.02)
    assert metrics["missing_mass"] == pytest.approx(0.0, abs=0.02)
    assert metrics["kl_error"] * scale == pytest.approx(columns["kl"].std().item(), rel=0.06)
    assert metrics["missing_mass_error"] * scale == pytest.approx(columns["missing_mass"].std().item(), rel=0.06)
    assert metrics["success_error"] * scale == pytest.approx(columns["success"].std().item(), rel=0.06)
    fresh = drawn(LOG_Q, 150, 0).log_weight(1.0)
    log_z = fresh.logsumexp(-1) - math.log(150)
    assert metrics["log_z_error"] * scale == pytest.approx(log_z.std().item(), rel=0.06)


@pytest.mark.parametrize("make", [ArchiveSampler, lambda: MetropolisHastings(10)])
def test_errors_in_a_rungs_record(make):
    state, proposals, influence = climb(make(), [(LOG_L, 0.5, 150), (LOG_Q, 1.0, 250)])
    rung = Rung(state, state, influence, proposals, proposals, Selection(torch.zeros(REPETITIONS, 1).long()), (), None)
    figures, scale, log_weight = rung_metrics(rung, 0.5), math.sqrt(REPETITIONS), proposals.log_weight(1.0)
    spread = {
        "log_z": state.log_z,
        "missing_mass": diagnostics.missing_mass(state.log_z, log_weight),
        "kl_to_target": diagnostics.reverse_kl(log_weight, state.log_z),
        "success": proposals.successes(0.5).mean(-1),
    }
    for name, estimates in spread.items():
        assert figures[name] == pytest.approx(estimates.mean().item(), abs=1e-9)
        assert figures[f"{name}_error"] * scale == pytest.approx(estimates.std().item(), rel=0.06), name


def test_figures_of_a_rung_that_are_differences_and_shares():
    state, proposals, influence = climb(ArchiveSampler(), [(LOG_L, 0.5, 150)])
    proposals.log_prior[:, :30] = -math.inf
    after = state.reached(torch.arange(REPETITIONS), 1.0, state.log_z - 0.25, state.log_z_error)
    rung = Rung(state, after, influence, proposals, proposals, Selection(torch.zeros(REPETITIONS, 2).long()), (), None)
    figures = rung_metrics(rung, 0.5)
    assert figures["log_z_increment"] == pytest.approx(-0.25)
    assert figures["excluded"] == pytest.approx(0.2)
    assert figures["distinct_samples"] == pytest.approx(0.5)
