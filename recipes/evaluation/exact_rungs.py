"""The exact distance of the learnt model to each rung's target, where every string can be enumerated."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aldrift_hf.models.prior import base_model
from aldrift_hf.trainer.trainer import ALDRIFTTrainer
from evaluation.enumeration import Enumeration, kl_divergence, total_variation


class ExactRungs(TrainerCallback):
    """After each rung's updates: how far `L_τ`, which was learnt, is from `p_τ`, which was meant.

    Create it before training begins, when the policy is still the prior, and add it to the trainer. Each rung's record
    (so `rungs.jsonl`, and the checkpoint) gets `exact_kl` (KL(p_τ‖L_τ), nats), `exact_tv`, `exact_coverage` (log of
    sup p_τ/L_τ, nats), `exact_success` and `exact_cost` (of `L_τ`).

    Args:
        trainer: of an enumerable problem.
        strings: every string of it.
        log_prior: their log-probabilities under the prior, where an earlier run on the same prior knows them.
    """

    def __init__(self, trainer: ALDRIFTTrainer, strings: Enumeration, log_prior: np.ndarray | None = None) -> None:
        self.trainer = trainer
        self.strings = strings
        self.log_prior = strings.log_probs(base_model(trainer.model)) if log_prior is None else log_prior

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Resumed from the checkpoint of a rung's last update, which was written before the rung was measured.
        progress = self.trainer.progress
        if progress.updates == self.trainer.updates_per_rung and "exact_kl" not in progress.records[-1]:
            progress.records[-1].update(self.measure(progress.tau))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        progress = self.trainer.progress
        progress.records[-1].update(self.measure(progress.tau))
        self.trainer.write_record()

    def measure(self, tau: float) -> dict[str, float]:
        """The distances of the model as it is now from `p_τ`."""
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
