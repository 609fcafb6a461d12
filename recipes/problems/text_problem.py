"""What every problem of the recipes has: texts that follow a local rule, which the prior learns, and a cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TextProblem(ABC):
    """Texts made of words joined by a separator.

    A *string* of the problem is a well-formed text: one that the local rule can produce. A problem draws strings, lists
    all of them, and computes the cost of any text.
    """

    @property
    @abstractmethod
    def words(self) -> Sequence[str]:
        """The vocabulary."""

    @property
    @abstractmethod
    def separator(self) -> str:
        """The text between two words."""

    @property
    @abstractmethod
    def worst_cost(self) -> float:
        """D, an upper bound on the cost of a string, and the cost of malformed text."""

    @abstractmethod
    def random_texts(self, count: int, rng: np.random.Generator) -> list[str]:
        """Draw strings by the local rule alone, without regard to the cost: the prior is trained on them."""

    @abstractmethod
    def cost_of(self, text: str) -> float:
        """The cost of one text, in `[0, D]`. Never raises: malformed text costs D."""

    @abstractmethod
    def number_of_strings(self) -> int:
        """The number of strings."""

    @abstractmethod
    def all_texts(self) -> Iterator[str]:
        """Every string."""

    @property
    def prompts(self) -> list[str]:
        """The prompts whose completions are drawn: only the empty one, unless a problem overrides this."""
        return [""]

    def completions(self, prompt: str) -> Iterator[str]:
        """Every well-formed completion of a prompt."""
        return self.all_texts()

    def prior_from(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """The prior, from the small model that was trained on the problem's strings: the model itself, unless a problem
        overrides this.
        """
        return model

    def cost(self, prompts: list[str], completions: list[str]) -> list[float]:
        """The objective, as the trainer calls it."""
        return [self.cost_of(text) for text in completions]
