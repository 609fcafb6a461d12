"""Round trips through cities as text, one prompt for each start: a conditional problem that can be enumerated.

The prior knows one rule, to name every city once. Given the first city as a prompt, a completion names the others, and
the cost is the length of the trip that returns to the start. A trip is as long from wherever on it one starts, so all
prompts have the same costs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from problems.text_problem import TextProblem

CAPITALS = {  # degrees north and east
    "Berlin": (52.5, 13.4),
    "Lisbon": (38.7, -9.1),
    "London": (51.5, -0.1),
    "Madrid": (40.4, -3.7),
    "Paris": (48.9, 2.4),
    "Rome": (41.9, 12.5),
    "Vienna": (48.2, 16.4),
}


class RoundTripProblem(TextProblem):
    """Trips in thousands of kilometres (great circles), through the capitals above."""

    @property
    def words(self) -> list[str]:
        """The cities."""
        return list(CAPITALS)

    @property
    def separator(self) -> str:
        """Between two cities."""
        return ", "

    @property
    def worst_cost(self) -> float:
        """D: as if every leg were the longest there is."""
        legs = [_distance(a, b) for a, b in itertools.combinations(CAPITALS, 2)]
        return len(CAPITALS) * max(legs)

    @property
    def prompts(self) -> list[str]:
        """Each city once."""
        return self.words

    def completions(self, prompt: str) -> Iterator[str]:
        """The other cities, in every order."""
        return map(self.separator.join, itertools.permutations(city for city in CAPITALS if city != prompt))

    def random_texts(self, count: int, rng: np.random.Generator) -> list[str]:
        """Whole trips, in random order."""
        return [self.separator.join(rng.permutation(self.words)) for _ in range(count)]

    def cost_of(self, text: str) -> float:
        """Length of a whole trip, the start included and the way back to it; D for anything but one."""
        trip = text.split(self.separator)
        if sorted(trip) != sorted(CAPITALS):
            return self.worst_cost
        return sum(_distance(a, b) for a, b in zip(trip, trip[1:] + trip[:1], strict=True))

    def cost(self, prompts: list[str], completions: list[str]) -> list[float]:
        """The objective: a trip is its prompt and what was written after it."""
        return [self.cost_of(start + self.separator + rest) for start, rest in zip(prompts, completions, strict=True)]

    def number_of_strings(self) -> int:
        """Of whole trips."""
        return math.factorial(len(CAPITALS))

    def all_texts(self) -> Iterator[str]:
        """Every whole trip."""
        return map(self.separator.join, itertools.permutations(CAPITALS))


def _distance(a: str, b: str) -> float:
    """Thousands of kilometres between two cities (haversine formula)."""
    (north_a, east_a), (north_b, east_b) = (map(math.radians, CAPITALS[city]) for city in (a, b))
    cosines = math.cos(north_a) * math.cos(north_b)
    half = math.hypot(math.sin((north_a - north_b) / 2), math.sqrt(cosines) * math.sin((east_a - east_b) / 2))
    return 2 * 6.371 * math.asin(half)
