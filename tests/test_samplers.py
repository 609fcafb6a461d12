"""The correction step against exact answers on a handful of states."""

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from conftest import pool_of
from hypothesis import given

from aldrift_hf.algorithm.samplers.chains import run_chains
from aldrift_hf.algorithm.samplers.kernels import isir, metropolis_hastings, suffix_move, systematic_resample, top
from aldrift_hf.algorithm.samplers.uncorrected import Reweight, Top
from aldrift_hf.selftest.exact import chi_square_p

STATES = 6


def problem(seed: int):
    """A prior, a proposal that is another distribution, costs, and the target at τ = 2."""
    generator = torch.Generator().manual_seed(seed)
    log_prior = torch.randn(STATES, generator=generator, dtype=torch.float64).log_softmax(0)
    log_q = torch.randn(STATES, generator=generator, dtype=torch.float64).log_softmax(0)
    cost = torch.rand(STATES, generator=generator, dtype=torch.float64)
    return log_prior, log_q, cost, (log_prior - 2 * cost).log_softmax(0), generator


def last_states(log_weight_of_state, log_q, generator, chains=20_000, steps=40):
    proposals = torch.multinomial(log_q.exp(), chains * steps, True, generator=generator).view(chains, steps)
    end = metropolis_hastings(log_weight_of_state[proposals], generator).last
    return proposals.gather(1, end[:, None])[:, 0].bincount(minlength=STATES)


@pytest.mark.parametrize("seed", range(5))
def test_chains_end_in_the_target(seed):
    log_prior, log_q, cost, log_p, generator = problem(seed)
    counts = last_states(log_prior - 2 * cost - log_q, log_q, generator)
    assert chi_square_p(counts, log_p.exp()) > 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_without_the_proposals_probability_they_do_not(seed):
    """The test above can fail: it sees the classic mistake of leaving `q` out of the weight."""
    log_prior, log_q, cost, log_p, generator = problem(seed)
    counts = last_states(log_prior - 2 * cost, log_q, generator)
    assert chi_square_p(counts, log_p.exp()) < 1e-6


def test_detailed_balance():
    """p(s) K(s, s') = p(s') K(s', s), with the kernel's acceptance measured for every pair of states."""
    log_prior, log_q, cost, log_p, generator = problem(0)
    log_weight = log_prior - 2 * cost - log_q
    trials = 40_000
    pairs = torch.cartesian_prod(torch.arange(STATES), torch.arange(STATES))
    two_steps = log_weight[pairs][:, None, :].expand(-1, trials, -1)
    accepted = metropolis_hastings(two_steps, generator).last.double().mean(-1).view(STATES, STATES)
    exact = (log_weight[None, :] - log_weight[:, None]).exp().clamp(max=1)
    error = (exact * (1 - exact) / trials).sqrt()
    assert ((accepted - exact).abs() <= 5 * error).all()
    flow = (log_p[:, None] + log_q[None, :]).exp() * accepted
    flow_error = (log_p[:, None] + log_q[None, :]).exp() * error
    assert ((flow - flow.T).abs() <= 5 * (flow_error**2 + flow_error.T**2).sqrt()).all()


def test_acceptance_rate_counts_moves():
    """Between equal weights every move is accepted; to a weight of zero none."""
    generator = torch.Generator().manual_seed(0)
    assert metropolis_hastings(torch.zeros(3, 5), generator).acceptance_rate.tolist() == [1, 1, 1]
    weights = torch.tensor([[0.0, -math.inf, -math.inf]])
    chains = metropolis_hastings(weights, generator)
    assert chains.last.tolist() == [0]
    assert chains.acceptance_rate.tolist() == [0]


def test_an_excluded_start_is_left_at_the_first_chance():
    weights = torch.tensor([[-math.inf, -math.inf, -3.0, -math.inf]])
    assert metropolis_hastings(weights, torch.Generator()).last.tolist() == [2]


