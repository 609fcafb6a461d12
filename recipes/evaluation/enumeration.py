"""Exact references where every string of a problem can be written down."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aldrift_hf.models.prompts import encode_prompt
from aldrift_hf.models.scoring import inference, sequence_logprobs
from aldrift_hf.toy import completion_ids
from aldrift_hf.types import Completions


@dataclass(frozen=True)
class Enumeration:
    """Every well-formed string of a problem with its cost; all other text together is one more event, of cost D.

    A string stands for its canonical token sequence. What a model puts on other token sequences of the same text counts
    as "all other text"; with one token a word there is next to none.

    Attributes:
        texts: the strings.
        cost: `[n]`.
        worst_cost: D.
        tokenizer: reads the strings.
        prompt: what they are completions of.
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
        """From the strings and their cost function."""
        texts = list(texts)
        return cls(texts, np.array([cost(text) for text in texts]), worst_cost, tokenizer, prompt)

    def log_probs(self, model: PreTrainedModel, batch_size: int = 2048) -> np.ndarray:
        """`[n + 1]` log-probabilities after the prompt; the last entry is all other text."""
        known = text_log_probs(self.texts, model, self.tokenizer, batch_size, self.prompt)
        rest = max(1.0 - float(np.exp(known).sum()), 1e-12)
        return np.append(known, np.log(rest))

    def target(self, log_prior: np.ndarray, tau: float) -> np.ndarray:
        """`log p_τ` from `log L`, both `[n + 1]`."""
        tilted: np.ndarray = log_prior - tau * np.append(self.cost, self.worst_cost)
        normaliser = float(np.logaddexp.reduce(tilted))
        return tilted - normaliser

    def success(self, log_p: np.ndarray) -> float:
        """Mass on strings of cost 0."""
        return float(np.exp(log_p[:-1][self.cost == 0]).sum())

    def mean_cost(self, log_p: np.ndarray) -> float:
        """Expected cost."""
        return float(np.exp(log_p) @ np.append(self.cost, self.worst_cost))

    def draw(self, log_p: np.ndarray, count: int, rng: np.random.Generator) -> list[str]:
        """Exact draws from `log_p`; all other text is drawn as the empty string."""
        p = np.exp(log_p)
        events = rng.choice(len(p), count, p=p / p.sum())
        return [self.texts[event] if event < len(self.texts) else "" for event in events]

    def counts(self, texts: Sequence[str]) -> np.ndarray:
        """How often each event occurs among drawn texts, `[n + 1]`."""
        position = {text: index for index, text in enumerate(self.texts)}
        return np.bincount([position.get(text, len(self.texts)) for text in texts], minlength=len(self.texts) + 1)


def text_log_probs(
    texts: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 2048,
    prompt: str = "",
) -> np.ndarray:
    """`[n]` log-probabilities of whole texts, in their canonical tokenisation, after a prompt."""
    rows = completion_ids(texts, tokenizer)
    start = encode_prompt(prompt, 0, tokenizer)
    with inference(model):
        log_probs: Tensor = sequence_logprobs(
            model, [start] * len(rows), Completions.of(rows, 0), pad_token_id=0, batch_size=batch_size
        )
    return log_probs.numpy()


def kl_divergence(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """`KL(p‖q)` in nats."""
    return float(np.exp(log_p) @ (log_p - log_q))


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Half the L1 distance of two probability vectors."""
    return float(np.abs(p - q).sum() / 2)
