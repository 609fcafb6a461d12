"""Round trips through cities as text, with one prompt per starting city: a conditional problem that can be enumerated.

The local rule is to name every city once. The prompt is the first city, a completion names the others, and the cost is
the length of the round trip. The length does not depend on where the trip starts, so the costs are the same for all
prompts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from problems.text_problem import TextProblem

Position = tuple[float, float]
"""Degrees north and east."""

CAPITALS: Mapping[str, Position] = {
    "Berlin": (52.5, 13.4),
    "Lisbon": (38.7, -9.1),
    "London": (51.5, -0.1),
    "Madrid": (40.4, -3.7),
    "Paris": (48.9, 2.4),
    "Rome": (41.9, 12.5),
    "Vienna": (48.2, 16.4),
}


@dataclass(frozen=True)
class RoundTripProblem(TextProblem):
    """Round trips, measured along great circles in thousands of kilometres.

    Attributes:
        cities: the position of each city, by its name.
    """

    cities: Mapping[str, Position] = field(default_factory=lambda: CAPITALS)

    @property
    def words(self) -> list[str]:
        """The names of the cities."""
        return list(self.cities)

    @property
    def separator(self) -> str:
        """The text between two cities."""
        return ", "

    @property
    def worst_cost(self) -> float:
        """D, the length of a trip if every leg were as long as the longest one."""
        legs = [_distance(a, b) for a, b in itertools.combinations(self.cities.values(), 2)]
        return len(self.cities) * max(legs)

    @property
    def prompts(self) -> list[str]:
        """Each city is one prompt."""
        return self.words

    def completions(self, prompt: str) -> Iterator[str]:
        """All orders of the other cities."""
        return map(self.separator.join, itertools.permutations(city for city in self.cities if city != prompt))

    def random_texts(self, count: int, rng: np.random.Generator) -> list[str]:
        """Draw whole trips, each a random order of all cities."""
        return [self.separator.join(rng.permutation(self.words)) for _ in range(count)]

    def cost_of(self, text: str) -> float:
        """The length of a whole trip, including the way back to its first city; D for malformed text."""
        trip = text.split(self.separator)
        if sorted(trip) != sorted(self.cities):
            return self.worst_cost
        return sum(_distance(self.cities[a], self.cities[b]) for a, b in zip(trip, trip[1:] + trip[:1], strict=True))

    def cost(self, prompts: list[str], completions: list[str]) -> list[float]:
        """The objective: the lengths of the trips that consist of a prompt and its completion."""
        return [self.cost_of(start + self.separator + rest) for start, rest in zip(prompts, completions, strict=True)]

    def number_of_strings(self) -> int:
        """The number of whole trips."""
        return math.factorial(len(self.cities))

    def all_texts(self) -> Iterator[str]:
        """Every whole trip."""
        return map(self.separator.join, itertools.permutations(self.cities))


def _distance(a: Position, b: Position) -> float:
    """The distance between two positions in thousands of kilometres (haversine formula)."""
    (north_a, east_a), (north_b, east_b) = (map(math.radians, position) for position in (a, b))
    cosines = math.cos(north_a) * math.cos(north_b)
    half = math.hypot(math.sin((north_a - north_b) / 2), math.sqrt(cosines) * math.sin((east_a - east_b) / 2))
    return 2 * 6.371 * math.asin(half)
