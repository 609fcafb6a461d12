"""A search on a model of the cost, which a user brings: it says which of many new texts to evaluate."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

NAME = "evaluated"
"""What the texts are called in a checkpoint."""
GENERATIONS = 10
"""Edits of edits that are made before the best by prediction are evaluated."""


class Surrogate(Protocol):
    """The user's function: learns from texts and their costs to predict those of other texts."""

    def __call__(
        self, texts: list[str], costs: list[float], rng: random.Random
    ) -> Callable[[list[str]], Sequence[float] | np.ndarray]:
        """A function that gives a predicted cost for each of a list of texts.

        Args:
            texts: all distinct texts of one prompt that were evaluated before, oldest first: at least one.
            costs: theirs.
            rng: the only source of randomness, so that a run can be resumed and all processes predict the same.
        """
        ...


class Evaluated:
    """What was evaluated for each prompt, as text and cost, oldest first.

    Args:
        surrogate: learns from it.
    """

    def __init__(self, surrogate: Surrogate) -> None:
        self.surrogate = surrogate
        self._costs: dict[int, dict[str, float]] = {}
        self._settled: dict[int, int] = {}

    def add(self, prompt: int, texts: Sequence[str], costs: Sequence[float]) -> None:
        """Note what was evaluated; an infinite cost is that of a text which the prior excludes."""
        self._costs.setdefault(prompt, {}).update(zip(texts, costs, strict=True))

    def promising(
        self, prompt: int, best: Sequence[str], most: int, edits: Callable[[list[str]], set[str]], rng: random.Random
    ) -> list[str]:
        """New texts for a prompt, lowest predicted cost first: an evolutionary search on predictions.

        Args:
            prompt: its number.
            best: evaluated texts that the search starts from.
            most: parents of a generation, at most: the best so far, evaluated or predicted.
            edits: makes the texts of a generation out of its parents, best first.
            rng: for the user's function.

        Raises:
            RuntimeError: if the user's function raises an exception.
            ValueError: for predictions that are no numbers, or not one for each text.
        """
        known = self._costs[prompt]
        learned = {text: cost for text, cost in known.items() if math.isfinite(cost)}
        predict = _called(self.surrogate, [*learned], [*learned.values()], rng) if learned else _nothing
        parents, predicted = {text: known[text] for text in best}, dict[str, float]()
        for _ in range(GENERATIONS):
            # A set has another order in each process.
            new = sorted(edits(sorted(parents, key=parents.__getitem__)) - known.keys() - predicted.keys())
            random.Random(len(known)).shuffle(new)  # of equal predictions it is not the alphabet that decides
            costs = dict(zip(new, _predictions(predict, new), strict=True))
            predicted |= costs
            parents = dict(sorted((parents | costs).items(), key=lambda item: item[1])[:most])
        return sorted(predicted, key=predicted.__getitem__)

    def settle(self) -> None:
        """A rung has ended. A checkpoint within the next one, which is then made again, keeps what is known now."""
        self._settled = {prompt: len(costs) for prompt, costs in self._costs.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        kept = {prompt: [*self._costs[prompt].items()][:count] for prompt, count in self._settled.items()}
        return {
            f"{NAME}.{prompt}": torch.frombuffer(bytearray(json.dumps(costs), "ascii"), dtype=torch.uint8)
            for prompt, costs in kept.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what [`state_dict`] gave."""
        mine = {key: content for key, content in state.items() if key.startswith(f"{NAME}.")}
        self._costs = {int(key.split(".")[1]): dict(json.loads(mine[key].numpy().tobytes())) for key in mine}
        self.settle()


def _nothing(texts: list[str]) -> list[float]:
    """A prediction where nothing is known."""
    return [0.0] * len(texts)


def _predictions(predict: Callable[[list[str]], object], texts: list[str]) -> list[float]:
    if not texts:
        return []
    found = np.asarray(_called(predict, texts))
    if found.shape != (len(texts),) or found.dtype.kind not in "fiu" or np.isnan(found).any():
        raise ValueError(
            f"EditedTop: the function that surrogate() returned gave {found.tolist()!r:.100} for {len(texts)} texts. "
            "It must return a number for each."
        )
    return [float(value) for value in found]


def _called(function: Callable[..., Any], *given: object) -> Any:
    try:
        return function(*given)
    except Exception as error:
        raise RuntimeError(
            f"EditedTop: surrogate() raised {type(error).__name__}: {error}. It is called as surrogate(texts, costs, "
            "rng), and returns a function of a list of texts. The first rung may give it few texts, or equal costs."
        ) from error
