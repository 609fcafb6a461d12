"""A run in words: its target, and what it came to."""

from __future__ import annotations

import math
from typing import Any, Protocol

from ..algorithm.goals import GOALS


class Run(Protocol):
    """What is read of a [`aldrift_hf.RunRecord`], which shows itself in these words and so cannot be imported here."""

    settings: dict[str, Any]
    finished: bool
    ended_by: str
    metrics: dict[str, float]
    tau_max: float | None
    tau_max_error: float | None
    rungs: list[dict[str, Any]]


def target_in_words(record: Run) -> str:
    """The formula of `p_T`, and what it means."""
    costs = " + ".join(record.settings["objective"])
    if record.tau_max is None:
        return f"p_T(s) ∝ L(s)·exp(-T·d(s)), with a T that is not found yet, for the cost d ({costs})"
    return (
        f"p_T(s) ∝ L(s)·exp(-T·d(s)) with T = {target_temperature(record)}: the distribution of the prior L, in which "
        f"each unit of the cost d ({costs}) makes a text {math.exp(min(record.tau_max, 700)):.3g} times less likely"
    )


def target_temperature(record: Run) -> str:
    """T, with its standard error where it was found."""
    if record.tau_max is None:
        return "not found"
    if record.tau_max_error is None:
        return f"{record.tau_max:g}"
    (asked,) = (name for name in GOALS if record.settings[name] is not None)
    return f"{record.tau_max:.4g} ± {record.tau_max_error:.2g} (for {asked}={record.settings[asked]:g})"


def outcome(record: Run) -> str:
    """What the run came to, and why it ended."""
    if not record.rungs:
        return "The first rung is still running."
    return f"{_result(record)} {record.ended_by}".rstrip()


def _result(record: Run) -> str:
    """The run in one sentence."""
    prior, last = record.rungs[0], record.rungs[-1]
    model = record.metrics or {"objective": last["objective_mean"], "success": last["success"]}
    rungs = "1 rung" if len(record.rungs) == 1 else f"{len(record.rungs)} rungs"
    after = f"{'After' if record.finished else 'So far, after'} {rungs}"
    result = (
        f"the model's mean cost is {model['objective']:.3g} (the prior's: {prior['objective_mean']:.3g}) and "
        f"{model['success']:.1%} of its draws are {success_in_words(record)} (the prior's: {prior['success']:.1%})"
    )
    if not record.settings["corrects"]:
        return f"{after}, {result}; this sampler makes no correction, so the model does not aim at p_T."
    if "missing_mass" not in model:
        return f"{after}, {result}."
    share = covered_share(model["missing_mass"])
    return f"{after}, {result}; by the ladder's log Z, its draws cover {share:.0%} of p_T."


def success_in_words(record: Run) -> str:
    """What counts as a success."""
    threshold = record.settings["success_threshold"]
    return f"of cost {threshold:g} or less" if threshold else "of cost 0"


def covered_share(missing_mass: float) -> float:
    """The share of the target that the model's draws cover, `exp(-missing_mass)`, at most 1."""
    return 1.0 if missing_mass <= 0 else math.exp(-missing_mass)
