"""A problem of the recipes: strings with a local rule, which the prior learns, and a cost, which only the loop sees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np


class TextProblem(ABC):
    """Strings of words joined by a separator. A problem says how to draw them, what they cost, and which there are."""

    @property
    @abstractmethod
    def words(self) -> Sequence[str]:
        """The vocabulary."""

    @property
    @abstractmethod
    def separator(self) -> str:
        """What stands between two words."""

    @property
    @abstractmethod
    def worst_cost(self) -> float:
        """D: no string costs more, and malformed text costs as much."""

    @abstractmethod
    def random_texts(self, count: int, rng: np.random.Generator) -> list[str]:
        """Draws of the local rule alone: what the prior is made from."""

    @abstractmethod
    def cost_of(self, text: str) -> float:
        """The cost of one completion, in `[0, D]`. Never raises: malformed text costs D."""

    @abstractmethod
    def number_of_strings(self) -> int:
        """How many well-formed strings there are."""

    @abstractmethod
    def all_texts(self) -> Iterator[str]:
        """Every well-formed string."""

    @property
    def prompts(self) -> list[str]:
        """What strings are completions of; of the empty prompt alone, unless a problem says otherwise."""
        return [""]

    def completions(self, prompt: str) -> Iterator[str]:
        """Every well-formed completion of a prompt."""
        return self.all_texts()

    def cost(self, prompts: list[str], completions: list[str]) -> list[float]:
        """The objective, in the trainer's form."""
        return [self.cost_of(text) for text in completions]
