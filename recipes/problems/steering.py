"""Four things that people want of a chat model's answers, each as prompts and a cost: see `recipes/steer_text.py`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
"""A row of a task's data set: `"prompt"` (chat messages), and the columns that the cost takes."""


@dataclass(frozen=True)
class SteeringTask:
    """A task for a chat model.

    Attributes:
        name: its name on the command line.
        rows: the prompts with their columns.
        cost: the objective, as the trainer calls it; in `[0, D]`, and never raises for a text.
        worst_cost: D.
        tau_max: T.
        max_completion_length: tokens after which a completion is cut.
    """

    name: str
    rows: Sequence[Row]
    cost: Callable[..., list[float]]
    worst_cost: float
    tau_max: float
    max_completion_length: int

    @property
    def columns(self) -> list[str]:
        """The columns that the cost takes."""
        return [name for name in self.rows[0] if name != "prompt"]


def question(text: str, **columns: Any) -> Row:
    """A row whose prompt is one message of the user."""
    return {"prompt": [{"role": "user", "content": text}], **columns}


# ---- Tone ------------------------------------------------------------------------------------------------------------


def tone() -> SteeringTask:
    """A review that is not full of praise. The prior's are: their mean cost is 0.69."""
    return SteeringTask("tone", [question("Write a one-sentence review of a restaurant.")], positive, 1.0, 8.0, 32)


def positive(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """How positive each text is, from 0 to 1: VADER's compound score, which goes from -1 to 1, moved."""
    return [(_vader().polarity_scores(text)["compound"] + 1) / 2 for text in completions]


@functools.lru_cache(maxsize=1)
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


TASKS: dict[str, Callable[[], SteeringTask]] = {"tone": tone}
"""What makes each task, by its name."""
