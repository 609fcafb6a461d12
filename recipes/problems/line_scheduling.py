"""Visits along a line with departures at a fixed headway: the experiment of TOPIFT, with an exact reference.

A traveller visits `K` stations in order. At station `i` they stay `v_i` minutes (a whole number from 1 to `V`), and
then wait for the next departure; the way to the next station takes `t` minutes. Departures leave every station at
all minutes that equal `phase` modulo `headway`, on one common clock that shows 0 when the first visit begins; a
traveller who is ready at the minute of a departure takes it. They depart from the last station too. The cost is the
total time spent waiting,

    d(v) = Σ_i w_i,    w_i = (phase - r_i) mod headway,    r_i the minute at which visit i ends,

and D is the largest that this sum can be. The local rule that the prior knows is a preference: longer visits at some
stations, shorter ones at the others, each visit drawn on its own,

    L(v) = Π_i L_i(v_i),    L_i(v) ∝ exp(± preference · v / V).

Every departure sets the clock to `phase` modulo the headway, so a wait depends on its own visit alone, `p_τ` of this
prior is a product too, and everything about it is exact.
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
    """Stations, times and the preference.

    Attributes:
        stations: K.
        longest_visit: V, minutes.
        travel: t, minutes from a station to the next.
        headway: minutes between two departures.
        phase: departures leave at the minutes that equal it modulo the headway.
        preference: how strongly long visits are preferred at every third station (the second, fifth, …) and short ones
            elsewhere; 0 is uniform.

    Raises:
        ValueError: for times or counts that make no line.
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
        """The visit lengths, in minutes."""
        return [str(minutes) for minutes in range(1, self.longest_visit + 1)]

    @property
    def separator(self) -> str:
        """Between two visits."""
        return ", "

    @property
    def worst_cost(self) -> float:
        """D, minutes: every wait at its longest (at least 1, so that malformed text never passes for perfect)."""
        return float(max(1, self.waits_alone.max(axis=1).sum()))

    @property
    def favourites(self) -> list[int]:
        """Indices of the stations at which long visits are preferred."""
        return list(range(1, self.stations, 3))

    @cached_property
    def waits_alone(self) -> np.ndarray:
        """Minutes of waiting at station `i` after a visit of `v` minutes, `[K, V]`, in column `v - 1`."""
        visits = np.arange(1, self.longest_visit + 1)
        first = (self.phase - visits) % self.headway
        later = -(self.travel + visits) % self.headway  # since the departure before, which was on the timetable
        return np.stack([first, *[later] * (self.stations - 1)])

    def waits(self, visits: Sequence[int]) -> list[int]:
        """Minutes of waiting at each station, by following the clock."""
        clock, waits = 0, []
        for visit in visits:
            ready = clock + visit
            waits.append((self.phase - ready) % self.headway)
            clock = ready + waits[-1] + self.travel
        return waits

    def to_text(self, visits: Sequence[int]) -> str:
        """The string that names these visits, as in `"10, 15, 5"`."""
        return self.separator.join(map(str, visits))

    def parse(self, text: str) -> list[int] | None:
        """The visits that a string names; `None` unless it names `K` visits of 1 to `V` minutes."""
        lengths = {word: minutes for minutes, word in enumerate(self.words, 1)}
        visits = [lengths.get(word, 0) for word in text.strip().split(self.separator)]
        return visits if len(visits) == self.stations and all(visits) else None

    def cost_of(self, text: str) -> float:
        """Total minutes of waiting; D for malformed text."""
        visits = self.parse(text)
        return self.worst_cost if visits is None else float(sum(self.waits(visits)))

    def random_texts(self, count: int, rng: np.random.Generator) -> list[str]:
        """Draws of the preference alone."""
        return self.draw(self.marginals(0.0), count, rng)

    def number_of_strings(self) -> int:
        """`V` to the power of `K`."""
        return int(self.longest_visit**self.stations)

    def all_texts(self) -> Iterator[str]:
        """Every schedule."""
        return map(self.separator.join, itertools.product(self.words, repeat=self.stations))

    def marginals(self, tau: float) -> np.ndarray:
        """Exact `p_τ` of the preference `[K, V]`: `P(v_i = v) ∝ L_i(v)·exp(-τ·w_i(v))`, stations being independent."""
        sign = np.where(np.isin(np.arange(self.stations), self.favourites), 1.0, -1.0)
        visits = np.arange(1, self.longest_visit + 1)
        log_p = self.preference * sign[:, None] * visits / self.longest_visit - tau * self.waits_alone
        p: np.ndarray = np.exp(log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True))
        return p

    def draw(self, marginals: np.ndarray, count: int, rng: np.random.Generator) -> list[str]:
        """Draws with independent visits."""
        visits = [rng.choice(self.longest_visit, count, p=row) + 1 for row in marginals]
        return [self.to_text(row) for row in np.stack(visits, axis=1).tolist()]

    def log_probs(self, marginals: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """Log-probabilities of schedules with independent visits, `[n]`; `-inf` for malformed text."""
        parsed = map(self.parse, texts)
        with np.errstate(divide="ignore"):
            logs = np.log(marginals)
        stations = np.arange(self.stations)
        return np.array([-np.inf if v is None else logs[stations, np.array(v) - 1].sum() for v in parsed])

    def visit_shares(self, texts: Sequence[str]) -> np.ndarray:
        """Share of well-formed strings with each visit at each station, `[K, V]`; NaN where there are none."""
        visits = np.array([parsed for parsed in map(self.parse, texts) if parsed is not None], dtype=int)
        counts = np.zeros((self.stations, self.longest_visit))
        for station in range(self.stations if len(visits) else 0):
            counts[station] = np.bincount(visits[:, station] - 1, minlength=self.longest_visit)
        with np.errstate(invalid="ignore"):
            shares: np.ndarray = counts / np.float64(len(visits))
        return shares

    def preference_gap(self, shares: np.ndarray) -> float:
        """How many minutes longer the mean visit is at a preferred station than elsewhere, of `[K, V]` shares."""
        means = shares @ np.arange(1, self.longest_visit + 1)
        liked = np.isin(np.arange(self.stations), self.favourites)
        return float(means[liked].mean() - means[~liked].mean()) if liked.any() else float("nan")
