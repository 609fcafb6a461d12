"""Warnings about the metrics of a run. For the report, the model card, logs and the CLI."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from ..algorithm.diagnostics import MISSING_MASS_WARNING
from .callbacks import RunCallback
from .outcome import covered_share, target_temperature
from .record import RunRecord

logger = logging.getLogger(__name__)

MAX_KHAT = 0.7
"""Above this k-hat, estimates from a set of weights are unreliable (Vehtari et al., arXiv 1507.02646)."""
MIN_EFFECTIVE_DRAWS = 20
"""Below this number of effective draws per prompt, an estimate is hardly better than a guess."""
MIN_ESS = 0.3
"""From this share of effective draws on, their number is what was asked for, and no step is too large."""
SMALLER_STEPS = "smaller steps (tau_step; on the adaptive ladder a higher ess_threshold)"
"""The remedy, for either ladder."""
MIN_ACCEPTANCE_RATE = 0.05
"""Below this acceptance rate, most chains of the usual length never leave their first proposal."""


def run_warnings(record: RunRecord) -> list[str]:
    """Warnings about a run, each with a remedy, the most serious first."""
    if not record.rungs:
        return []
    settings, last = record.settings, record.rungs[-1]
    found = []
    if not settings["corrects"]:
        found.append(
            f"sampler={settings['sampler']!r} makes no correction: the model drifts towards low cost instead of p_T. "
            "To sample p_T, train with sampler='archive' or 'metropolis_hastings'."
        )
    of_prior = health_warnings("The prior", record, record.rungs[0])
    kept = {name: last[name] for name in last if name in ("acceptance_rate", "excluded")}  # no evaluation has them
    of_model = health_warnings("The model", record, kept | record.metrics if record.metrics else last)
    found += [of_prior["constant_cost"]] if "constant_cost" in of_prior else []
    found += [text for kind, text in of_model.items() if kind != "constant_cost"]
    if record.finished and (record.tau_max is None or last["tau"] < record.tau_max):
        below = "without having found T" if record.tau_max is None else f"below T = {target_temperature(record)}"
        found.append(
            f"The run ended at inverse temperature {last['tau']:.3g}, {below}, so the model was not trained on the "
            "target. Allow more rungs or objective calls (num_rungs, max_objective_calls), or lower tau_max, or ask "
            "for less."
        )
    if record.finished and not record.metrics and record.tau_max is not None:
        found.append(
            "max_objective_calls was spent before the final model could be measured: the metrics are those of the "
            "model that drew the last rung's proposals. Call evaluate() to measure the final model."
        )
    return found


def health_warnings(who: str, record: RunRecord, metrics: Mapping[str, float]) -> dict[str, str]:
    """Warnings about the metrics of one rung or one evaluation, by kind, the most serious first.

    Args:
        who: what drew the completions, as the subject of a sentence.
        record: the run; its settings and D are read.
        metrics: the metrics. One that is missing or NaN gives no warning.
    """
    found = {}
    worst = record.objective_range or math.nan
    constant_cost = metrics.get("constant_cost", 0.0) if metrics.get("rung") == 0 else 0.0
    if metrics.get("objective_best", 0.0) >= worst:
        found["worst"] = (
            f"No draw costs less than D = {worst:g}: the objective gives its largest value to every completion, so "
            "there is nothing to learn. Look at the completions (log_completions=True, draws.jsonl), check the "
            "objective (aldrift_hf.check_objective), let it give partial credit, or start from a prior or a prompt "
            "that gets the format right."
        )
    elif constant_cost > 0:
        found["constant_cost"] = (
            f"For {constant_cost:.0%} of the prompts, all of the prior's draws have the same cost: the objective does "
            "not distinguish them, and the target equals the prior. Check the objective "
            "(aldrift_hf.check_objective), let it give partial credit, draw more proposals (num_generations), or leave "
            "such prompts out."
        )
    if (share := metrics.get("excluded", 0.0)) > 0:
        found["excluded"] = (
            f"{share:.1%} of the draws have probability 0 under the prior. The model writes what the prior cannot: "
            "something masks the prior's logits but not the model's. Mask both or neither; or train an adapter, which "
            "shares the prior's mask."
        )
    if (nats := metrics.get("missing_mass", 0.0)) > MISSING_MASS_WARNING:
        found["missing_mass"] = (
            f"{who} has lost {nats:.2f} nats of the target: its draws cover only about {covered_share(nats):.1%} of "
            "p_T, and success, effective sample size and corrected samples describe that part alone. Use more "
            "proposals (num_generations), fewer updates (updates_per_rung), a smaller learning_rate, or "
            f"{SMALLER_STEPS}."
        )
    if (khat := metrics.get("khat", 0.0)) > MAX_KHAT:
        found["khat"] = (
            f"k-hat is {khat:.2f}, above {MAX_KHAT}: a few draws dominate the weights, so corrected samples and "
            "estimates of log Z are unreliable. Train more per rung (updates_per_rung), or draw more proposals "
            "(num_generations)."
        )
    effective = metrics.get("ess", math.nan) * metrics.get("draws", math.nan)
    if effective < MIN_EFFECTIVE_DRAWS and metrics["ess"] < MIN_ESS:
        found["ess"] = (
            f"By their weights, a rung's proposals are worth {effective:.1f} independent draws per prompt. Take "
            f"{SMALLER_STEPS}, draw more proposals (num_generations), or train more per rung (updates_per_rung)."
        )
    if (rate := metrics.get("acceptance_rate", 1.0)) < MIN_ACCEPTANCE_RATE:
        found["acceptance_rate"] = (
            f"The chains accept {rate:.1%} of their proposals: most never move. Take {SMALLER_STEPS} or "
            "longer chains (chain_length)."
        )
    return found


class HealthWarnings(RunCallback):
    """Logs health warnings: about rungs each kind once per run, about measurements every time."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._logged.clear()

    def on_rung_drawn(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        record: RunRecord,
        metrics: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        found = health_warnings(f"The model that drew rung {metrics['rung']}", record, metrics)
        self._log(state, [text for kind, text in found.items() if kind not in self._logged])
        self._logged |= found.keys()

    def on_measured(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        record: RunRecord,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        self._log(state, [*health_warnings("The model", record, metrics).values()])

    def _log(self, state: TrainerState, warnings: list[str]) -> None:
        if state.is_world_process_zero:
            for text in warnings:
                logger.warning(text)
