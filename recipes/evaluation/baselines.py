"""Other methods that train a model from a prior and a cost: TRL's policy gradients, expert iteration, and CbAS.

Each takes a budget of proposals, or of distinct completions that are evaluated, and returns a model. TRL's two trainers
maximise `E_q[-d] - KL(q‖L)/T`, where `q` is the model, `L` the prior, `d` the cost and `T` the inverse temperature. The
optimum is `p_T`, as for ALDRIFT.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from problems.prior import RecipeModelConfig, completion_limit, make_prior
from problems.text_problem import TextProblem
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from aldrift_hf.models.generation import generate, neutral_generation_config
from aldrift_hf.models.prior import base_model
from aldrift_hf.models.prompts import encode_prompt
from aldrift_hf.models.scoring import inference
from aldrift_hf.streams import stream_seed, uniforms
from aldrift_hf.toy import fit
from evaluation.enumeration import text_log_probs

TRL: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "rloo": (RLOOTrainer, RLOOConfig, {"normalize_advantages": False}),
    "grpo": (GRPOTrainer, GRPOConfig, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
}
"""TRL's trainers by name, with their configuration class and the settings that make them aim at `p_T`."""

Learned = tuple[PeftModel, PreTrainedTokenizerBase, int]
"""A model, its tokenizer, and the number of distinct completions that were evaluated."""


class Watch(Protocol):
    """Looks at a model in the course of a run."""

    @property
    def is_over(self) -> bool:
        """Whether the run shall end."""
        ...

    def begin(self) -> None:
        """What it does before the first round."""
        ...

    def look(self, model: PreTrainedModel) -> None:
        """What it does after each round."""
        ...


class CountedObjective(TrainerCallback):
    """A problem's objective that evaluates each distinct completion of a prompt once, and ends a training that has
    evaluated enough.

    Args:
        problem: the problem.
        limit: (prompt, completion) pairs after whose evaluation it is enough.

    Attributes:
        known: the cost of each (prompt, completion) pair evaluated so far.
    """

    def __init__(self, problem: TextProblem, limit: int | None = None) -> None:
        self.problem, self.limit = problem, limit
        self.known: dict[tuple[str, str], float] = {}

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        pairs = list(zip(prompts, completions, strict=True))
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self.known]
        costs = self.problem.cost([prompt for prompt, _ in new], [completion for _, completion in new])
        self.known.update(zip(new, costs, strict=True))
        return [self.known[pair] for pair in pairs]

    @property
    def is_spent(self) -> bool:
        """Whether it is enough."""
        return self.limit is not None and len(self.known) >= self.limit

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop |= self.is_spent


def policy_gradient(
    method: str,
    problem: TextProblem,
    model_config: RecipeModelConfig,
    *,
    tau_max: float,
    proposals: int,
    generations: int,
    learning_rate: float,
    seed: int,
    schedule: str = "constant",
    prompts_per_update: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    objective: CountedObjective | None = None,
) -> Learned:
    """Train with one of TRL's trainers and `beta = 1/T`, with one update per batch of proposals.

    Args:
        method: a name in `TRL`.
        problem: the problem.
        model_config: the prior, with LoRA.
        tau_max: T, the target's inverse temperature.
        proposals: number of proposals, rounded down to whole batches; one batch at least.
        generations: proposals per prompt per update.
        learning_rate: the largest one.
        seed: random seed.
        schedule: the course of the learning rate, as transformers names it.
        prompts_per_update: as it says; `None` for all.
        callbacks: of the trainer's.
        objective: what counts the calls, and may limit them; `None` for one without a limit.

    Raises:
        ValueError: for fewer proposals than one update has.
    """
    model, tokenizer, peft_config = make_prior(problem, model_config)
    tokenizer.pad_token = tokenizer.eos_token
    objective, prompts = objective or CountedObjective(problem), problem.prompts
    batch_size = generations * (prompts_per_update or len(prompts))
    trainer_class, config_class, own_settings = TRL[method]
    if proposals < batch_size:  # `max_steps = 0` would mean the number of epochs
        raise ValueError(f"{proposals} proposals are fewer than one update's, {batch_size}")

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [-cost for cost in objective(prompts, completions)]

    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            output_dir=folder,
            beta=1 / tau_max,
            learning_rate=learning_rate,
            lr_scheduler_type=schedule,
            max_steps=proposals // batch_size,
            per_device_train_batch_size=batch_size,
            num_generations=generations,
            max_completion_length=completion_limit(problem, tokenizer, model_config),
            disable_dropout=True,
            max_grad_norm=1.0,
            seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            bf16=False,
            use_cpu=not torch.accelerator.is_available(),
            **own_settings,
        )
        dataset = Dataset.from_dict({"prompt": prompts})
        set_seed(seed)  # TRL 1.0 makes the adapter before it sets the seed
        trainer = trainer_class(
            model, reward, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config,
            callbacks=[*callbacks, objective],
        )  # fmt: skip
        trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model), tokenizer, len(objective.known)


