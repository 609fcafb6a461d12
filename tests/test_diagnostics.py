"""Diagnostics against sums over a small state space, and against weights whose tail is known."""

import math

import numpy as np
import pytest
import torch

from aldrift_hf.algorithm import diagnostics, pareto

GENERATOR = torch.Generator().manual_seed(0)
LOG_L = torch.randn(8, generator=GENERATOR, dtype=torch.float64).log_softmax(0)
LOG_Q = torch.randn(8, generator=GENERATOR, dtype=torch.float64).log_softmax(0)
COST = torch.arange(8, dtype=torch.float64) / 4


def exact_log_z(tau: float) -> float:
    return (LOG_L - tau * COST).logsumexp(0).item()


def weights(tau: float, draws: torch.Tensor, log_q: torch.Tensor = LOG_Q) -> torch.Tensor:
    return (LOG_L - tau * COST - log_q)[draws]


@pytest.fixture(scope="module")
def draws():
    return torch.multinomial(LOG_Q.exp(), 200_000, True, generator=torch.Generator().manual_seed(1))


def standard_error(log_weight):
    """Of log Z: the weights' relative standard deviation over sqrt(n)."""
    w = log_weight.exp()
    return (w.std() / w.mean() / math.sqrt(len(w))).item()


@pytest.mark.parametrize("tau", [0.0, 1.0, 3.0])
def test_log_z_meets_the_exact_sum(tau, draws):
    log_weight = weights(tau, draws)
    assert abs(diagnostics.log_z(log_weight).item() - exact_log_z(tau)) < 4 * standard_error(log_weight)


def test_increments_add_up_to_log_z(draws):
    increment = diagnostics.log_z_increment(weights(1.0, draws), weights(2.0, draws)).item()
    error = standard_error(weights(1.0, draws)) + standard_error(weights(2.0, draws))
    assert abs(increment - (exact_log_z(2.0) - exact_log_z(1.0))) < 4 * error


def test_missing_mass_is_the_log_of_what_q_lost():
    """A `q` that never draws half of the states is perfect to its own weights; the ladder's log Z sees the loss."""
    kept = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
    log_p = (LOG_L - COST).log_softmax(0)
    collapsed = torch.where(kept, log_p, -math.inf).log_softmax(0)
    draws = torch.multinomial(collapsed.exp(), 5_000, True, generator=torch.Generator().manual_seed(2))
    log_weight = weights(1.0, draws, collapsed)
    assert diagnostics.effective_sample_size(log_weight).item() == pytest.approx(1.0)
    lost = diagnostics.missing_mass(torch.tensor(exact_log_z(1.0), dtype=torch.float64), log_weight).item()
    assert lost == pytest.approx(-log_p[kept].logsumexp(0).item(), abs=1e-9)


def test_effective_sample_size():
    assert diagnostics.effective_sample_size(torch.zeros(10)).item() == pytest.approx(1.0)
    assert diagnostics.effective_sample_size(torch.tensor([0.0, -math.inf, -math.inf, -math.inf])).item() == 0.25
    log_weight = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
    w = log_weight.exp()
    assert diagnostics.effective_sample_size(log_weight).item() == pytest.approx(
        (w.sum() ** 2 / (w**2).sum() / 3).item()
    )


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_khat_finds_the_shape_of_a_pareto_tail(shape):
    """Weights u^-k have a generalised Pareto tail of shape k; the sign convention would show here at once."""
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert diagnostics.pareto_khat(-shape * u.log()).item() == pytest.approx(shape, abs=0.12)


