"""One new implementation for each seam: a sampler, a ladder, a loss and an engine that the package does not have."""

import math

import torch

from aldrift_hf import Draws, Engine, Ladder, Loss, Sampler
from aldrift_hf.algorithm.diagnostics import log_z, pareto_smoothed
from aldrift_hf.algorithm.samplers import Selection
from aldrift_hf.algorithm.samplers.kernels import systematic_resample
from aldrift_hf.streams import uniforms
from aldrift_hf.types import Completions


class SmoothedResampling(Sampler):
    """Pareto-smoothed importance resampling over one rung's proposals; counts the rungs it has seen."""

    draws_by_weight = True

    def __init__(self):
        self.rungs = 0

    def select(self, pool, tau_before, tau, size, generator):
        self.rungs += 1
        return Selection(systematic_resample(pareto_smoothed(pool.log_weight(tau)), size, generator))

    def log_z(self, pool, state, tau):
        return log_z(pool.log_weight(tau))

    def state_dict(self):
        return {"rungs": torch.tensor(self.rungs)}

    def load_state_dict(self, state):
        self.rungs = int(state.get("rungs", 0))


class GeometricLadder(Ladder):
    """`T·r^(K-1), …, T·r, T`: small steps where the cost first acts on the prior, large ones later."""

    def __init__(self, tau_max, num_rungs, ratio=0.5):
        self.taus = [tau_max * ratio**k for k in reversed(range(num_rungs))]

    def next_tau(self, state, pool):
        return self.taus[min(len(state.taus), len(self.taus) - 1)]

    def num_rungs(self, state):
        return len(self.taus)

    def stop_reason(self, state):
        return "the ladder has ended." if len(state.taus) >= len(self.taus) else None


class LogVariance(Loss):
    """Variance over the batch of `log q(s) - log L(s) + τ·d(s)`, which is 0 just where `q = p_τ`: it needs no log Z.

    Of any draws: trajectory balance with the best constant in place of a learned log Z.
    """

    exact_logprobs = True
    reference_share = 0.5

    def columns(self, pool, tau, log_z):
        return {"log_target": pool.log_target(tau)}

    def __call__(self, log_probs, num_tokens, **columns):
        gap = log_probs.sum(-1) - columns["log_target"]
        return (gap - gap.detach().mean()).square().sum() / num_tokens


def draws_of(completions: Completions, log_q: torch.Tensor) -> Draws:
    """Of an engine that knows the probabilities of whole completions alone, `[n]`: they are their first tokens'."""
    parts = torch.zeros(completions.ids.shape, dtype=torch.float64)
    parts[:, 0] = log_q
    return Draws(completions, parts)


class TableEngine(Engine):
    """Draws from a table of completions and their probabilities, without a model.

    Args:
        completions: `n` of them.
        log_q: `[n]`, their log-probabilities, nats: the law of the draws.
    """

    follows_model = False

    def __init__(self, completions: Completions, log_q: torch.Tensor):
        self.completions, self.log_q, self.syncs = completions, log_q, 0

    def sync(self, policy):
        self.syncs += 1  # the table stays as it is, whatever the model has learned

    def generate(self, prompts, address, rows):
        numbers = uniforms(address, rows, 1)[:, 0]
        events = torch.searchsorted(self.log_q.softmax(0).cumsum(0), numbers).clamp(max=len(self.log_q) - 1)
        return draws_of(self.completions.select(events), self.log_q.log_softmax(0)[events])


def uniform_table(completions: Completions) -> TableEngine:
    """Every completion with the same probability."""
    n = len(completions.length)
    return TableEngine(completions, torch.full((n,), -math.log(n), dtype=torch.float64))