def expert_iteration(
    problem: TextProblem,
    model_config: RecipeModelConfig,
    *,
    rounds: int,
    proposals: int,
    updates: int,
    learning_rate: float,
    seed: int,
    keep: float = 0.1,
    watch: Watch | None = None,
) -> Learned:
    """Train by expert iteration: each round draws from the model, then fine-tunes it on the best draws of all rounds.

    Those of equal cost are taken in the order in which they were drawn.

    Args:
        problem: the problem.
        model_config: the prior, with LoRA.
        rounds: number of rounds.
        proposals: number of proposals in all rounds together.
        updates: optimizer updates per round, on 128 rows each.
        learning_rate: peak of each round's one-cycle schedule.
        seed: random seed.
        keep: share of each prompt's draws that counts as the best.
        watch: looks at the model after each round, and may end the run.

    Raises:
        ValueError: for fewer proposals than rounds and prompts.
    """
    policy, tokenizer, config = with_adapter(problem, model_config, seed)
    objective, prompts = CountedObjective(problem), problem.prompts
    if watch is not None:
        watch.begin()
    per_prompt = proposals // (rounds * len(prompts))
    if per_prompt == 0:
        raise ValueError(f"{proposals} proposals are fewer than one for each round and prompt, {rounds * len(prompts)}")
    drawn: dict[str, list[tuple[float, str]]] = {prompt: [] for prompt in prompts}
    for number in range(rounds):
        for index, prompt in enumerate(prompts):
            texts = drawn_texts(policy, tokenizer, config, prompt, per_prompt, (seed, number, index))
            drawn[prompt] += zip(objective([prompt] * per_prompt, texts), texts, strict=True)
        best = [
            problem.separator.join(filter(None, (prompt, text)))
            for prompt, rows in drawn.items()
            for _, text in sorted(rows, key=lambda row: row[0])[: max(1, round(keep * len(rows)))]
        ]
        fit(
            policy,
            tokenizer,
            lambda count, rng, best=best: [best[i] for i in rng.integers(len(best), size=count)],  # type: ignore[misc]
            updates,
            128,
            learning_rate,
            stream_seed(seed, number),
        )
        if watch is not None:
            watch.look(cast(PreTrainedModel, policy))
            if watch.is_over:
                break
    return policy, tokenizer, len(objective.known)


def cbas(
    problem: TextProblem,
    model_config: RecipeModelConfig,
    objective: CountedObjective,
    *,
    rounds: int,
    proposals: int,
    updates: int,
    learning_rate: float,
    seed: int,
    quantile: float = 0.9,
) -> Learned:
    """Conditioning by adaptive sampling (Brookes et al. 2019, arXiv 1901.10060, algorithm 1), for a problem without
    prompts: each round's draws at or below a cost are learned with weights L/q by maximum likelihood.

    Args:
        problem: the problem.
        model_config: the prior, with LoRA.
        objective: what counts the calls, and limits them.
        rounds: number of rounds, at most.
        proposals: per round.
        updates: optimizer updates per round, on 128 rows each.
        learning_rate: peak of each round's one-cycle schedule.
        seed: random seed.
        quantile: the share of a round's draws that cost too much, Q; the bound never rises.
    """
    policy, tokenizer, config = with_adapter(problem, model_config, seed)
    bound = problem.worst_cost
    for number in range(rounds):
        texts = drawn_texts(policy, tokenizer, config, "", proposals, (seed, number, 0))
        cost = np.array(objective([""] * proposals, texts))
        bound = min(bound, float(np.quantile(cost, 1 - quantile)))
        log_model = text_log_probs(texts, base_model(policy), tokenizer)
        with policy.disable_adapter():
            log_prior = text_log_probs(texts, base_model(policy), tokenizer)
        weights = np.where(cost <= bound + 1e-9, np.exp(log_prior - log_model), 0.0)
        if weights.any():  # otherwise no draw is as good as the earlier rounds' best share
            fit(
                policy,
                tokenizer,
                partial(_by_weight, texts, weights),
                updates,
                128,
                learning_rate,
                stream_seed(seed, number),
            )
        if objective.is_spent:
            break
    return policy, tokenizer, len(objective.known)


def _by_weight(texts: Sequence[str], weights: np.ndarray, count: int, rng: np.random.Generator) -> list[str]:
    return [texts[index] for index in rng.choice(len(texts), count, p=weights / weights.sum())]


def with_adapter(
    problem: TextProblem, model_config: RecipeModelConfig, seed: int
) -> tuple[PeftModel, PreTrainedTokenizerBase, GenerationConfig]:
    """The prior with a new adapter, its tokenizer, and how it draws completions.

    Raises:
        SystemExit: where an adapter is not made, or the prior has one.
    """
    model, tokenizer, peft_config = make_prior(problem, model_config)
    if peft_config is None:
        sys.exit(
            "expert iteration, CbAS and REINVENT train a new adapter on the prior: leave out --no_use_peft, and "
            "--model_name_or_path of a model that is warmed up first; or leave them out of --methods."
        )
    torch.manual_seed(seed)
    policy = cast(PeftModel, get_peft_model(model, cast(Any, peft_config)))
    return policy, tokenizer, drawing_config(problem, tokenizer, model_config)


def drawing_config(
    problem: TextProblem, tokenizer: PreTrainedTokenizerBase, model_config: RecipeModelConfig
) -> GenerationConfig:
    """How completions of a problem are drawn."""
    end = cast(int, tokenizer.eos_token_id)
    limit = completion_limit(problem, tokenizer, model_config)
    return neutral_generation_config(max_completion_length=limit, eos_token_ids=[end], pad_token_id=end)


def drawn_texts(
    policy: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
    prompt: str,
    count: int,
    address: tuple[int, int, int],
) -> list[str]:
    """Texts drawn from a policy for one prompt, with the random numbers of an address."""
    starts = [encode_prompt(prompt, 0, tokenizer)] * count
    with inference(policy):
        numbers = uniforms(address, range(count), cast(int, config.max_new_tokens))
        draws = generate(base_model(policy), starts, config, numbers)
    return cast(list[str], tokenizer.batch_decode(draws.completions.tokens(), skip_special_tokens=True))
