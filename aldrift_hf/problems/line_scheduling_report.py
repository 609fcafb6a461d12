"""How close a run came on line scheduling, and how much of the traveller's preference survived."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .figures import figure, plot_along_ladder, plot_shares
from .line_scheduling import LineSchedulingProblem
from .tables import Comparison

EXACT = "exact p_T"


def compare(problem: LineSchedulingProblem, draws: dict[str, list[str]], kl: dict[str, float]) -> Comparison:
    """A column for each source of draws.

    Args:
        problem: the line.
        draws: texts by source; one of them is `EXACT`.
        kl: Monte Carlo estimates of KL(exact p_T‖source), nats, for the sources whose probabilities are known.
    """
    table = Comparison(f"{len(draws[EXACT]):,} draws each", list(draws))

    def row(label: str, figure_of: Callable[[list[str]], float], spec: str = ".2f") -> None:
        table.add(label, {name: figure_of(texts) for name, texts in draws.items()}, spec)

    def mean_visit(texts: list[str], liked: bool) -> float:
        means = problem.visit_shares(texts) @ np.arange(1, problem.longest_visit + 1)
        return float(means[np.isin(np.arange(problem.stations), problem.favourites) == liked].mean())

    row("success: share of schedules without a wait", lambda texts: waitless_share(problem, texts), ".3f")
    row("distinct schedules without a wait", lambda texts: len({t for t in texts if problem.cost_of(t) == 0}), ",d")
    row("mean wait, minutes", lambda texts: float(np.mean([problem.cost_of(text) for text in texts])))
    row("mean visit where long ones are preferred, minutes", lambda texts: mean_visit(texts, True))
    row("mean visit elsewhere, minutes", lambda texts: mean_visit(texts, False))
    row("preference: the difference", lambda texts: problem.preference_gap(problem.visit_shares(texts)))
    table.add(f"KL({EXACT} || ·) in nats", kl)
    return table


def waitless_share(problem: LineSchedulingProblem, texts: list[str]) -> float:
    """Share of schedules of cost 0."""
    return float(np.mean([problem.cost_of(text) == 0 for text in texts]))


def first_waitless_rung(records: list[dict[str, Any]], minutes: float = 0.5) -> int | None:
    """The first rung whose samples wait less than `minutes` on average, counted from 1; `None` if there is none."""
    return next((r["rung"] + 1 for r in records if r["sample_objective_mean"] < minutes), None)


def preference_in_words(problem: LineSchedulingProblem, draws: dict[str, list[str]]) -> str:
    """How far the preference of each source is from the one that `p_T` keeps."""
    gap = {name: problem.preference_gap(problem.visit_shares(texts)) for name, texts in draws.items()}
    return (
        f"preference for longer visits at some stations: {gap['prior']:.1f} minutes in the prior; {gap[EXACT]:.1f} are "
        f"compatible with catching every departure (exact p_T); the model keeps {gap['model']:.1f}"
    )


def draw_figure(
    problem: LineSchedulingProblem, draws: dict[str, list[str]], records: list[dict[str, Any]], path: Path
) -> None:
    """Shares of visit lengths by station, under the prior, the model and exactly; and the run along its ladder."""
    with figure(path, [["prior", "model", EXACT], ["cost", "share", "mass"]], (13, 7)) as axes:
        for name in ("prior", "model", EXACT):
            shares = problem.visit_shares(draws[name])
            plot_shares(axes[name], shares, f"{name}: share of visit lengths", "station", "visit (minutes)")
        plot_along_ladder(
            axes["cost"],
            records,
            {"objective_mean": "proposals", "sample_objective_mean": "samples"},
            "mean wait (minutes)",
        )
        shares_of = {"success": "success", "acceptance_rate": "acceptance rate", "ess": "ESS / n"}
        plot_along_ladder(
            axes["share"], records, {**shares_of, "distinct_samples": "distinct samples"}, "share (of proposals)"
        )
        plot_along_ladder(axes["mass"], records, {"missing_mass": "missing mass"}, "missing mass (nats)")
