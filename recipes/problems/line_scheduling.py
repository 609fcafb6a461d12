"""Visits along a line with departures at a fixed headway: the experiment of TOPIFT, with an exact reference.

A traveller visits `K` stations in order. At station `i` they stay for `v_i` minutes (a whole number from 1 to `V`) and
then wait for the next departure. The journey to the next station takes `t` minutes. Every station has departures at all
minutes that equal `phase` modulo `headway`, on one common clock that shows 0 when the first visit begins. A traveller
who is ready in the minute of a departure takes it. They also wait for a departure at the last station. The cost is the
total waiting time

    d(v) = Σ_i w_i,    w_i = (phase - r_i) mod headway,    where visit i ends in minute r_i,

and D is the largest value of this sum. The local rule of the prior is a preference for longer visits at some stations
and for shorter ones at the others. Visits are independent:

    L(v) = Π_i L_i(v_i),    L_i(v) ∝ exp(± preference · v / V).

Every departure resets the clock to `phase` modulo the headway, so a waiting time depends on its own visit alone.
Therefore `p_τ` is a product, too, and can be computed exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from problems.text_problem import TextProblem


@dataclass(frozen=True)
class LineSchedulingProblem(TextProblem):
    """A line with its timetable, and the traveller's preference.

    Attributes:
        stations: K, the number of stations.
        longest_visit: V, in minutes.
        travel: t, the minutes from one station to the next.
        headway: minutes between two departures.
        phase: departures are in the minutes that equal this number modulo the headway.
        preference: strength of the preference for long visits at every third station (the second, fifth, …) and for
            short visits at the others; 0 makes all visits equally likely.

    Raises:
        ValueError: if a number is out of range.
    """

    stations: int = 10
    longest_visit: int = 20
    travel: int = 10
    headway: int = 5
    phase: int = 0
    preference: float = 2.0

    def __post_init__(self) -> None:
        for name in ("stations", "longest_visit", "headway"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.travel < 0:
            raise ValueError(f"travel must not be negative, got {self.travel}")

    @property
    def words(self) -> list[str]:
        """The lengths of a visit, in minutes."""
        return [str(minutes) for minutes in range(1, self.longest_visit + 1)]

    @property
    def separator(self) -> str:
        """The text between two visits."""
        return ", "

    @property
    def worst_cost(self) -> float:
        """D, the largest total waiting time, in minutes; at least 1, so that malformed text never costs 0."""
        return float(max(1, self.waits_alone.max(axis=1).sum()))

    @property
    def favourites(self) -> list[int]:
        """The indices of the stations at which long visits are preferred."""
        return list(range(1, self.stations, 3))

    @cached_property
    def waits_alone(self) -> np.ndarray:
        """Waiting times in minutes, `[K, V]`; in row `i` and column `v - 1`, that at station `i` after `v` minutes."""
        visits = np.arange(1, self.longest_visit + 1)
        first = (self.phase - visits) % self.headway
        later = -(self.travel + visits) % self.headway  # since the previous departure, which was on the timetable
        return np.stack([first, *[later] * (self.stations - 1)])

    def waits(self, visits: Sequence[int]) -> list[int]:
        """The waiting time at each station, in minutes, computed by following the clock."""
        clock, waits = 0, []
        for visit in visits:
            ready = clock + visit
            waits.append((self.phase - ready) % self.headway)
            clock = ready + waits[-1] + self.travel
        return waits

    def to_text(self, visits: Sequence[int]) -> str:
        """The string of a schedule, as in `"10, 15, 5"`."""
        return self.separator.join(map(str, visits))

    def parse(self, text: str) -> list[int] | None:
        """The visits that a text names, in minutes; `None` unless it names `K` visits of 1 to `V` minutes."""
        lengths = {word: minutes for minutes, word in enumerate(self.words, 1)}
        visits = [lengths.get(word, 0) for word in text.strip().split(self.separator)]
        return visits if len(visits) == self.stations and all(visits) else None

    def cost_of(self, text: str) -> float:
        """The total waiting time, in minutes; D for malformed text."""
        visits = self.parse(text)
        return self.worst_cost if visits is None else float(sum(self.waits(visits)))

    def random_texts(self, count: int, rng: np.random.Generator) -> list[str]:
        """Draw schedules by the preference alone."""
        return self.draw(self.marginals(0.0), count, rng)

    def number_of_strings(self) -> int:
        """The number of schedules, `V` to the power of `K`."""
        return int(self.longest_visit**self.stations)

    def all_texts(self) -> Iterator[str]:
        """Every schedule."""
        return map(self.separator.join, itertools.product(self.words, repeat=self.stations))

    def marginals(self, tau: float) -> np.ndarray:
        """The exact `p_τ`, as one distribution per station: `P(v_i = v) ∝ L_i(v)·exp(-τ·w_i(v))`, `[K, V]`."""
        sign = np.where(np.isin(np.arange(self.stations), self.favourites), 1.0, -1.0)
        visits = np.arange(1, self.longest_visit + 1)
        log_p = self.preference * sign[:, None] * visits / self.longest_visit - tau * self.waits_alone
        p: np.ndarray = np.exp(log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True))
        return p

    def draw(self, marginals: np.ndarray, count: int, rng: np.random.Generator) -> list[str]:
        """Draw schedules with independent visits; `marginals` `[K, V]` are the distributions at the stations."""
        visits = [rng.choice(self.longest_visit, count, p=row) + 1 for row in marginals]
        return [self.to_text(row) for row in np.stack(visits, axis=1).tolist()]

    def log_probs(self, marginals: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """Log-probabilities of `n` texts under independent visits.

        Args:
            marginals: `[K, V]`, the distribution of the visit at each station.
            texts: `n` texts.

        Returns:
            `[n]`, nats; `-inf` for malformed text.
        """
        parsed = map(self.parse, texts)
        with np.errstate(divide="ignore"):
            logs = np.log(marginals)
        stations = np.arange(self.stations)
        return np.array([-np.inf if v is None else logs[stations, np.array(v) - 1].sum() for v in parsed])

    def visit_shares(self, texts: Sequence[str]) -> np.ndarray:
        """The share of schedules with each visit at each station, `[K, V]`; NaN if all texts are malformed."""
        visits = np.array([parsed for parsed in map(self.parse, texts) if parsed is not None], dtype=int)
        counts = np.zeros((self.stations, self.longest_visit))
        for station in range(self.stations if len(visits) else 0):
            counts[station] = np.bincount(visits[:, station] - 1, minlength=self.longest_visit)
        with np.errstate(invalid="ignore"):
            shares: np.ndarray = counts / np.float64(len(visits))
        return shares

    def preference_gap(self, shares: np.ndarray) -> float:
        """Mean visit where long visits are preferred minus mean visit elsewhere, in minutes, for `[K, V]` shares."""
        means = shares @ np.arange(1, self.longest_visit + 1)
        liked = np.isin(np.arange(self.stations), self.favourites)
        return float(means[liked].mean() - means[~liked].mean()) if liked.any() else float("nan")
