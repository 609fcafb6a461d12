"""Plots of where the model is: its cost beside the prior's and the target's, and the weights of its newest draws."""

from __future__ import annotations

import functools

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from .figure_style import BLUE, GREY, ORANGE, Plot
from .record import RunRecord, weights_of

_NUM_BARS = 25
"""Of a histogram of costs; of evenly spaced costs, each has a bar of its own if they are no more than this."""
_MIN_WEIGHT = 1e-3
"""All weights below it share the first bar."""
_MIN_DRAWS = 10
"""With fewer draws per prompt, weights are not shown: so few cannot be compared with one another."""
Points = list[tuple[float, float]]
"""KL from the prior (nats), and mean cost."""


def plots_of_draws(record: RunRecord) -> list[Plot]:
    """The plots for which a run has data."""
    found = [_costs_plot(record)] if record.draws and record.prior_costs else []
    if record.rungs and all("target_kl_to_prior" in rung for rung in record.rungs):
        found.append(_frontier_plot(record))
    weights = relative_weights(record)
    return [*found, _weights_plot(weights, record.draws[0]["tau"])] if weights.any() else found


def relative_weights(record: RunRecord) -> np.ndarray:
    """Weights of the newest draws, as multiples of their prompt's mean; none where a prompt has too few draws."""
    if record.settings["num_generations"] < _MIN_DRAWS:
        return np.empty(0)
    return weights_of(record.draws)


# ---- Cost ------------------------------------------------------------------------------------------------------------


def _costs_plot(record: RunRecord) -> Plot:
    prior, model = np.array(record.prior_costs), np.array([draw["objective"] for draw in record.draws])
    weights = weights_of(record.draws)
    means = {"prior": prior.mean(), "model": model.mean()}
    if weights.any():
        means["target"] = np.average(model, weights=weights)
    return Plot(
        "costs",
        "Cost of prior, model and target",
        "Shares of draws. The prior's are the first rung's proposals, the model's are the newest draws, and the target "
        f"(p_τ for τ = {record.draws[0]['tau']:.3g}) is estimated by weighting these.",
        summary="; ".join(f"mean of the {name}: {mean:.3g}" for name, mean in means.items()),
        draw=functools.partial(_draw_costs, prior=prior, model=model, weights=weights),
    )


def _draw_costs(axes: Axes, prior: np.ndarray, model: np.ndarray, weights: np.ndarray) -> None:
    bins = _bins(np.concatenate([prior, model]))
    evenly = [np.full(len(costs), 1 / len(costs)) for costs in (prior, model)]
    axes.hist(prior, bins, weights=evenly[0], color=GREY, alpha=0.45, label="prior")
    axes.hist(model, bins, weights=evenly[1], histtype="step", color=BLUE, linewidth=1.5, label="model")
    if weights.any():
        share = weights / weights.sum()
        axes.hist(model, bins, weights=share, histtype="step", color=ORANGE, linewidth=1.5, label="target")
    axes.set(xlabel="cost", ylabel="share")
    axes.legend()


def _bins(costs: np.ndarray) -> list[float]:
    """Edges of bars, evenly spaced."""
    distinct = np.unique(costs)
    low, high = distinct[0], distinct[-1]
    step = np.diff(distinct).min() if len(distinct) > 1 else 1.0
    places = (distinct - low) / step
    if places[-1] < _NUM_BARS and np.allclose(places, places.round(), atol=0.01):
        return [*np.linspace(low - step / 2, high + step / 2, round(places[-1]) + 2)]
    return [*np.linspace(low, high, _NUM_BARS + 1)]


# ---- Cost against KL -------------------------------------------------------------------------------------------------


def _frontier_plot(record: RunRecord) -> Plot:
    first, last = record.rungs[0], record.rungs[-1]
    model = [(rung["kl_to_prior"], rung["objective_mean"]) for rung in record.rungs]
    if "kl_to_prior" in record.metrics:
        model.append((record.metrics["kl_to_prior"], record.metrics["objective"]))
    of_tau = {rung["tau"]: (rung["target_kl_to_prior"], rung["target_objective_mean"]) for rung in record.rungs}
    target = [(0.0, first["objective_mean"]), *(of_tau[tau] for tau in sorted(of_tau))]
    (nats, cost), (target_nats, target_cost) = model[-1], of_tau[last["tau"]]
    return Plot(
        "frontier",
        "Cost against KL from the prior",
        "A dot per rung; the large one is the newest model. At the same KL from the prior, no distribution costs less "
        "than p_τ, so dots close to the line are good. The line is estimated on each rung by weighting draws: "
        "KL(p_τ‖prior) = -τ·E[d] - log Z, with E[d] the weighted mean cost.",
        summary=f"the model: cost {cost:.3g} at {nats:.3g} nats; p_τ for τ = {last['tau']:.3g}: {target_cost:.3g} at "
        f"{target_nats:.3g} nats",
        draw=functools.partial(_draw_frontier, model=model, target=target),
    )


def _draw_frontier(axes: Axes, model: Points, target: Points) -> None:
    axes.plot(*zip(*target), color=ORANGE, linewidth=1.5, label="p_τ")
    axes.plot(*zip(*model), color=BLUE, marker=".", linestyle=":", linewidth=1, label="model")
    axes.plot(*model[-1], color=BLUE, marker="o")
    axes.set(xlabel="KL from the prior, nats per completion", ylabel="mean cost")
    axes.legend()


# ---- Weights ---------------------------------------------------------------------------------------------------------


def _weights_plot(weights: np.ndarray, tau: float) -> Plot:
    near = ((weights > 0.5) & (weights < 2)).mean()
    return Plot(
        "weights",
        f"Weights of the newest draws at τ\u00a0=\u00a0{tau:.3g}",
        "The weight of a draw is p_τ(s)/q(s), shown as a multiple of the mean. At 1, the model writes a text as often "
        "as the target does; above 1, too rarely; below 1, too often. Bars count draws, the outline counts them by "
        "weight. Both should be close to 1; an outline far to the right of the bars means that a few draws stand for "
        "most of the target.",
        summary=f"{near:.0%} of the draws have a weight between 1/2 and 2; the largest weight is {weights.max():.3g}",
        draw=functools.partial(_draw_weights, weights=weights),
    )


def _draw_weights(axes: Axes, weights: np.ndarray) -> None:
    shown = weights.clip(_MIN_WEIGHT)
    low, high = min(shown.min() / 1.2, 0.5), max(shown.max() * 1.2, 2.0)
    bins = np.geomspace(low, high, 31).tolist()
    axes.hist(shown, bins, weights=np.full(len(weights), 1 / len(weights)), color=BLUE, label="draws")
    by_weight = weights / weights.sum()
    axes.hist(shown, bins, weights=by_weight, histtype="step", color=ORANGE, linewidth=1.5, label="by weight")
    axes.axvline(1.0, color=GREY, linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 50 else (1,)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="weight, as a multiple of the mean", ylabel="share")
    axes.legend()
