"""The exact distance from each rung's target to the model, for problems whose strings can be enumerated."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import TrainerControl, TrainerState, TrainingArguments

from aldrift_hf import ALDRIFTTrainer, RunCallback, RunRecord
from aldrift_hf.models.prior import base_model
from evaluation.enumeration import Enumeration, kl_divergence, total_variation


class ExactRungs(RunCallback):
    """After the updates of each rung, measures how far the model `L_τ` is from the rung's target `p_τ`.

    The record of each rung (and so `rungs.jsonl` and checkpoints) gets `exact_kl` (KL(p_τ‖L_τ), nats), `exact_tv`
    (total variation), `exact_coverage` (log of sup p_τ/L_τ, nats), `exact_success` and `exact_cost` (of `L_τ`).

    Create the callback before training, when the model still is the prior, and add it to the trainer.

    Args:
        trainer: the trainer.
        strings: every string of its problem.
        log_prior: log-probabilities of the strings under the prior, nats; `None` computes them.
    """

    def __init__(self, trainer: ALDRIFTTrainer, strings: Enumeration, log_prior: np.ndarray | None = None) -> None:
        self.trainer = trainer
        self.strings = strings
        self.log_prior = strings.log_probs(base_model(trainer.model)) if log_prior is None else log_prior

    def on_rung_learned(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, record: RunRecord, **kwargs: Any
    ) -> None:
        rung = record.rungs[-1]
        rung.update(self.measure(rung["tau"]))

    def measure(self, tau: float) -> dict[str, float]:
        """The distances from `p_τ` to the model as it is now."""
        strings = self.strings
        log_q = strings.log_probs(base_model(self.trainer.model))
        log_p = strings.target(self.log_prior, tau)
        return {
            "exact_kl": kl_divergence(log_p, log_q),
            "exact_tv": total_variation(np.exp(log_p), np.exp(log_q)),
            "exact_coverage": float((log_p - log_q).max()),
            "exact_success": strings.success(log_q),
            "exact_cost": strings.mean_cost(log_q),
        }
