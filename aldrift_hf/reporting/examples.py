"""Which draws a reader should see first: the best, typical ones, and those that the model writes too rarely."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .record import weights_of

SHOWN = 3
"""Draws per group."""


@dataclass(frozen=True)
class Group:
    """Some draws.

    Attributes:
        title: what they are.
        explanation: how they were chosen.
        draws: of a [`aldrift_hf.RunRecord`].
    """

    title: str
    explanation: str
    draws: list[dict[str, Any]]


def groups(draws: list[dict[str, Any]]) -> list[Group]:
    """Three groups, in each of which no completion is shown twice and, where there are enough of them, no prompt."""
    prompts = {json.dumps(draw["prompt"]) for draw in draws}
    key = _prompt if len(prompts) >= SHOWN else _text
    weights = weights_of(draws)
    weights = weights if weights.any() else np.ones(len(draws))
    by_cost = sorted(range(len(draws)), key=lambda i: (draws[i]["objective"], -_number(draws[i]["log_prior"])))
    passed = weights[by_cost].cumsum()  # half of this draw's weight included, that is the share of p_τ before it
    middle = abs((passed - weights[by_cost] / 2) / passed[-1] - 0.5)
    typical = [by_cost[place] for place in middle.argsort(kind="stable") if weights[by_cost[place]] > 0]
    return [
        Group(
            "Best",
            "Of lowest cost; of several, the most probable under the prior.",
            _first(key, (draws[i] for i in by_cost)),
        ),
        Group(
            "Typical",
            "Of a cost near the target's median: half of the weight belongs to draws that cost less.",
            _first(key, (draws[i] for i in typical)),
        ),
        Group(
            "Most underweighted",
            "Of the largest weight: the target has these more often than the model writes them.",
            _first(key, (draws[i] for i in (-weights).argsort(kind="stable"))),
        ),
    ]


def _prompt(draw: dict[str, Any]) -> str:
    return json.dumps(draw["prompt"])


def _text(draw: dict[str, Any]) -> str:
    return json.dumps([draw["prompt"], draw["completion"]])


def _number(value: float | None) -> float:
    return -math.inf if value is None else value


def _first(key: Callable[[dict[str, Any]], str], draws: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first draws of different keys."""
    found: dict[str, dict[str, Any]] = {}
    for draw in draws:
        found.setdefault(key(draw), draw)
        if len(found) == SHOWN:
            break
    return [*found.values()]
