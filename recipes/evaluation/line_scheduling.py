"""The table, the figure and the sentences that compare a run on line scheduling with the exact target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from problems.line_scheduling import LineSchedulingProblem

from evaluation.figures import figure, plot_along_ladder, plot_shares
from evaluation.tables import Comparison

EXACT = "exact p_T"


def compare(
    problem: LineSchedulingProblem, draws: dict[str, list[str]], tau: float, kl: dict[str, float]
) -> Comparison:
    """A table with one column per source of draws.

    All values of `EXACT` are exact, except for the number of distinct schedules, which is that of its draws.

    Args:
        problem: the line.
        draws: drawn texts by source; one of the sources is `EXACT`.
        tau: the inverse temperature of `EXACT`.
        kl: Monte Carlo estimates of KL(exact p_T‖source), nats, for the sources whose probabilities are known.
    """
    table = Comparison(f"{len(draws[EXACT]):,} draws each", list(draws))
    costs = {name: np.array(problem.cost(texts, texts)) for name, texts in draws.items()}
    shares = {name: problem.visit_shares(texts) for name, texts in draws.items()}
    shares[EXACT] = problem.marginals(tau)
    success = {name: float((cost == 0).mean()) for name, cost in costs.items()}
    success[EXACT] = float((shares[EXACT] * (problem.waits_alone == 0)).sum(1).prod())
    wait = {name: float(cost.mean()) for name, cost in costs.items()}
    wait[EXACT] = float((shares[EXACT] * problem.waits_alone).sum())
    waitless = {name: {t for t in texts if problem.cost_of(t) == 0} for name, texts in draws.items()}
    table.add("success: share of schedules without waiting", success, ".3f")
    table.add("distinct schedules without waiting", {name: len(found) for name, found in waitless.items()}, ",d")
    table.add("mean waiting time, minutes", wait)
    if problem.favourites:
        gap = {name: problem.preference_gap(share) for name, share in shares.items()}
        table.add("preference: mean visit where long ones are preferred, minus elsewhere, minutes", gap)
    table.add(f"KL({EXACT} || ·) in nats", kl)
    return table


def first_waitless_rung(records: list[dict[str, Any]], minutes: float = 0.5) -> int | None:
    """The first rung, counted from 1, whose samples wait less than `minutes` on average; `None` if there is none."""
    return next((r["rung"] + 1 for r in records if r["sample_objective_mean"] < minutes), None)


def preference_in_words(problem: LineSchedulingProblem, draws: dict[str, list[str]], tau: float) -> str:
    """The strength of the preference in the prior, in the exact target and in the model."""
    gap = {name: problem.preference_gap(problem.visit_shares(draws[name])) for name in ("prior", "model")}
    exact = problem.preference_gap(problem.marginals(tau))
    return (
        f"preference for longer visits at some stations: {gap['prior']:.1f} minutes in the prior, {exact:.1f} in the "
        f"exact p_T, {gap['model']:.1f} in the model"
    )


def draw_figure(
    problem: LineSchedulingProblem, draws: dict[str, list[str]], records: list[dict[str, Any]], path: Path
) -> None:
    """Draw the shares of visit lengths by station for the prior, the model and the target; and metrics of the run."""
    with figure(path, [["prior", "model", EXACT], ["cost", "share", "mass"]], (13, 7)) as axes:
        for name in ("prior", "model", EXACT):
            shares = problem.visit_shares(draws[name])
            plot_shares(axes[name], shares, f"{name}: share of visit lengths", "station", "visit (minutes)")
        plot_along_ladder(
            axes["cost"],
            records,
            {"objective_mean": "proposals", "sample_objective_mean": "samples"},
            "mean waiting time (minutes)",
        )
        shares_of = {"success": "success", "acceptance_rate": "acceptance rate", "ess": "ESS / n"}
        plot_along_ladder(
            axes["share"], records, {**shares_of, "distinct_samples": "distinct samples"}, "share (of proposals)"
        )
        plot_along_ladder(axes["mass"], records, {"missing_mass": "missing mass"}, "missing mass (nats)")
