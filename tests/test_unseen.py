"""A last fit to p_T and a share of the prior, on a problem all of whose strings are enumerated."""

import numpy as np
import pytest
import torch
from evaluation import unseen
from evaluation.enumeration import kl_divergence, text_log_probs
from peft import LoraConfig, get_peft_model
from problems.ehrlich import EhrlichProblem

from aldrift_hf.models.prior import base_model
from aldrift_hf.toy import SmallPriorConfig, small_prior

PROBLEM = EhrlichProblem(states=7, length=4, motifs=1, size=3, function_seed=1)
EVERY = sorted(PROBLEM.all_texts())
COST = np.array([PROBLEM.cost_of(text) for text in EVERY])
TAU = 5.0


@pytest.fixture
def learner(priors):
    """A model with an adapter that is not the prior any more, and its tokenizer."""
    config = SmallPriorConfig(steps=150, width=32)
    model, tokenizer = small_prior(PROBLEM.words, PROBLEM.separator, PROBLEM.random_texts, config, priors)
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", fan_in_fan_out=True, r=16, lora_alpha=32)
    policy = get_peft_model(model, lora)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return policy, tokenizer


def log_prior(policy, tokenizer):
    with policy.disable_adapter():
        return text_log_probs(EVERY, base_model(policy), tokenizer)


def known(share):
    """Costs of a random part of all strings."""
    chosen = np.flatnonzero(np.random.default_rng(0).random(len(EVERY)) < share)
    return {EVERY[index]: COST[index] for index in chosen}


def test_the_rows_are_those_of_the_mixture(learner, monkeypatch):
    """By the prior's own probabilities, whatever the adapter has learned."""
    policy, tokenizer = learner
    given = []
    monkeypatch.setattr(unseen, "fit", lambda model, tokenizer, rows, *settings: given.append((rows, settings)))
    costs = known(0.5)
    unseen.learn_with_prior(policy, tokenizer, PROBLEM, costs, tau=TAU, share=0.3, updates=7, seed=3)
    ((rows, (updates, size, _, seed)),) = given
    assert (updates, size, seed) == (7, unseen.BATCH, 3)
    count = 40_000
    drawn = rows(count, np.random.default_rng(1))
    assert len(drawn) == count
    prior = np.exp(log_prior(policy, tokenizer)) * np.array([text in costs for text in EVERY])
    target = prior * np.exp(-TAU * COST)
    # The random texts are the data that the prior was fitted to; their law is exact.
    law = np.bincount([EVERY.index(text) for text in PROBLEM.random_texts(400_000, np.random.default_rng(2))]) / 400_000
    wanted = 0.7 * target / target.sum() + 0.3 * law
    seen = np.bincount([EVERY.index(text) for text in drawn], minlength=len(EVERY)) / count
    likely = wanted > 1e-3
    assert likely.sum() > 50
    error = np.sqrt(wanted[likely] * (1 - wanted[likely]) * (1 / count + 0.3**2 / 400_000))
    assert np.abs((seen - wanted)[likely] / error).max() < 4.5


@pytest.mark.slow
def test_what_no_draw_has_shown_keeps_some_probability(learner):
    """p_T has a tenth or so where nothing was evaluated: with a share of the prior the model comes closer there."""
    policy, tokenizer = learner
    costs = known(0.9)
    unknown = np.array([text not in costs for text in EVERY])
    log_target = log_prior(policy, tokenizer) - TAU * COST
    log_target -= np.logaddexp.reduce(log_target)
    assert 0.03 < np.exp(log_target)[unknown].sum() < 0.2
    target, distance, there = np.exp(log_target), {}, {}
    start = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    for share in (0.0, 0.1):
        policy.load_state_dict(start, strict=False)
        unseen.learn_with_prior(policy, tokenizer, PROBLEM, costs, tau=TAU, share=share, updates=1000, seed=0)
        log_q = text_log_probs(EVERY, base_model(policy), tokenizer)
        distance[share] = kl_divergence(log_target, log_q)
        there[share] = target[unknown] @ (log_target - log_q)[unknown]
    assert distance[0.1] < 0.85 * distance[0.0]
    assert there[0.1] < 0.85 * there[0.0]
