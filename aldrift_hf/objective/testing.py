"""The laws of a cost function as assertions, for the tests of your own.

    def test_my_cost():
        check_objective(cost, ["what a model may write", "and something better"], objective_range=5.0)

Hypothesis finds worse texts: `@given(st.text())` over a test that calls `check_objective(cost, [text])`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from .objective import CostFunction, Objective, ObjectiveError, call_all, check_values, name_of

LONG = 20_000
"""Characters of the longest texts that a cost is tried on."""

Row = dict[str, Any]


def check_objective(
    objective: CostFunction,
    examples: Iterable[str | Mapping[str, Any]],
    *,
    objective_range: float | None = None,
    tolerance: float = 1e-6,
) -> None:
    """Assert the laws of a cost function, on which batches, the cache and the weights of draws rely.

    - *signature*: it can be called with the examples' columns;
    - *errors*: every text is priced, also one that no model should write;
    - *values*: one number for each completion, finite, at least 0 and at most `objective_range`;
    - *arguments*: it leaves what it is handed as it was;
    - *determinism*: the same call gives the same costs;
    - *order* and *batch size*: a completion costs the same wherever it stands in a batch, and alone.

    Beside the examples the function gets a dozen malformed texts, with the examples' prompts and columns: nothing,
    white space, an example cut in half and one repeated up to 20,000 characters, brackets, numbers that are none,
    control characters, right-to-left script, emoji and the like. With `n` texts in all it is called `n + 3` times, on
    `4·n` completions.

    Args:
        objective: a cost function as [`aldrift_hf.ALDRIFTTrainer`] takes it, sync or async.
        examples: completions of the empty prompt; or rows (a `datasets.Dataset`, or dicts) with a `"completion"`, a
            `"prompt"` where it is not empty, and the columns that the function wants.
        objective_range: `D`; `None` checks no upper bound.
        tolerance: by how much two costs of one completion may differ, as those of a neural network do.

    Raises:
        AssertionError: naming the law that is broken, the completion, the values and the remedy.
        ValueError: for examples that are none.
    """
    name, rows = name_of(objective), _rows(examples)
    try:
        Objective(objective, None, None, overlap=False).check_signature([key for key in rows[0] if key not in _TEXTS])
    except TypeError as error:
        raise AssertionError(f"signature: {error}") from None
    rows += [{**rows[i % len(rows)], "completion": text} for i, text in enumerate(_malformed(rows[0]["completion"]))]

    alone = [cost for row in rows for cost in _price(objective, [row], objective_range)]
    together, again, backwards = (_price(objective, batch, objective_range) for batch in (rows, rows, rows[::-1]))
    for law, others, where, remedy in (
        ("determinism", again, "when asked again", "Fix its seeds and let it remember nothing"),
        ("order", backwards[::-1], "with the batch in reverse order", "Return the costs in the completions' order"),
        ("batch size", alone, "alone", "Price each completion by itself, whatever stands beside it"),
    ):
        for row, cost, other in zip(rows, together, others, strict=True):
            if abs(cost - other) > tolerance:
                _broken(
                    f"{law}: objective {name!r} gave {cost} in a batch of {len(rows)}, and {other} {where}, for "
                    f"completion {row['completion']!r}. {remedy}."
                )


def _malformed(example: str) -> list[str]:
    """Texts that a model may write all the same, and that parsers are not prepared for."""
    return [
        "",
        " \n\t ",
        example[: len(example) // 2],
        example * (LONG // max(1, len(example))),
        "(" * LONG,
        "0",
        "-1e999 nan",
        "² ½ ٣ 四",  # numbers to str.isnumeric, and to int() in part
        "\x01\x08\x1b[2J\x7f\r\x85\u2028",
        "%s {0} \\ ' \" ` $(:) ; <think>",
        "שלום, عالم \u202e",
        "🧑‍🚀 e\u0301 ﬁ ﷺ \ufffd \U0010ffff",
    ]


_TEXTS = ("prompt", "completion")


def _rows(examples: Iterable[str | Mapping[str, Any]]) -> list[Row]:
    rows: list[Row] = [
        {"prompt": "", **({"completion": example} if isinstance(example, str) else example)} for example in examples
    ]
    if not rows or any(row.keys() != rows[0].keys() or not isinstance(row.get("completion"), str) for row in rows):
        raise ValueError(
            "examples must be at least one completion: texts, or rows (a datasets.Dataset, dicts) that have the same "
            "columns, a text in 'completion' among them"
        )
    return rows


def _price(objective: CostFunction, rows: list[Row], objective_range: float | None) -> list[float]:
    """The costs of a batch, once they are costs."""
    name, completions = name_of(objective), [row["completion"] for row in rows]
    columns = {key: [row[key] for row in rows] for key in rows[0] if key not in _TEXTS}
    given = {"prompts": [row["prompt"] for row in rows], "completions": completions, **columns}
    handed = copy.deepcopy(given)
    try:
        (result,) = call_all([(name, objective)], handed)
    except ObjectiveError as error:
        _broken(f"errors: {error}. Catch what a text can cause, and give it the worst cost, D.", error.__cause__)
    if handed != given:
        changed = next(key for key in given if handed[key] != given[key])
        _broken(
            f"arguments: objective {name!r} changed {changed} from {given[changed]!r} to {handed[changed]!r}. Copy "
            "before changing: the trainer goes on with them."
        )
    try:
        values = check_values(name, result, list(range(len(rows))), completions)
    except ValueError as error:
        _broken(f"values: {error}. Return one number in [0, D] for each completion, D for malformed text.")
    for text, value in zip(completions, values, strict=True):
        if objective_range is not None and value > objective_range * (1 + 1e-9):
            _broken(
                f"values: objective {name!r} gave {value}, above objective_range={objective_range}, for completion "
                f"{text!r}. Raise objective_range, or cap the cost."
            )
    return values


def _broken(law: str, cause: BaseException | None = None) -> NoReturn:
    """Fail; of a long text the beginning and the end will do."""
    raise AssertionError(law if len(law) < 1000 else f"{law[:500]} … {law[-400:]}") from cause
