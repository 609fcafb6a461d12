"""How close a model is to p_T: measures from gold and from fresh draws of the model.

All arrays are `[P, n]`, for `P` prompts; measures are means over prompts. Standard errors are under `NAME_error`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation import gold as golden
from evaluation.gold import Array, Gold
from evaluation.steering_model import Drawn, Steered

QUANTILE = 0.99
"""Share of p_T for which the weight is below the lower one of the two bounds of rejection."""


@dataclass
class ScoredGold:
    """Gold under a model q.

    Attributes:
        cost, log_prior, log_model: of the draws of the prior; `log q` of some of them is not known, but filled in.
        scored: which ones q has scored.
    """

    cost: Array
    log_prior: Array
    log_model: Array
    scored: NDArray[np.bool_]

    @classmethod
    def of(cls, gold: Gold, steered: Steered, tau: float, share: float) -> ScoredGold:
        """Score the draws that carry a share of each prompt's weight under p_T, and fill in the others."""
        cost, log_prior = gold.by_prompt(gold.cost), gold.by_prompt(gold.log_prior)
        scored = heaviest(cost, tau, share)
        prompt, draw = np.nonzero(scored)
        completions = [gold.completions[column * len(gold.prompts) + row] for row, column in zip(prompt, draw)]
        log_model = np.full_like(cost, np.nan)
        log_model[scored] = steered.scores(prompt.tolist(), completions)
        return cls(cost, log_prior, filled(log_model, log_prior, cost, tau), scored)


def heaviest(cost: Array, tau: float, share: float) -> NDArray[np.bool_]:
    """The fewest draws of each prompt, at least two, that carry this share of its weight under `p_τ`."""
    weights = golden.weights(cost, tau)
    order = np.argsort(-weights, axis=-1, kind="stable")
    before = np.take_along_axis(weights, order, -1).cumsum(-1) - np.take_along_axis(weights, order, -1)
    wanted = before < share
    wanted[:, :2] = True
    chosen = np.zeros_like(wanted)
    np.put_along_axis(chosen, order, wanted, -1)
    return chosen


def filled(log_model: Array, log_prior: Array, cost: Array, tau: float) -> Array:
    """`log q` with the draws that are NaN filled in: as if `log q - log L` were there what it is on average under p_T.

    At `--gold_share 0.99` these draws have 1 % of the weight, so an error of one nat in the average is one of 0.01 in
    `KL(p_T‖q)`. They are the costliest draws, where `log q - log L` of a trained model is lowest: KL comes out low.
    """
    known = ~np.isnan(log_model)
    weights = golden.weights(cost, tau) * known
    ratio = np.where(known, log_model - log_prior, 0.0)
    average = (weights * ratio).sum(-1, keepdims=True) / weights.sum(-1, keepdims=True)
    return np.where(known, log_model, log_prior + average)


def of_gold(gold: ScoredGold, tau: float) -> dict[str, float]:
    """`kl`: KL(p_T‖q); `log_z_upper`: `E_{p_T}[log w] = log Z + KL(p_T‖q)`, with `w = L·exp(-T·d) / q`. Nats."""
    log_weight = gold.log_prior - tau * gold.cost - gold.log_model
    return golden.with_errors(
        kl=golden.kl_to_model(gold.cost, tau, gold.log_prior, gold.log_model),
        log_z_upper=golden.mean(log_weight, gold.cost, tau),
    )


def log_bounds(gold: ScoredGold, tau: float) -> tuple[Array, Array]:
    """Bounds of the log-weight for rejection, `[P, 1]` each: the largest of gold's, and one that 1 % of p_T exceeds."""
    log_weight = np.where(gold.scored, gold.log_prior - tau * gold.cost - gold.log_model, -np.inf)
    order = np.argsort(log_weight, axis=-1)
    weights = np.take_along_axis(golden.weights(gold.cost, tau) * gold.scored, order, -1)
    below = weights.cumsum(-1) / weights.sum(-1, keepdims=True)
    place = (below >= QUANTILE - 1e-12).argmax(-1)[:, None]
    return log_weight.max(-1, keepdims=True), np.take_along_axis(np.take_along_axis(log_weight, order, -1), place, -1)


def of_draws(drawn: Drawn, tau: float, log_bound: Array, log_quantile: Array) -> dict[str, float]:
    """Measures of fresh draws.

    Args:
        drawn: draws of q.
        tau: T.
        log_bound: bound of the log-weights for rejection, `[P, 1]`.
        log_quantile: a lower one.

    Returns:
        `cost`: mean of the draws. `kl_prior`: KL(q‖L). `satisfied`: share of cost 0, which is what is accepted where
        texts are rejected by the demand alone (GUARD's acceptance rate, Kim et al. 2024, arXiv 2410.06716).
        `acceptance`: of rejection, the mean of `min(1, w / bound)`; `acceptance_quantile`: with the lower bound.
        `log_z_lower`: `E_q[log w] = log Z - KL(q‖p_T)`. `ess`: effective sample size as a share. `corrected_cost`: mean
        cost under p_T by self-normalised weights. `distinct`: texts of a prompt that differ, as a share.
        `tokens_per_draw`, `tokens_per_exact_draw`: of a draw, and of an accepted one.
    """
    log_weight = drawn.log_prior - tau * drawn.cost - drawn.log_model
    accepted = np.exp(np.minimum(log_weight - log_bound, 0.0))
    prompts, n = drawn.cost.shape
    texts = [{*drawn.texts[row * n : (row + 1) * n]} for row in range(prompts)]
    measured = golden.with_errors(
        cost=golden.plain_mean(drawn.cost),
        kl_prior=golden.plain_mean(drawn.log_model - drawn.log_prior),
        acceptance=golden.plain_mean(accepted),
        acceptance_quantile=golden.plain_mean(np.exp(np.minimum(log_weight - log_quantile, 0.0))),
        satisfied=golden.plain_mean((drawn.cost <= 0).astype(float)),
        log_z_lower=golden.plain_mean(log_weight),
        # Weights of draws of q take the place of exp(-τ·d), the weights of draws of L.
        corrected_cost=golden.mean(drawn.cost, -log_weight, 1.0),
    )
    return measured | {
        "ess": float(golden.effective_sample_size(-log_weight, 1.0).mean() / n),
        "distinct": sum(map(len, texts)) / (prompts * n),
        "tokens_per_draw": float(drawn.tokens.mean()),
        "tokens_per_exact_draw": float((drawn.tokens.mean(-1) / accepted.mean(-1)).mean()),
    }
