"""A run in words: how it came out, and what to be wary of. For the report, the model card and the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..algorithm.diagnostics import MISSING_MASS_WARNING
from ..models.numerics import OUTSIDE
from .record import RunRecord

KHAT_WARNING = 0.7
"""Above it, estimates from a set of weights are unreliable (Vehtari et al., arXiv 1507.02646)."""
FEW_DRAWS = 20
"""Effective draws below which an estimate rests on next to nothing."""
LOW_ACCEPTANCE = 0.05
"""Acceptance rate below which most chains of the usual length never leave their first proposals behind."""


def target_in_words(record: RunRecord) -> str:
    """`p_T` and what it asks for."""
    settings = record.settings
    return (
        f"p_T(s) ∝ L(s)·exp(-T·d(s)) with T = {settings['tau_max']:g}: what the prior L writes, with every unit of the "
        f"cost d ({' + '.join(settings['objective'])}) making a text {math.exp(min(settings['tau_max'], 700)):.3g} "
        "times less likely"
    )


def outcome(record: RunRecord) -> str:
    """The run in one sentence."""
    if not record.rungs:
        return "The first rung is under way."
    prior, last = record.rungs[0], record.rungs[-1]
    model = record.metrics or {"objective": last["objective_mean"], "success": last["success"]}
    rungs = "1 rung" if len(record.rungs) == 1 else f"{len(record.rungs)} rungs"
    how_far = f"{'After' if record.finished else 'So far, after'} {rungs}"
    moved = (
        f"the model's mean cost is {model['objective']:.3g} (the prior's: {prior['objective_mean']:.3g}) and "
        f"{model['success']:.1%} of its draws are as good as any seen (the prior's: {prior['success']:.1%})"
    )
    if record.settings["sampler"] in ("top", "reweight"):
        return f"{how_far}, {moved}; without a correction its draws are not meant to be those of p_T."
    if "missing_mass" not in model:
        return f"{how_far}, {moved}."
    return f"{how_far}, {moved}; they account for {covered(model['missing_mass']):.0%} of p_T by the ladder's log Z."


def covered(missing_mass: float) -> float:
    """The share of the target that the model's draws account for, of its missing mass in nats."""
    return min(1.0, math.exp(-missing_mass))


def warnings(record: RunRecord) -> list[str]:
    """What a reader should know before the figures, most serious first; each with a remedy."""
    if not record.rungs:
        return []
    settings, last = record.settings, record.rungs[-1]
    found = []
    if settings["sampler"] in ("top", "reweight"):
        found.append(
            f"sampler={settings['sampler']!r} makes no correction: the model drifts to low cost, and not to p_T. For "
            "draws of p_T train with sampler='metropolis_hastings' or 'archive'."
        )
    of_prior = cautions("The prior", settings, record.rungs[0])
    of_chains = {name: last[name] for name in last if name in ("acceptance_rate", "excluded")}
    of_model = cautions("The model", settings, of_chains | record.metrics if record.metrics else last)
    found += [of_prior["flat"]] if "flat" in of_prior else []
    found += [words for kind, words in of_model.items() if kind != "flat"]
    if record.finished and last["tau"] < settings["tau_max"]:
        found.append(
            f"The run ended at inverse temperature {last['tau']:.3g}, below T = {settings['tau_max']:g}: the model was "
            "not taught the target. Allow more objective calls or rungs (max_objective_calls, num_train_epochs), or "
            "lower tau_max."
        )
    if record.finished and not record.metrics:
        found.append(
            "max_objective_calls was spent, so the final model was not measured: the figures are those of the model "
            "that drew the last rung. Call evaluate() to measure it."
        )
    return found


def cautions(who: str, settings: Mapping[str, Any], figures: Mapping[str, float]) -> dict[str, str]:
    """What to be wary of in the figures of a rung or of the final model, by kind, most serious first.

    Args:
        who: what drew.
        settings: of the run.
        figures: of its draws; one that is missing or NaN is not judged.
    """
    found = {}
    worst = settings.get("objective_range") or math.nan
    flat = figures.get("flat", 0.0) if figures.get("rung") == 0 else 0.0
    if figures.get("objective_best", 0.0) >= worst:
        found["worst"] = (
            f"No draw costs less than D = {worst:g}: the objective takes them all for malformed, or for as bad as can "
            "be, and nothing can be learnt from it. Look at what it is given (log_completions=True, draws.jsonl), "
            "check it (aldrift_hf.check_objective), let it give partial credit, or begin with a prior or a "
            "prompt that gets the form right."
        )
    elif flat > 0:
        found["flat"] = (
            f"For {flat:.0%} of the prompts all of the prior's draws cost the same: there the objective tells nothing "
            "apart, and the target is the prior. Check it (aldrift_hf.check_objective), let it give partial "
            "credit, draw more proposals (num_chains), or leave such prompts out."
        )
    if (share := figures.get("excluded", 0.0)) > 0:
        found["excluded"] = f"{share:.1%} of the draws have probability 0 under the prior. {OUTSIDE}"
    if (nats := figures.get("missing_mass", 0.0)) > MISSING_MASS_WARNING:
        found["missing_mass"] = (
            f"{who} has lost {nats:.2f} nats of the target: its draws account for about {covered(nats):.1%} of p_T by "
            "the ladder's log Z, and success, effective sample size and corrected draws speak of that part alone. Use "
            "more chains (num_chains), fewer updates (updates_per_rung), a smaller learning_rate, or smaller steps "
            "(tau_step)."
        )
    if (khat := figures.get("khat", 0.0)) > KHAT_WARNING:
        found["khat"] = (
            f"k-hat is {khat:.2f}, above {KHAT_WARNING}: a few draws carry the weights' tail, so corrected draws and "
            "estimates of log Z are unreliable. Teach the model more on each rung, or take longer chains."
        )
    effective = figures["ess"] * settings["num_chains"] * settings["chain_length"]
    if effective < FEW_DRAWS:
        found["ess"] = (
            f"By their weights, a rung's proposals are worth {effective:.1f} independent draws a prompt. Take smaller "
            "steps (tau_step, or ladder='adaptive'), more chains (num_chains), or more updates on each rung."
        )
    if figures.get("acceptance_rate", 1.0) < LOW_ACCEPTANCE:
        found["acceptance_rate"] = (
            f"Chains accept {figures['acceptance_rate']:.1%} of their proposals: most never move. Take smaller steps "
            "(tau_step) or longer chains (chain_length)."
        )
    return found
