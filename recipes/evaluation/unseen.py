"""A last fit to p_T that leaves some probability to what no draw has shown.

A model that has learned from its own draws for long gives up what none of them was: there its probability is far below
p_T's, and KL(p_T‖q) is infinite where it is 0. A mixture with a share of the prior bounds `log p_T/q` (a *defensive
mixture*, Hesterberg 1995, Technometrics 37), and what the model has in common with its texts says where that share is
likely to be.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from peft import PeftModel
from problems.text_problem import TextProblem
from transformers import PreTrainedTokenizerBase

from aldrift_hf.models.prior import base_model
from aldrift_hf.toy import fit
from evaluation.enumeration import text_log_probs

BATCH = 128
LEARNING_RATE = 1e-3
"""Of the updates, at most: it falls to 0."""


def learn_with_prior(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    problem: TextProblem,
    costs: Mapping[str, float],
    *,
    tau: float,
    share: float,
    updates: int,
    seed: int,
) -> None:
    """Learn `(1 - share)·p_τ + share·L` by maximum likelihood, where p_τ is that of the texts whose costs are known.

    Args:
        model: the model, whose base is the prior L.
        tokenizer: its tokenizer.
        problem: without prompts; its random texts are draws of the prior.
        costs: of all texts that were evaluated.
        tau: the inverse temperature.
        share: of the prior.
        updates: optimizer updates.
        seed: random seed.
    """
    texts = [*costs]
    with model.disable_adapter():
        log_prior = text_log_probs(texts, base_model(model), tokenizer)
    log_weight = log_prior - tau * np.array([*costs.values()])
    weights = np.exp(log_weight - log_weight.max())

    def rows(count: int, rng: np.random.Generator) -> list[str]:
        of_prior = rng.binomial(count, share)
        known = rng.choice(len(texts), count - of_prior, p=weights / weights.sum())
        return [*problem.random_texts(of_prior, rng), *(texts[index] for index in known)]

    fit(model, tokenizer, rows, updates, BATCH, LEARNING_RATE, seed)
