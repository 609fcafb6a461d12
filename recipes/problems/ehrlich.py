"""Ehrlich functions (Stanton et al. 2024, arXiv 2407.00236): protein-like sequences in closed form.

A sequence of `length` states is feasible if no two neighbours are a banned pair. Its value is the product, over motifs,
of how much of the motif is present: the largest share of the motif's states that are at their places, over all shifts,
rounded down to a multiple of `1/quantization`. Infeasible sequences have no value. The best value is 1.

The functions here are those of the package `pytorch-holo` 0.0.5, seed by seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from problems.feasible import with_rules
from problems.text_problem import TextProblem

BAND = 0.4
"""Pairs of a state with this share of the states to each side, in an order drawn for each, are allowed."""
SHARPNESS = 2.0
"""The logits of allowed transitions are standard normal numbers times this."""

FEASIBLE = 10_000
"""Sequences whose neighbours are known to be feasible."""

Codes = NDArray[np.int64]


@dataclass(frozen=True)
class Ehrlich:
    """A function on sequences of states.

    Attributes:
        transitions: `[V, V]`, probability of a state after another; a banned pair has 0.
        motifs: `[c, k]`, the states of each motif.
        places: `[c, k]`, where they are, counted from the first.
        quantization: distinct values above 0 that a motif's share can have.
    """

    transitions: NDArray[np.float64]
    motifs: Codes
    places: Codes
    quantization: int

    def __call__(self, codes: Codes) -> NDArray[np.float64]:
        """The value of each sequence of `[n, L]`; 0 for those that are infeasible."""
        value = self.is_feasible(codes).astype(float)
        size = self.motifs.shape[1]
        for motif, places in zip(self.motifs, self.places):
            shifts = np.arange(codes.shape[1] - places[-1])
            present = (codes[:, shifts[:, None] + places] == motif).sum(-1).max(-1)
            value *= present // (size // self.quantization) / self.quantization
        return value

    def is_feasible(self, codes: Codes) -> NDArray[np.bool_]:
        """Whether each sequence has no banned pair."""
        allowed: NDArray[np.bool_] = np.all(self.transitions[codes[:, :-1], codes[:, 1:]] > 0, axis=1)
        return allowed

    def sequences(self, count: int, length: int, rng: np.random.Generator) -> Codes:
        """Feasible sequences: the first state is uniform, the others follow the transitions; `[count, length]`."""
        codes = np.empty((count, length), dtype=np.int64)
        codes[:, 0] = rng.integers(len(self.transitions), size=count)
        up_to = self.transitions.cumsum(1)
        for place in range(1, length):
            before = up_to[codes[:, place - 1]]
            codes[:, place] = (before <= rng.random((count, 1)) * before[:, -1:]).sum(1)
        return codes


def holo(states: int, length: int, motifs: int, size: int, seed: int) -> Ehrlich:
    """The function that `pytorch-holo` makes for these numbers, from the same random numbers in the same order.

    Args:
        states: V, the size of the alphabet.
        length: L, of sequences.
        motifs: c, their number.
        size: k, of each; also the quantization.
        seed: the random seed.

    Raises:
        ValueError: if the motifs do not fit into a sequence, or there is no such function.
    """
    if states < 3 or motifs < 1 or size < 2:
        raise ValueError("V must be at least 3, c at least 1 and k at least 2")
    slack = length - motifs * size
    if slack < 0:
        raise ValueError(f"{motifs} motifs of {size} states do not fit into {length}")
    random = torch.Generator().manual_seed(seed)
    dense = (torch.randn(states, states, generator=random) * SHARPNESS).softmax(-1)
    distance = (torch.arange(states)[None] - torch.arange(states)[:, None]) % states
    band = int(states * BAND)
    near = (distance <= band) | (distance >= states - band)
    allowed = near[torch.randperm(states, generator=random)] | torch.eye(states, dtype=torch.bool)
    transitions = torch.where(allowed, dense, 0.0)
    transitions /= transitions.sum(-1, keepdim=True)
    state = torch.multinomial(_stationary(transitions), 1, True, generator=random)
    chain = [state]
    for _ in range(motifs * size - 1):  # the motifs, one after the other, are feasible
        state = torch.multinomial(transitions[state], 1, generator=random).squeeze(-1)
        chain.append(state)
    gaps = []
    for _ in range(motifs):
        weights = torch.rand(size - 1, generator=random)
        gaps.append(1 + (slack // motifs * (weights / weights.sum())).floor().long())
    places = torch.nn.functional.pad(torch.stack(gaps).cumsum(1), (1, 0))
    found = torch.cat(chain).view(motifs, size)
    return Ehrlich(transitions.double().numpy(), found.numpy(), places.numpy(), size)


def _stationary(transitions: torch.Tensor) -> torch.Tensor:
    """The stationary distribution, `[V]`."""
    states = len(transitions)
    equations = torch.cat([(torch.eye(states) - transitions).T, torch.ones(1, states)])
    right = torch.zeros(states + 1, 1)
    right[-1] = 1
    solution: torch.Tensor = torch.linalg.lstsq(equations, right).solution
    return solution.squeeze(-1)


@dataclass(frozen=True)
class EhrlichProblem(TextProblem):
    """An Ehrlich function as a cost. The local rule is feasibility: the prior writes feasible sequences.

    The cost is `log f / log f_0`, where `f_0` is the smallest value above 0 that the function can have, and 1 where the
    value is 0. Thus `p_T ∝ L · f^(T / -log f_0)`: a motif that lacks a state costs as much whatever the others have.

    Attributes:
        states, length, motifs, size: V, L, c and k, as in [`holo`].
        function_seed: the random seed of the function.
        rules_known: whether all sequences of the prior have the length, and only neighbours that its data has.
    """

    states: int = 32
    length: int = 32
    motifs: int = 2
    size: int = 4
    function_seed: int = 0
    rules_known: bool = False

    @cached_property
    def function(self) -> Ehrlich:
        """The function."""
        return holo(self.states, self.length, self.motifs, self.size, self.function_seed)

    @property
    def words(self) -> list[str]:
        """The states, as numbers."""
        return [*map(str, range(self.states))]

    @property
    def separator(self) -> str:
        """The text between two states."""
        return " "

    @property
    def worst_cost(self) -> float:
        """D: the cost of a sequence without value."""
        return 1.0

    def random_texts(self, count: int, rng: np.random.Generator) -> list[str]:
        """Draw feasible sequences, by the function's transitions."""
        return self.texts(self.function.sequences(count, self.length, rng))

    @cached_property
    def neighbours(self) -> frozenset[tuple[str, str]]:
        """The pairs of neighbours in the first sequences of the prior's data; all are feasible."""
        data = self.random_texts(FEASIBLE, np.random.default_rng(0))
        return frozenset(pair for text in data for pair in itertools.pairwise(text.split(self.separator)))

    def prior_from(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """The model, which writes only sequences that keep to the data's rules where these are known."""
        if not self.rules_known:
            return model
        return with_rules(model, tokenizer, self.words, self.neighbours, self.length)

    def texts(self, codes: Codes) -> list[str]:
        """Sequences as texts."""
        return [self.separator.join(map(str, row)) for row in codes.tolist()]

    def value_of(self, text: str) -> float:
        """The function's value of a text; 0 for one that is malformed or infeasible."""
        codes = self.codes_of(text)
        return 0.0 if codes is None else float(self.function(codes[None])[0])

    def is_feasible(self, text: str) -> bool:
        """Whether a text is a sequence of the right length without a banned pair."""
        codes = self.codes_of(text)
        return codes is not None and bool(self.function.is_feasible(codes[None])[0])

    def codes_of(self, text: str) -> Codes | None:
        """The states of a text; `None` if it is malformed."""
        words = text.split(self.separator)
        if len(words) != self.length or any(word not in self._codes for word in words):
            return None
        return np.array([self._codes[word] for word in words])

    def cost_of(self, text: str) -> float:
        """The cost, in [0, 1]."""
        value = self.value_of(text)
        return float(np.log(value) / self.log_smallest) if value else 1.0

    @property
    def log_smallest(self) -> float:
        """log f_0, where each motif has one of its states."""
        return -self.motifs * float(np.log(self.size))

    @cached_property
    def _codes(self) -> dict[str, int]:
        return {word: code for code, word in enumerate(self.words)}

    def number_of_strings(self) -> int:
        """The number of feasible sequences."""
        paths = np.ones(self.states, dtype=object)  # whole numbers of any size
        for _ in range(self.length - 1):
            paths = (self.function.transitions > 0).astype(object) @ paths
        return int(paths.sum())

    def all_texts(self) -> Iterator[str]:
        """All feasible sequences."""
        codes = itertools.product(range(self.states), repeat=self.length)
        allowed = self.function.transitions > 0
        feasible = (each for each in codes if all(allowed[pair] for pair in itertools.pairwise(each)))
        return (self.separator.join(map(str, each)) for each in feasible)
