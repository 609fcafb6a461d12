"""Pareto-smoothed importance sampling (Vehtari, Simpson, Gelman, Yao and Gabry, arXiv 1507.02646), one row at a time.

The largest weights are modelled as draws from a generalised Pareto distribution. Its shape, k-hat, says how heavy the
tail is: moments of order 1/k and above do not exist. Its quantiles have less variance than the weights themselves.
"""

from __future__ import annotations

import math

import numpy as np

RESOLUTION = 1e-3
"""Error of log-weights, nats: their rounding, and the largest tolerated gap between generation and scoring."""
MIN_TAIL = 5
"""Least number of distinct weights to which a tail's shape is fitted."""


def smoothed(log_weight: np.ndarray) -> tuple[np.ndarray, float]:
    """The log-weights with their tail smoothed, up to a constant, and k-hat.

    Args:
        log_weight: `[n]`, nats, fp64.

    Returns:
        `[n]` and a number; the weights unchanged and NaN where the tail has too few draws, or too few distinct weights,
        for a fit that is more than rounding errors.
    """
    n = len(log_weight)
    length = math.floor(min(0.2 * n, 3 * math.sqrt(n)))
    if length < MIN_TAIL:
        return log_weight, math.nan
    order = np.argsort(log_weight, kind="stable")
    below, tail = order[n - length - 1], order[n - length :]
    with np.errstate(all="ignore"):  # from weights that are zero, and tails that are mostly one value
        # Equal costs make equal weights. Those that equal the threshold exceed it by rounding errors alone.
        tail = tail[log_weight[tail] - log_weight[below] > RESOLUTION]
        length = len(tail)
        if (np.diff(log_weight[tail]) > RESOLUTION).sum() < MIN_TAIL - 1:
            return log_weight, math.nan
        relative = log_weight - log_weight[tail[-1]]
        threshold = np.exp(relative[below])
        shape, scale = fit(np.exp(relative[tail]) - threshold)
        share = (np.arange(length) + 0.5) / length
        quantile = -np.log1p(-share) if shape == 0 else np.expm1(-shape * np.log1p(-share)) / shape
        smooth = relative.copy()
        smooth[tail] = np.minimum(np.log(scale * quantile + threshold), 0.0)  # no weight grows beyond the largest
    return (smooth if np.isfinite(smooth[tail]).all() else log_weight), shape


def fit(excess: np.ndarray) -> tuple[float, float]:
    """Shape and scale of a generalised Pareto distribution, by an empirical prior (Zhang and Stephens, 2009).

    The shape is shrunk towards 1/2 with the weight of ten observations.

    Args:
        excess: `[n]`, over the tail's threshold, positive and in ascending order.
    """
    n, prior_weight = len(excess), 10
    points = 30 + math.floor(math.sqrt(n))
    quartile = excess[math.floor(n / 4 + 0.5) - 1]
    # θ = -k/σ, on a grid that is denser where the prior has more mass.
    theta = 1 / excess[-1] + (1 - np.sqrt(points / (np.arange(points) + 0.5))) / (3 * quartile)
    shapes = np.log1p(-theta[:, None] * excess).mean(axis=1)
    log_likelihood = n * (np.log(-theta / shapes) - shapes - 1)
    share = np.exp(log_likelihood - log_likelihood.max())
    posterior = float((share * theta).sum() / share.sum())
    shape = float(np.log1p(-posterior * excess).mean())
    return (n * shape + prior_weight * 0.5) / (n + prior_weight), -shape / posterior