@pytest.mark.filterwarnings("ignore")
def test_the_tail_is_fitted_as_arviz_does():
    array_stats = pytest.importorskip("arviz_stats.base").array_stats  # it wants Python 3.11
    rng, compared = np.random.default_rng(0), 0
    for n in (30, 61, 225, 1000, 4096):
        for row in (
            rng.normal(0, 3, n),
            -0.9 * np.log(rng.uniform(size=n)),
            rng.standard_t(2, n),
            -rng.exponential(size=n),
            np.repeat(rng.normal(size=n - n // 2), 2)[:n],
            np.where(rng.uniform(size=n) < 0.9, rng.normal(size=n), -np.inf),
        ):
            smooth, khat = pareto.smoothed(row)
            ordered, length = np.sort(row), math.floor(min(0.2 * n, 3 * math.sqrt(n)))
            if ordered[n - length] - ordered[n - length - 1] <= pareto.RESOLUTION:
                continue  # ours leaves out what hardly exceeds the threshold
            if math.isnan(khat):  # where steps of the tail are below RESOLUTION
                assert (np.diff(np.sort(row)[-n // 5 :]) < pareto.RESOLUTION).any()
                continue
            theirs, their_khat = array_stats.psislw(-row)
            assert khat == pytest.approx(their_khat, abs=1e-10)
            compared += 1
            if (smooth != row).any():
                ours = smooth - np.logaddexp.reduce(smooth)
                assert np.allclose(np.sort(ours), np.sort(theirs), rtol=0, atol=1e-9)  # ties in any order
    assert compared >= 20


def test_khat_is_nan_where_there_is_no_tail():
    assert diagnostics.pareto_khat(torch.zeros(2, 100)).isnan().tolist() == [True, True]
    assert diagnostics.pareto_khat(torch.randn(1, 8)).isnan().all()
    assert diagnostics.pareto_khat(torch.full((1, 100), -math.inf)).isnan().all()


@pytest.mark.parametrize("noise", [0.0, 1e-5])
def test_khat_where_the_threshold_is_the_weight_of_many_draws(noise):
    """As of texts that are neither good nor bad: those just above the threshold exceed it by rounding errors alone."""
    generator = torch.Generator().manual_seed(4)
    cost = torch.rand(1, 400, generator=generator, dtype=torch.float64)
    cost = torch.where((cost > 0.05) & (cost < 0.3), 0.05, cost)
    cost += noise * torch.randn(1, 400, generator=generator, dtype=torch.float64)
    assert -1 < diagnostics.pareto_khat(-2 * cost).item() < 0.5, "the weights are bounded"


def test_khat_is_not_fitted_to_rounding_errors():
    """The prior's draws under a cost of few values have weights of few values, apart from the last digits."""
    cost = torch.tensor([0.0, 1.0, 2.0, 3.0]).double().repeat_interleave(torch.tensor([19, 60, 200, 233]))
    noise = 1e-6 * torch.randn(512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert diagnostics.pareto_khat(-0.6 * cost + noise).isnan().item()
    assert diagnostics.pareto_khat(-0.6 * cost + 1e4 * noise).isfinite().item()


def test_smoothing_tames_the_tail_alone():
    """Heavy weights, of a shape for which the mean has no variance: a steadier normaliser, the bulk in proportion."""
    generator = torch.Generator().manual_seed(4)
    log_weight = -0.8 * torch.rand(200, 1000, generator=generator, dtype=torch.float64).log()
    smooth = diagnostics.pareto_smoothed(log_weight)
    assert torch.allclose(smooth.logsumexp(-1), log_weight.logsumexp(-1))
    shift = (smooth - log_weight).median(-1, keepdim=True).values
    bulk = log_weight < log_weight.quantile(0.8, dim=-1, keepdim=True)
    assert torch.allclose((smooth - log_weight - shift)[bulk], torch.zeros(()).double(), atol=1e-9)
    largest = smooth.softmax(-1).amax(-1), log_weight.softmax(-1).amax(-1)
    assert largest[0].std() < 0.8 * largest[1].std()
    assert (smooth.gather(-1, log_weight.argsort(-1)).diff(dim=-1) >= -1e-12).all(), "their order is kept"
    few_values = torch.tensor([-1.0, 0.0, 0.5, 1.0]).double().repeat_interleave(torch.tensor([300, 500, 150, 50]))
    for alike in (torch.zeros(2, 50).double(), few_values[None]):
        assert torch.allclose(diagnostics.pareto_smoothed(alike), alike), "no tail to fit"


def test_divergences_meet_the_exact_sums(draws):
    log_p = (LOG_L - COST).log_softmax(0)
    log_weight = weights(1.0, draws)
    reverse = (LOG_Q.exp() * (LOG_Q - log_p)).sum().item()
    forward = (log_p.exp() * (log_p - LOG_Q)).sum().item()
    log_z = torch.tensor(exact_log_z(1.0))
    assert diagnostics.reverse_kl(log_weight, log_z).item() == pytest.approx(reverse, abs=0.02)
    assert diagnostics.forward_kl(log_weight).item() == pytest.approx(forward, abs=0.02)


def test_forward_kl_with_weights_of_zero_is_finite():
    assert math.isfinite(diagnostics.forward_kl(torch.tensor([0.0, -math.inf])).item())
