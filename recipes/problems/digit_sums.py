"""Four digits with the digit sum of three given ones: a problem of many prompts that a model can learn from some.

The prompt is three digits to base 6, a completion four, and the cost is the distance of their sums. What helps for one
prompt helps for others, so that prompts which were never seen tell how far a model generalises.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from problems.text_problem import TextProblem

BASE, GIVEN, DRAWN = 6, 3, 4
"""The digits' base, and the number of digits of a prompt and of a completion."""
NUM_PROMPTS = BASE**GIVEN


@dataclass(frozen=True)
class DigitSumProblem(TextProblem):
    """Digit sums.

    Attributes:
        asked: the prompts, as numbers below `NUM_PROMPTS`.
    """

    asked: tuple[int, ...] = tuple(range(NUM_PROMPTS))

    @property
    def words(self) -> list[str]:
        """The digits."""
        return [str(digit) for digit in range(BASE)]

    @property
    def separator(self) -> str:
        """The text between two digits."""
        return " "

    @property
    def worst_cost(self) -> float:
        """D, the largest sum of a completion's digits, by which it can miss a prompt of zeros."""
        return float(DRAWN * (BASE - 1))

    @property
    def prompts(self) -> list[str]:
        """The digits of the prompts that are asked for."""
        every = [" ".join(digits) for digits in itertools.product(self.words, repeat=GIVEN)]
        return [every[number] for number in self.asked]

    def completions(self, prompt: str) -> Iterator[str]:
        """All sequences of four digits."""
        return map(" ".join, itertools.product(self.words, repeat=DRAWN))

    def random_texts(self, count: int, rng: np.random.Generator) -> list[str]:
        """Draw prompts with completions: seven digits with equal probability."""
        return [" ".join(map(str, row)) for row in rng.integers(BASE, size=(count, GIVEN + DRAWN))]

    def cost_of(self, text: str) -> float:
        """The distance between the sums of the first three and the last four digits; D for malformed text."""
        digits = text.split(" ")
        if len(digits) != GIVEN + DRAWN or not all(digit in self.words for digit in digits):
            return self.worst_cost
        sums = [sum(map(int, part)) for part in (digits[:GIVEN], digits[GIVEN:])]
        return float(abs(sums[0] - sums[1]))

    def cost(self, prompts: list[str], completions: list[str]) -> list[float]:
        """The objective: the distance of the sums of prompt and completion."""
        return [self.cost_of(f"{prompt} {text}") for prompt, text in zip(prompts, completions, strict=True)]

    def number_of_strings(self) -> int:
        """The number of prompts with a completion."""
        return int(BASE ** (GIVEN + DRAWN))

    def all_texts(self) -> Iterator[str]:
        """Every prompt with every completion."""
        return map(" ".join, itertools.product(self.words, repeat=GIVEN + DRAWN))


def split(seed: int = 0) -> tuple[DigitSumProblem, DigitSumProblem]:
    """Half of the prompts to train on, and the others, which are never seen."""
    order = np.random.default_rng(seed).permutation(NUM_PROMPTS).tolist()
    half = NUM_PROMPTS // 2
    return DigitSumProblem(tuple(sorted(order[:half]))), DigitSumProblem(tuple(sorted(order[half:])))