@pytest.mark.parametrize("kernel", [metropolis_hastings, isir])
def test_a_chain_of_excluded_proposals_ends_where_another_does(kernel):
    """A third of all chains: their states are those of the prompt's other chains, each as often."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.zeros(2000, 3 * 4).double()
    weights[:, 4:8] = -math.inf
    selection = run_chains(weights, 3, generator, kernel)
    first, second, third = selection.index.T
    assert (weights.gather(1, selection.index) == 0).all()
    assert bool(((second == first) | (second == third)).all())
    assert 0.45 < (second == first).double().mean().item() < 0.55
    assert (first < 4).all() and (third >= 8).all()  # noqa: PT018
    assert selection.acceptance_rate == (1.0 if kernel is metropolis_hastings else pytest.approx(0.75, abs=0.03))
    with pytest.raises(ValueError, match="excludes every proposal of a prompt"):
        run_chains(torch.full((1, 4), -math.inf), 2, generator, kernel)


def test_one_step_makes_no_move():
    chains = metropolis_hastings(torch.zeros(2, 4, 1), torch.Generator())
    assert chains.last.tolist() == [[0] * 4] * 2
    assert chains.acceptance_rate.isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_unusable_weights_are_refused(value):
    weights = torch.tensor([[0.0, value]])
    with pytest.raises(ValueError, match=r"NaN or \+inf"):
        metropolis_hastings(weights, torch.Generator())
    with pytest.raises(ValueError, match=r"NaN or \+inf"):
        systematic_resample(weights, 2, torch.Generator())


def test_chains_need_a_dimension_of_steps():
    with pytest.raises(ValueError, match="chains, steps"):
        metropolis_hastings(torch.zeros(3), torch.Generator())


@pytest.mark.parametrize("proposals", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_isir_leaves_the_target_as_it_is(seed, proposals):
    """From a state of the target, and so for any number of proposals; from another start one step does not reach it."""
    log_prior, log_q, cost, log_p, generator = problem(seed)
    log_weight = log_prior - 2 * cost - log_q
    rows = 100_000

    def after(start):
        fresh = torch.multinomial(log_q.exp(), rows * proposals, True, generator=generator).view(rows, proposals)
        states = torch.cat([start[:, None], fresh], 1)
        end = isir(log_weight[states], generator).last
        return states.gather(1, end[:, None])[:, 0].bincount(minlength=STATES)

    assert chi_square_p(after(torch.multinomial(log_p.exp(), rows, True, generator=generator)), log_p.exp()) > 1e-3
    assert chi_square_p(after(torch.zeros(rows, dtype=torch.long)), log_p.exp()) < 1e-6


def test_isir_says_whether_it_moved():
    generator = torch.Generator().manual_seed(0)
    chains = isir(torch.tensor([[0.0, -math.inf, -math.inf], [-math.inf, 0.0, -math.inf]]), generator)
    assert chains.last.tolist() == [0, 1]
    assert chains.acceptance_rate.tolist() == [0, 1]
    assert isir(torch.zeros(2, 1), generator).acceptance_rate.isnan().all()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-3, 0)), min_size=1, max_size=20), st.data())
def test_top_takes_the_lowest_costs_and_then_the_likeliest(rows, data):
    m = data.draw(st.integers(1, len(rows)))
    cost, log_prior = torch.tensor(rows, dtype=torch.float64).T
    chosen = top(cost, log_prior, m)
    by_hand = sorted(range(len(rows)), key=lambda i: (rows[i][0], -rows[i][1], i))[:m]
    assert chosen.tolist() == by_hand


def test_what_the_prior_excludes_is_not_top():
    assert top(torch.tensor([0.0, 3.0, 2.0]), torch.tensor([-math.inf, -1.0, -2.0]), 2).tolist() == [2, 1]


def test_top_cannot_keep_more_than_there_are():
    with pytest.raises(ValueError, match="cannot keep the 3 best of 2"):
        top(torch.zeros(2), torch.zeros(2), 3)


@given(st.lists(st.floats(-20, 5), min_size=1, max_size=30), st.integers(1, 50), st.integers(0, 1000))
def test_systematic_counts_are_within_one_of_their_mean(log_weights, m, seed):
    weights = torch.tensor(log_weights, dtype=torch.float64)
    index = systematic_resample(weights, m, torch.Generator().manual_seed(seed))
    counts = index.bincount(minlength=len(log_weights))
    assert counts.sum() == m
    assert ((counts - m * weights.softmax(0)).abs() < 1 + 1e-9).all()


def test_systematic_is_unbiased_and_batched():
    weights = torch.tensor([[0.0, -1.0, -2.0], [3.0, 3.0, 0.0]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([systematic_resample(weights, 5, generator) for _ in range(4000)])
    share = torch.nn.functional.one_hot(draws, 3).double().mean((0, 2))
    assert torch.allclose(share, weights.softmax(-1), atol=0.01)


def test_nothing_can_be_resampled_from_weights_of_zero():
    with pytest.raises(ValueError, match="every weight of a row is zero"):
        systematic_resample(torch.full((2, 3), -math.inf), 2, torch.Generator())


@pytest.mark.parametrize("seed", range(3))
def test_suffix_moves_leave_the_target_as_it_is(seed):
    """Over all texts of up to three tokens, of which 0 ends one, with q and target at random."""
    texts = [t for n in (1, 2, 3) for t in itertools.product(range(3), repeat=n) if 0 not in t[:-1]]
    texts = [t for t in texts if t[-1] == 0 or len(t) == 3]
    generator = torch.Generator().manual_seed(seed)
    steps = {t[:n]: torch.rand(3, generator=generator, dtype=torch.float64) for t in texts for n in range(len(t))}
    steps = {prefix: weights / weights.sum() for prefix, weights in steps.items()}

    def q(text, start=0):
        return math.prod(steps[text[:n]][text[n]].item() for n in range(start, len(text)))

    target = torch.rand(len(texts), generator=generator, dtype=torch.float64) ** 3
    target /= target.sum()
    log_weight = target.log() - torch.tensor([q(text) for text in texts], dtype=torch.float64).log()
    length = torch.tensor([len(text) for text in texts])
    shape = (40_000, len(texts))
    accepted = (
        torch.stack(
            [
                suffix_move(w.expand(shape), log_weight.expand(shape), n.expand(shape), length.expand(shape), generator)
                for w, n in zip(log_weight, length)
            ]
        )
        .double()
        .mean(1)
    )
    moved = torch.zeros_like(accepted)
    for here, text in enumerate(texts):
        for there, other in enumerate(texts):
            shared = next((n for n, (a, b) in enumerate(zip(text, other)) if a != b), min(len(text), len(other)))
            if here != there:
                drawn = sum(q(other, start) for start in range(min(shared, len(text) - 1) + 1)) / len(text)
                moved[here, there] = drawn * accepted[here, there]
    # Detailed balance: six standard errors of a measured acceptance rate are at most 0.015.
    flow = target[:, None] * moved
    error = 0.015 * torch.where(accepted > 0, flow / accepted, 0.0)
    assert ((flow - flow.T).abs() <= error + error.T).all()
    assert (flow > 0).sum() > 50


def test_reweight_resamples_by_the_step_alone():
    kind = torch.randint(4, (2, 4000), generator=torch.Generator().manual_seed(1))
    cost = torch.tensor([0.0, 1.0, 2.0, 0.0], dtype=torch.float64)[kind]
    log_prior = torch.tensor([-1.0, -5.0, 0.0, -math.inf], dtype=torch.float64)[kind]
    selection = Reweight(4).select(pool_of(cost, log_prior), 0.5, 1.5, 7, torch.Generator().manual_seed(0))
    assert selection.index.shape == (2, 1000)
    counts = torch.stack([row.bincount(minlength=4) for row in kind.gather(1, selection.index)]).double()
    expected = torch.tensor([1.0, math.exp(-1), math.exp(-2), 0.0], dtype=torch.float64)
    assert torch.allclose(counts / 1000, (expected / expected.sum()).expand(2, -1), atol=0.03)


def test_uncorrected_samplers_keep_one_in_m():
    pool = pool_of(torch.rand(2, 12, dtype=torch.float64), torch.zeros(2, 12, dtype=torch.float64))
    for make in (Top, Reweight):
        for length, kept in ((4, 3), (5, 2), (12, 1), (100, 1)):
            assert make(length).select(pool, 0.0, 1.0, 5, torch.Generator()).index.shape == (2, kept)


def test_lost_chains_do_not_count_in_the_acceptance_rate():
    weights = torch.full((1, 2 * 3), -math.inf, dtype=torch.float64)
    weights[0, 0] = 0.0  # the first chain stays where it begins, the second has no state
    assert run_chains(weights, 2, torch.Generator().manual_seed(0)).acceptance_rate == 0.0
