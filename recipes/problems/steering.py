"""Four things that people want of a chat model's answers, each as prompts and a cost: see `recipes/steer_text.py`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from problems import instructions

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


REVIEW = "Write a one-sentence review of a restaurant."

# ---- Tone ------------------------------------------------------------------------------------------------------------


def tone() -> SteeringTask:
    """A review that is not full of praise. The prior's are: their mean cost is 0.69."""
    return SteeringTask("tone", [question(REVIEW)], positive, 1.0, 8.0, 32)


def positive(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """How positive each text is, from 0 to 1: VADER's compound score, which goes from -1 to 1, moved."""
    return [(_vader().polarity_scores(text)["compound"] + 1) / 2 for text in completions]


@functools.lru_cache(maxsize=1)
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


# ---- A rare word -----------------------------------------------------------------------------------------------------


def word() -> SteeringTask:
    """A text with the word "amazing", as GDC and GUARD ask for. At `T = 10`, `p_T` is the prior given the word."""
    return SteeringTask(
        "word", [question("Write a one-sentence review of a restaurant.")], lacks_amazing, 1.0, 10.0, 32
    )


def lacks_amazing(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """0 for a text with the word "amazing", else 1."""
    return [float(not has_word("amazing", text)) for text in completions]


def has_word(word: str, text: str) -> bool:
    """Whether a word stands in a text, in capitals or not."""
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


# ---- Two keywords and a length ---------------------------------------------------------------------------------------

KEYWORDS = (
    ("dog", "beach"), ("rain", "window"), ("teacher", "apple"), ("train", "mountain"),
    ("music", "kitchen"), ("child", "bicycle"), ("doctor", "letter"), ("river", "bridge"),
    ("cat", "piano"), ("farmer", "horse"), ("book", "garden"), ("snow", "school"),
    ("ship", "storm"), ("bread", "market"), ("moon", "forest"), ("girl", "drum"),
)  # fmt: skip
MOST_WORDS = 12


def keywords() -> SteeringTask:
    """One short sentence with two given words, as in CommonGen, for 16 prompts."""
    rows = [
        question(f"Write a short sentence with the words '{first}' and '{second}'.", keywords=[first, second])
        for first, second in KEYWORDS
    ]
    return SteeringTask("keywords", rows, unmet, 3.0, 4.0, 32)


def unmet(prompts: Sequence[Any], completions: Sequence[str], keywords: Sequence[Sequence[str]]) -> list[float]:
    """How many of three demands a text does not meet: the one keyword, the other, and at most 12 words."""
    return [
        float(sum(not has_word(word, text) for word in wanted) + (len(text.split()) > MOST_WORDS))
        for text, wanted in zip(completions, keywords, strict=True)
    ]


# ---- An instruction --------------------------------------------------------------------------------------------------


def instruction() -> SteeringTask:
    """Answers that follow an instruction which a checker of IFEval decides, for 16 prompts."""
    return SteeringTask("instruction", instructions.rows(), instructions.not_followed, 1.0, 6.0, 32)


TASKS: dict[str, Callable[[], SteeringTask]] = {
    "tone": tone,
    "word": word,
    "keywords": keywords,
    "instruction": instruction,
}
"""What makes each task, by its name."""
