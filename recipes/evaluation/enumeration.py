"""Exact probabilities for problems that are small enough to enumerate every string."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from problems.prior import RecipeModelConfig
from problems.spanning_tree import SpanningTreeProblem, load_problem
from problems.text_problem import TextProblem
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aldrift_hf import ALDRIFTTrainer
from aldrift_hf.models.prompts import encode_prompt
from aldrift_hf.models.scoring import inference, sequence_logprobs
from aldrift_hf.toy import completion_ids
from aldrift_hf.types import Completions


@dataclass(frozen=True)
class Enumeration:
    """Every string of a problem with its cost, and one more event of cost D for all other text together.

    A string's probability is that of its canonical token sequence. Other token sequences of the same text belong to
    "all other text"; with one token per word their probability is negligible.

    Attributes:
        texts: the `n` strings.
        cost: `[n]`.
        worst_cost: D, the cost of malformed text.
        tokenizer: encodes the strings.
        prompt: the prompt that the strings are completions of.
    """

    texts: list[str]
    cost: np.ndarray
    worst_cost: float
    tokenizer: PreTrainedTokenizerBase
    prompt: str = ""

    @classmethod
    def of(
        cls,
        texts: Iterable[str],
        cost: Callable[[str], float],
        worst_cost: float,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str = "",
    ) -> Enumeration:
        """From the strings and their cost function; see the class for the other arguments."""
        texts = list(texts)
        return cls(texts, np.array([cost(text) for text in texts]), worst_cost, tokenizer, prompt)

    def log_probs(self, model: PreTrainedModel, batch_size: int = 2048) -> np.ndarray:
        """`[n + 1]` log-probabilities under a model, nats; the last entry is all other text."""
        known = text_log_probs(self.texts, model, self.tokenizer, batch_size, self.prompt)
        rest = max(1.0 - float(np.exp(known).sum()), 1e-12)
        return np.append(known, np.log(rest))

    def target(self, log_prior: np.ndarray, tau: float) -> np.ndarray:
        """`log p_τ` from `log L`, both `[n + 1]`, nats."""
        tilted: np.ndarray = log_prior - tau * np.append(self.cost, self.worst_cost)
        normaliser = float(np.logaddexp.reduce(tilted))
        return tilted - normaliser

    def success(self, log_p: np.ndarray) -> float:
        """The probability of cost 0, from log-probabilities `[n + 1]`."""
        return float(np.exp(log_p[:-1][self.cost == 0]).sum())

    def mean_cost(self, log_p: np.ndarray) -> float:
        """The expected cost, from log-probabilities `[n + 1]`."""
        return float(np.exp(log_p) @ np.append(self.cost, self.worst_cost))

    def draw(self, log_p: np.ndarray, count: int, rng: np.random.Generator) -> list[str]:
        """Independent exact draws; all other text is drawn as the empty string."""
        p = np.exp(log_p)
        events = rng.choice(len(p), count, p=p / p.sum())
        return [self.texts[event] if event < len(self.texts) else "" for event in events]

    def counts(self, texts: Sequence[str]) -> np.ndarray:
        """The number of times that each event occurs among drawn texts, `[n + 1]`."""
        position = {text: index for index, text in enumerate(self.texts)}
        return np.bincount([position.get(text, len(self.texts)) for text in texts], minlength=len(self.texts) + 1)


def text_log_probs(
    texts: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 2048,
    prompt: str = "",
) -> np.ndarray:
    """`[n]` log-probabilities of complete texts after a prompt, in their canonical tokenization, nats."""
    rows = completion_ids(texts, tokenizer)
    start = encode_prompt(prompt, 0, tokenizer)
    with inference(model):
        log_probs: Tensor = sequence_logprobs(
            model, [start] * len(rows), Completions.of(rows, 0), pad_token_id=0, batch_size=batch_size
        )
    return log_probs.numpy()


def kl_divergence(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """`KL(p‖q)` of two vectors of log-probabilities, nats."""
    return float(np.exp(log_p) @ (log_p - log_q))


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Half the L1 distance between two probability vectors."""
    return float(np.abs(p - q).sum() / 2)


def can_enumerate(problem: TextProblem, model_config: RecipeModelConfig, at_most: int) -> bool:
    """Whether a problem has at most `at_most` strings, and its prior is the small model with one token per word."""
    return model_config.model_name_or_path is None and problem.number_of_strings() <= at_most


def enumerable_graph(name: str, model_config: RecipeModelConfig, at_most: int) -> SpanningTreeProblem:
    """The spanning-tree problem of a recipe that has to enumerate every string.

    Args:
        name: name of the graph, as in [`load_problem`].
        model_config: which model.
        at_most: largest number of strings.

    Raises:
        SystemExit: if there is no such graph, or its strings cannot be enumerated.
    """
    try:
        problem = load_problem(name)
    except ValueError as error:
        raise SystemExit(f"--graph: {error}") from None
    if not can_enumerate(problem, model_config, at_most):
        raise SystemExit(
            f"this recipe enumerates every string, and --graph {name} has {problem.number_of_strings():.6g}: take a "
            f"smaller graph (at most {at_most:,}, --enumerate_up_to), and leave out --model_name_or_path"
        )
    return problem


def enumerate_strings(problem: TextProblem, trainer: ALDRIFTTrainer) -> Enumeration:
    """Every string of a problem without prompts."""
    tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
    return Enumeration.of(problem.all_texts(), problem.cost_of, problem.worst_cost, tokenizer)
