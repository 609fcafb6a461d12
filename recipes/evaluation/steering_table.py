"""Tables and figure of the comparison of `recipes/steer_text.py`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aldrift_hf.reporting.figure_style import GREY
from evaluation import gold as golden
from evaluation.figures import figure, plot_lines
from evaluation.gold import Gold
from evaluation.steering_setting import Setting
from evaluation.tables import Comparison

CLOSENESS = {
    "KL(p_T‖q)": ("kl", ".2f"),
    "mean cost": ("cost", ".3f"),
    "corrected mean cost": ("corrected_cost", ".3f"),
    "KL(q‖L)": ("kl_prior", ".2f"),
    "log Z, lower bound": ("log_z_lower", ".2f"),
    "log Z, upper bound": ("log_z_upper", ".2f"),
    "ESS/n": ("ess", ".2f"),
    "distinct": ("distinct", ".2f"),
}
COSTS = {
    "share of cost 0": ("satisfied", ".3f"),
    "acceptance": ("acceptance", ".2g"),
    "acceptance, 99 % of p_T": ("acceptance_quantile", ".2g"),
    "tokens per exact draw": ("tokens_per_exact_draw", ",.0f"),
    "calls": ("calls", ",.0f"),
    "CPU s": ("cpu_seconds", ",.0f"),
    "s": ("seconds", ",.0f"),
    "MiB": ("peak_memory", ",.0f"),
}
"""The columns of the two tables: for each, the measure that it shows and the format of its numbers."""
WITH_ERRORS = ("kl", "cost", "corrected_cost", "acceptance", "satisfied")

Result = dict[str, Any]
"""A run's measures, and under `setting` what it was."""
Group = list[Result]
"""Runs that differ in the seed alone."""


def label_of(result: Result) -> str:
    """The method, with what was set for it."""
    return Setting(**result["setting"]).label


def best(results: Sequence[Result]) -> dict[tuple[int, str], Group]:
    """For each number of calls and each method, the runs at its best learning rate.

    That is the one whose run with the smallest seed has the smallest KL(p_T‖q).
    """
    groups: dict[tuple[int, str], dict[float, Group]] = {}
    for result in results:
        key = (result["setting"]["calls"], label_of(result))
        groups.setdefault(key, {}).setdefault(result["setting"]["learning_rate"], []).append(result)
    return {key: _best_rate(groups[key]) for key in sorted(groups, key=lambda key: key[0])}


def _best_rate(rates: Mapping[float, Group]) -> Group:
    first = min(result["setting"]["seed"] for group in rates.values() for result in group)

    def kl(group: Group) -> float:
        """Infinite for a rate that was not tried with the first seed."""
        return min((run.get("kl", 0.0) for run in group if run["setting"]["seed"] == first), default=math.inf)

    return min(rates.values(), key=kl)


def tables(task: str, results: Sequence[Result], gold: Gold, tau: float) -> list[Comparison]:
    """One task's two tables: what p_T has, by gold, and a row for each method and number of calls."""
    made = []
    for title, columns in ((f"{task}: closeness to p_T", CLOSENESS), (f"{task}: sampling p_T, and costs", COSTS)):
        made.append(Comparison(title, [*columns]))
        if columns is CLOSENESS:
            made[-1].rows.append(
                ("p_T, by gold", [_cell([of_target(gold, tau)], *column) for column in columns.values()])
            )
        for (_, label), group in best(results).items():
            rate, seeds = group[0]["setting"]["learning_rate"], len(group)
            name = label + (f", lr {rate:g}" if rate else "") + (f", {seeds} seeds" if seeds > 1 else "")
            made[-1].rows.append((name, [_cell(group, *column) for column in columns.values()]))
    return made


def of_target(gold: Gold, tau: float) -> Result:
    """The measures that p_T itself would have."""
    cost = gold.by_prompt(gold.cost)
    mean, error = golden.mean_cost(cost, tau)
    log_z = golden.log_z(cost, tau).value
    bounds = {"log_z_lower": log_z, "log_z_upper": log_z}
    return {"kl": 0.0, "cost": mean, "cost_error": error, "kl_prior": golden.kl_from_prior(cost, tau).value, **bounds}


def _cell(group: Group, name: str, spec: str) -> str:
    """The mean over seeds. Its error: of several seeds, from their spread; else the run's own, if it has one."""
    values = [run[name] for run in group if name in run]
    if not values:
        return ""
    error = group[0].get(f"{name}_error")
    if len(values) > 1:
        error = statistics.stdev(values) / math.sqrt(len(values))
    mean = format(statistics.mean(values), spec)
    return mean if error is None or name not in WITH_ERRORS else f"{mean} ± {format(error, spec)}"


def _means(groups: Sequence[Group], name: str) -> list[float]:
    return [statistics.mean(run[name] for run in group) for group in groups]


def draw(
    path: Path, results: Mapping[str, Sequence[Result]], golds: Mapping[str, Gold], tau: Mapping[str, float]
) -> None:
    """The figure: mean cost against KL from the prior, of all methods with a model, and of p_τ.

    The legend says how far each method's last model is from p_T.

    Args:
        path: the PNG file.
        results, golds, tau: results, gold and T of each task.
    """
    with figure(path, [[task] for task in results], (8, 4 * len(results))) as axes:
        for task, found in results.items():
            points: dict[str, list[Group]] = {}
            for (_, label), group in best(found).items():
                if "kl_prior" in group[0] and group[0]["setting"]["method"] != "rejection":
                    points.setdefault(label, []).append(group)
            lines = {
                f"{label}: {_cell(groups[-1], 'kl', '.2f')}": (_means(groups, "kl_prior"), _means(groups, "cost"))
                for label, groups in points.items()
            }
            cost, end = golds[task].by_prompt(golds[task].cost), tau[task]
            frontier = [
                (golden.kl_from_prior(cost, float(value)).value, golden.mean_cost(cost, float(value)).value)
                for value in np.linspace(0.0, end, 60)
            ]
            axes[task].plot(*zip(*frontier, strict=True), color=GREY, label="p_τ, τ = 0 to T (gold)")
            axes[task].plot(*frontier[-1], color=GREY, marker="*", markersize=12, linestyle="none", label="p_T")
            plot_lines(axes[task], lines, "KL(q || prior) (nats)", "mean cost")
            axes[task].set_title(task)
            axes[task].legend(title="KL(p_T‖q), nats", loc="upper left", bbox_to_anchor=(1.0, 1.0))
