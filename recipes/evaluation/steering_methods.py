"""Methods for steering tasks: learning ones give a model, and those at test time samples of p_T from the prior."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, set_seed

from aldrift_hf.trainer.trainer import ALDRIFTTrainer
from evaluation.gold import Array
from evaluation.steering_model import Drawn, Learner, Steered
from evaluation.steering_trainers import Job, aldrift, aldrift_trainer, generations, policy_gradient, set_precision

ROUND = 256
"""Calls per round of expert iteration."""
Learned = tuple[PeftModel, int]
"""A model, and the number of completions that were evaluated."""


def with_adapter(job: Job) -> Steered:
    """The prior with a new adapter."""
    set_seed(job.setting.seed)
    model = set_precision(cast(PeftModel, get_peft_model(job.model, job.lora)), job.setting)
    if job.setting.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return steered_by(job, model)


def steered_by(job: Job, model: PreTrainedModel | PeftModel) -> Steered:
    """A model on the run's task, in its precision."""
    return Steered(job.task, model, job.tokenizer, job.setting.seed, job.setting.autocast)


# ---- Distributional policy gradients ---------------------------------------------------------------------------------


def dpg(job: Job) -> Learned:
    """Distributional policy gradients on the policy's own draws (GDC, arXiv 2012.11635), with the baseline of arXiv
    2206.00761: `∇θ = E_q[(p_T/q - 1)·∇ log q]`, the gradient of `-KL(p_T‖q)`. `Z` is the mean of all weights so far.
    """
    steered = with_adapter(job)
    learner, size, per_prompt = Learner(steered, job.setting.learning_rate), job.setting.batch_size, generations(job)
    order = endless(len(steered.prompts), job.setting.seed)
    log_sums, counts = np.full(len(steered.prompts), -np.inf), np.zeros(len(steered.prompts))
    for update in range(job.setting.calls // size):
        which = [next(order) for _ in range(size // per_prompt)]
        drawn = steered.draw(per_prompt, (0, update), which)
        log_weight = drawn.log_prior - job.task.tau_max * drawn.cost - drawn.log_model
        for row, found in zip(which, log_weight, strict=True):
            log_sums[row] = np.logaddexp(log_sums[row], np.logaddexp.reduce(found))
            counts[row] += per_prompt
        factors = dpg_factors(log_weight, (log_sums - np.log(np.maximum(counts, 1)))[which])
        learner.ascend(np.repeat(which, per_prompt).tolist(), drawn.completions, factors.flatten().tolist())
    return cast(PeftModel, steered.model), (update + 1) * per_prompt * len(which)


def dpg_factors(log_weight: Array, log_z: Array) -> Array:
    """What each draw's `∇ log q` is multiplied by: `(p/q - 1)` over the number of draws.

    Args:
        log_weight: `log L - T·d - log q`, `[P, n]`.
        log_z: `[P]`.
    """
    factors: Array = np.expm1(log_weight - log_z[:, None]) / log_weight.size
    return factors


def endless(count: int, seed: int) -> Iterator[int]:
    """The prompts in random order, again and again."""
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.permutation(count).tolist()


# ---- Expert iteration ------------------------------------------------------------------------------------------------


def expert_iteration(job: Job) -> Learned:
    """Each round draws from the model, then fine-tunes it on the best share of each prompt's draws of all rounds.

    There are as many updates as batches of calls.
    """
    steered, setting = with_adapter(job), job.setting
    learner, prompts = Learner(steered, setting.learning_rate), len(steered.prompts)
    rounds = max(1, setting.calls // ROUND)
    per_prompt = setting.calls // (rounds * prompts)
    rng = np.random.default_rng(setting.seed)
    seen: list[list[tuple[float, list[int]]]] = [[] for _ in range(prompts)]
    for number in range(rounds):
        drawn = steered.draw(per_prompt, (1, number))
        for row in range(prompts):
            part = slice(row * per_prompt, (row + 1) * per_prompt)
            seen[row] += zip(drawn.cost[row].tolist(), drawn.completions[part], strict=True)
        best = [(row, tokens) for row, found in enumerate(seen) for tokens in best_share(found, setting.keep)]
        for _ in range(max(1, setting.calls // (rounds * setting.batch_size))):
            batch = [best[index] for index in rng.integers(len(best), size=setting.batch_size)]
            rows, completions = [row for row, _ in batch], [tokens for _, tokens in batch]
            factor = 1 / sum(map(len, completions))
            learner.ascend(rows, completions, [factor] * len(batch))
    return cast(PeftModel, steered.model), rounds * prompts * per_prompt


def best_share(found: list[tuple[float, list[int]]], share: float) -> list[list[int]]:
    """The completions of lowest cost, at least one; those of equal cost in the order in which they were drawn."""
    ordered = sorted(found, key=lambda pair: pair[0])
    return [tokens for _, tokens in ordered[: max(1, round(share * len(found)))]]


LEARN: dict[str, Callable[[Job], Learned]] = {
    "aldrift": aldrift,
    "rloo": policy_gradient,
    "grpo": policy_gradient,
    "expert_iteration": expert_iteration,
    "dpg": dpg,
    "defaults": aldrift,
}
"""Methods that learn, by name."""


# ---- At test time ----------------------------------------------------------------------------------------------------


def rejection(job: Job) -> Drawn:
    """Draws of the prior. Accepted with probability `exp(-T·d)`, those that are left are exact draws of p_T."""
    return steered_by(job, job.model).draw(job.setting.calls // len(job.task.rows), (2,))


def suffix_mh(job: Job) -> dict[str, float]:
    """Metropolis-Hastings chains from draws of the prior that redraw a suffix in each step (QUEST, arXiv 2406.00049).

    Returns:
        `corrected_cost`, the mean cost of the chains' last states, with its error; `distinct` among them; `calls`.
    """
    trainer: ALDRIFTTrainer = aldrift_trainer(job)
    prompts, steps = len(job.task.rows), job.setting.chain_length
    chains = max(2, job.setting.calls // (prompts * steps))
    last = trainer.sample(chains, chain_length=steps, correction="suffix")
    cost = np.array(last["objective"]).reshape(prompts, chains)
    texts = [{*last["completion"][row * chains : (row + 1) * chains]} for row in range(prompts)]
    errors = cost.std(-1, ddof=1) / np.sqrt(chains)
    return {
        "corrected_cost": float(cost.mean()),
        "corrected_cost_error": float(np.sqrt((errors**2).sum()) / prompts),
        "distinct": sum(map(len, texts)) / cost.size,
        "calls": prompts * chains * steps,
    }


def to_accelerator(job: Job) -> None:
    """Move the model where it learns; trainers do so by themselves."""
    if torch.accelerator.is_available():
        job.model.to(torch.accelerator.current_accelerator())
