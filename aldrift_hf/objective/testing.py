"""The properties that a cost function must have, as assertions for your own tests.

    def test_my_cost():
        check_objective(cost, ["a text that the model may write", "another one"], objective_range=5.0)

Hypothesis finds more difficult texts: write a test with `@given(st.text())` that calls `check_objective(cost, [text])`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from ..content import Content
from ..types import RESERVED_COLUMNS
from .calling import ObjectiveError, call_functions
from .copies import copies_of
from .protocol import CostFunction, check_function, check_signature, name_of
from .validation import above_bound, check_values, not_judged

MAX_LENGTH = 20_000
"""Characters of the longest texts that a cost function is tried on."""

Row = dict[str, Any]


def check_objective(
    objective: CostFunction,
    examples: Iterable[str | Mapping[str, Any]],
    *,
    objective_range: float | None = None,
    tolerance: float = 1e-6,
) -> None:
    """Assert the properties of a cost function on which batches, the stored costs and the weights of samples rely.

    - *signature*: it can be called with the examples' columns;
    - *errors*: it returns a cost for every text, however malformed;
    - *values*: it returns one number per completion, finite, at least 0 and at most `objective_range`, up to rounding;
    - *arguments*: it does not change its arguments;
    - *determinism*: the same call returns the same costs;
    - *order* and *batch size*: the cost of a completion does not depend on its position in the batch or on the rest of
      the batch.

    In addition to the examples, the function is called with a dozen malformed texts, with the prompts and columns of
    the examples: the empty text, white space, half an example, an example repeated up to 20,000 characters, brackets,
    words that look like numbers, control characters, right-to-left script, emoji and the like. With `n` texts in total,
    it is called `n + 3` times, on `4·n` completions.

    Args:
        objective: a cost function as [`aldrift_hf.ALDRIFTTrainer`] takes it, sync or async.
        examples: completions of the empty prompt; or rows (a `datasets.Dataset`, or dicts) with a `"completion"`, a
            `"prompt"` unless it is empty, and the columns that the function needs.
        objective_range: D, an upper bound on the cost; `None` checks no upper bound.
        tolerance: the largest difference allowed between two costs of one completion, for costs that are subject to
            rounding, such as those of a neural network.

    Raises:
        AssertionError: if a property does not hold, with the completion, the costs and the remedy.
        ValueError: for invalid examples.
    """
    name, rows = name_of(objective), _rows(examples)
    try:
        check_function(objective)
        check_signature(objective, [key for key in rows[0] if key not in _TEXTS])
    except TypeError as error:
        raise AssertionError(f"signature: {error}") from None
    rows += [{**rows[i % len(rows)], "completion": text} for i, text in enumerate(_malformed(rows[0]["completion"]))]

    alone = [cost for row in rows for cost in _evaluate(objective, [row], objective_range)]
    together, again, reverse = (_evaluate(objective, batch, objective_range) for batch in (rows, rows, rows[::-1]))
    for kind, others, where, remedy in (
        ("determinism", again, "when called again", "Fix its seeds, and let it keep no state between calls"),
        ("order", reverse[::-1], "with the batch in reverse order", "Return the costs in the order of the completions"),
        ("batch size", alone, "alone", "Compute each completion's cost independently of the rest of the batch"),
    ):
        for row, cost, other in zip(rows, together, others, strict=True):
            if abs(cost - other) > tolerance:
                _fail(
                    f"{kind}: objective {name!r} returned {cost} in a batch of {len(rows)}, and {other} {where}, for "
                    f"completion {row['completion']!r}. {remedy}."
                )


def _malformed(example: str) -> list[str]:
    """Texts that a model may write and that parsers often fail on."""
    return [
        "",
        " \n\t ",
        example[: len(example) // 2],
        example * (MAX_LENGTH // max(1, len(example))),
        "(" * MAX_LENGTH,
        "0",
        "-1e999 nan",
        "² ½ ٣ 四",  # str.isnumeric accepts them all, int() only some of them
        "\x01\x08\x1b[2J\x7f\r\x85\u2028",
        "%s {0} \\ ' \" ` $(:) ; <think>",
        "שלום, عالم \u202e",
        "🧑‍🚀 e\u0301 ﬁ ﷺ \ufffd \U0010ffff",
    ]


_TEXTS = ("prompt", "completion")


def _rows(examples: Iterable[str | Mapping[str, Any]]) -> list[Row]:
    """The examples as rows with a prompt, a completion and the same columns."""
    rows: list[Row] = [
        {"prompt": "", **({"completion": example} if isinstance(example, str) else example)} for example in examples
    ]
    if not rows or any(row.keys() != rows[0].keys() or not isinstance(row.get("completion"), str) for row in rows):
        raise ValueError(
            "examples must be at least one completion: texts, or rows (a datasets.Dataset, dicts) that all have the "
            "same columns, including 'completion' with a text"
        )
    if taken := [name for name in rows[0] if name in RESERVED_COLUMNS]:
        raise ValueError(
            f"examples have columns called {', '.join(taken)}, which no data set may have: "
            f"{', '.join(RESERVED_COLUMNS)} are reserved. Use 'prompt' and 'completion' for the texts."
        )
    return rows


def _evaluate(objective: CostFunction, rows: list[Row], objective_range: float | None) -> list[float]:
    """The checked costs of one batch."""
    name, completions = name_of(objective), [row["completion"] for row in rows]
    columns = {key: [row[key] for row in rows] for key in rows[0] if key not in _TEXTS}
    expected = {"prompts": [row["prompt"] for row in rows], "completions": completions, **columns}
    passed = copies_of(expected)
    try:
        (result,) = call_functions([(objective, passed)])
    except ObjectiveError as error:
        _fail(f"errors: {error}. Catch what a text can cause, and return the worst cost, D.", error.__cause__)
    for key, values in expected.items():
        if Content().digest(passed[key]) != Content().digest(values):
            _fail(
                f"arguments: objective {name!r} changed {key} from {values!r} to {passed[key]!r}. Copy before "
                "changing: a function that calls this one and another may pass both the same lists."
            )
    judged: list[float | None] = []
    try:
        for value in check_values(name, result, range(len(rows)), completions, bound=objective_range):
            if isinstance(value, ValueError):
                raise value
            judged.append(value)
    except ValueError as error:
        _fail(f"values: {error}. Return one number in [0, D] per completion, D for malformed text.")
    costs: list[float] = []
    for row, (text, cost) in enumerate(zip(completions, judged, strict=True)):
        try:
            if cost is None:
                raise not_judged([name], row, text)
            if (above := above_bound(name, cost, objective_range, row, text)) is not None:
                raise above
        except ValueError as error:
            _fail(f"values: {error}")
        costs.append(min(cost, math.inf if objective_range is None else objective_range))
    return costs


def _fail(message: str, cause: BaseException | None = None) -> NoReturn:
    """Raise an `AssertionError`, with only the beginning and the end of a long message."""
    raise AssertionError(message if len(message) < 1000 else f"{message[:500]} … {message[-400:]}") from cause
