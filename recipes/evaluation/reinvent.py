"""REINVENT's way to train a model on a score (Olivecrona et al. 2017, arXiv 1704.07555), which chemists know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from problems.prior import RecipeModelConfig
from problems.text_problem import TextProblem
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aldrift_hf.models.prior import base_model
from aldrift_hf.models.prompts import encode_prompt
from aldrift_hf.toy import completion_ids
from aldrift_hf.trainer.samples import SampleCollator
from evaluation.baselines import CountedObjective, Learned, drawn_texts, with_adapter
from evaluation.enumeration import text_log_probs

REMEMBERED = 100
"""The best texts so far, of which some are learned from again."""


def reinvent(
    problem: TextProblem,
    model_config: RecipeModelConfig,
    objective: CountedObjective,
    *,
    tau_max: float,
    proposals: int,
    batch: int,
    learning_rate: float,
    replayed: int,
    seed: int,
) -> Learned:
    """Minimise `(log L(s) + T·(D - d(s)) - log q(s))²` over the model's draws, and over the best texts so far.

    `D - d` is the score, and T is what REINVENT calls sigma. Over the model's own draws alone the loss's mean gradient
    is that of `2·KL(q‖p_T)`, so that p_T is its fixed point: the constant by which the bracket misses 0 there, log Z,
    has no gradient on average. Over other draws it has, and p_T is no fixed point
    (`tests/test_reinvent.py` shows both).

    Args:
        problem: the problem, which has no prompts.
        model_config: the prior, with LoRA.
        objective: what counts the calls, and limits them.
        tau_max: T, REINVENT's sigma.
        proposals: draws at most.
        batch: draws per update.
        learning_rate: Adam's, constant.
        replayed: of the `REMEMBERED` best texts, as many are added to each update.
        seed: random seed.
    """
    policy, tokenizer, config = with_adapter(problem, model_config, seed)
    optimizer = torch.optim.Adam([weights for weights in policy.parameters() if weights.requires_grad], learning_rate)
    rng, best = np.random.default_rng(seed), dict[str, float]()
    for number in range(proposals // batch):
        texts = drawn_texts(policy, tokenizer, config, "", batch, (seed, number, 0))
        texts += rng.choice([*best], min(replayed, len(best)), replace=False).tolist() if best else []
        cost = objective([""] * len(texts), texts)
        best = dict(sorted((best | dict(zip(texts, cost))).items(), key=lambda pair: pair[1])[:REMEMBERED])
        with policy.disable_adapter():
            log_prior = torch.as_tensor(text_log_probs(texts, base_model(policy), tokenizer))
        aim = log_prior + tau_max * (problem.worst_cost - torch.tensor(cost, dtype=log_prior.dtype))
        optimizer.zero_grad()
        cast(Any, (aim - log_model(base_model(policy), tokenizer, texts)).square().mean()).backward()
        optimizer.step()
        if objective.is_spent:
            break
    return policy, tokenizer, len(objective.known)


def log_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """`[n]` log-probabilities of complete texts after the empty prompt, with gradients, nats."""
    start = encode_prompt("", 0, tokenizer)
    rows = [{"prompt": start, "completion": ids} for ids in completion_ids(texts, tokenizer)]
    batch = SampleCollator(cast(int, tokenizer.eos_token_id))(rows)
    labels = batch.pop("labels")[:, 1:]
    log_probs = model(**batch).logits[:, :-1].log_softmax(-1)
    chosen = log_probs.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return cast(Tensor, chosen.masked_fill(labels < 0, 0.0).sum(-1))
