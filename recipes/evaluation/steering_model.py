"""A chat model on a steering task: fresh draws with log q, log L and cost, scores of other completions, and updates."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from peft import PeftModel
from problems.steering import SteeringTask
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aldrift_hf.models.generation import generate, neutral_generation_config
from aldrift_hf.models.head import projected_logprobs
from aldrift_hf.models.passes import join
from aldrift_hf.models.prior import base_model
from aldrift_hf.models.prompts import encode_prompt
from aldrift_hf.models.scoring import inference, learning_pass, sequence_logprobs
from aldrift_hf.models.shared_prompts.attention import sharing
from aldrift_hf.models.vocabulary import eos_token_ids, pad_token_id
from aldrift_hf.streams import uniforms
from aldrift_hf.types import Completions
from evaluation.gold import Array

BLOCK = 128
"""Completions that are drawn and scored at once."""
TOKENS = 8192
"""Most tokens per forward pass that scores."""
PURPOSE = 6
"""The purpose of the streams of random numbers, beside those of the package and of gold."""


@dataclass
class Drawn:
    """`n` draws of a model for each of `P` prompts; row `r` is for prompt `r // n`.

    Attributes:
        completions: token ids of the `P·n` draws.
        texts: decoded.
        cost: `d`, `[P, n]`.
        log_model: `log q` of the model that drew them, nats, `[P, n]`.
        log_prior: `log L`, nats, `[P, n]`.
    """

    completions: list[list[int]]
    texts: list[str]
    cost: Array
    log_model: Array
    log_prior: Array

    @property
    def tokens(self) -> Array:
        """Tokens of each draw, `[P, n]`."""
        return np.array([len(row) for row in self.completions], dtype=np.float64).reshape(self.cost.shape)


class Steered:
    """A model on a task.

    Args:
        task: the task.
        model: the model q; with an adapter, switched off it is the prior L; without one it is L.
        tokenizer: its tokenizer.
        seed: random seed of the draws.
        autocast: whether products of fp32 weights are computed in bf16, in drawing, scoring and learning.
    """

    def __init__(
        self,
        task: SteeringTask,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        autocast: bool = False,
    ) -> None:
        self.task, self.model, self.tokenizer, self.seed = task, model, tokenizer, seed
        self.autocast = autocast
        self.base = base_model(model)
        self.prompts = [encode_prompt(row["prompt"], index, tokenizer) for index, row in enumerate(task.rows)]
        self.pad_token_id = pad_token_id(tokenizer, None)
        self.config = neutral_generation_config(
            max_completion_length=task.max_completion_length,
            eos_token_ids=eos_token_ids(self.base, tokenizer),
            pad_token_id=self.pad_token_id,
        )

    def draw(self, per_prompt: int, stream: Sequence[int], which: Sequence[int] | None = None) -> Drawn:
        """`per_prompt` draws for every prompt, or for the prompts `which`, each evaluated and scored.

        Args:
            per_prompt: n.
            stream: address of the random numbers.
            which: prompts; `None` for all.
        """
        asked = range(len(self.prompts)) if which is None else which
        rows = [row for row in asked for _ in range(per_prompt)]
        completions: list[list[int]] = []
        log_model: list[float] = []
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            numbers = uniforms(
                (self.seed, PURPOSE, *stream), range(start, start + len(block)), self.task.max_completion_length
            )
            with inference(self.model), self.precision():
                drawn = generate(self.base, [self.prompts[row] for row in block], self.config, numbers)
            completions += drawn.completions.tokens()
            log_model += drawn.log_probs.tolist()
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        columns = {name: [self.task.rows[row][name] for row in rows] for name in self.task.columns}
        cost = self.task.cost([self.task.rows[row]["prompt"] for row in rows], texts, **columns)
        prior = self.scores(rows, completions, prior=True) if isinstance(self.model, PeftModel) else log_model
        shaped = (np.array(values, dtype=np.float64).reshape(-1, per_prompt) for values in (cost, log_model, prior))
        return Drawn(completions, texts, *shaped)

    def scores(self, rows: Sequence[int], completions: Sequence[Sequence[int]], *, prior: bool = False) -> Array:
        """`log q`, or `log L`, of completions of the prompts `rows`, nats, `[n]`."""
        off = prior and isinstance(self.model, PeftModel)
        adapter = self.model.disable_adapter() if off else contextlib.nullcontext()
        with inference(self.model), self.precision(), adapter:
            found = sequence_logprobs(
                self.base,
                [self.prompts[row] for row in rows],
                Completions.of(completions, self.pad_token_id),
                pad_token_id=self.pad_token_id,
                batch_size=BLOCK,
                batch_tokens=TOKENS,
            )
        return cast(Array, found.numpy())

    def log_probs(self, rows: Sequence[int], completions: Sequence[Sequence[int]]) -> Tensor:
        """`log q` of completions of the prompts `rows`, `[n]`, with gradients. Call it in a [`sharing`] context."""
        padded = join([self.prompts[row] for row in rows], completions, self.pad_token_id)
        forward = learning_pass(self.base, padded).to(self.base.device)
        with self.precision():
            found = projected_logprobs(self.base, forward.select, forward.targets, **forward.inputs)
        return forward.table(found).sum(-1)

    def precision(self) -> torch.autocast:
        """The precision of matrix products, as a context."""
        return torch.autocast(self.base.device.type, torch.bfloat16, enabled=self.autocast)


class Learner:
    """Updates of a model by gradients of weighted log-likelihoods: AdamW with a constant learning rate.

    Args:
        steered: the model, with an adapter.
        learning_rate: of AdamW.
    """

    def __init__(self, steered: Steered, learning_rate: float) -> None:
        self.steered = steered
        self.parameters = [parameter for parameter in steered.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0)

    def ascend(self, rows: Sequence[int], completions: Sequence[Sequence[int]], factors: Sequence[float]) -> None:
        """One update that raises `Σ factors · log q`; the gradient's norm is cut at 1, as TRL's trainers do."""
        self.steered.model.train()
        with sharing(self.steered.base):  # also for layers that run again in the backward pass
            scores = self.steered.log_probs(rows, completions)
            loss = -(torch.tensor(factors, dtype=scores.dtype, device=scores.device) * scores).sum()
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
