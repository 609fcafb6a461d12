"""A data set of prompts, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from ..types import RESERVED_COLUMNS

_TABLES = ("arrow", "pandas", "polars")
"""Formats whose rows are small tables. A cost function gets lists of values."""


def check_dataset(dataset: Any, name: str) -> Dataset:
    """Prompts as a [`datasets.Dataset`] with a column `"prompt"`, at least one row, and columns that a cost can take.

    Args:
        dataset: a `Dataset`; a list of prompts (texts or lists of chat messages) or of rows (dicts with the same keys);
            or `None` for one empty prompt.
        name: the argument that it was passed as, for error messages.

    Raises:
        TypeError: for an object that is neither a `Dataset`, nor a list, nor `None`.
        ValueError: for a list that makes no data set, no rows, no column `"prompt"`, a reserved name, or a transform
            that makes other columns.
    """
    if dataset is None:
        return Dataset.from_dict({"prompt": [""]})
    if isinstance(dataset, (list, tuple)):
        dataset = _from_rows(dataset, name)
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} must be a datasets.Dataset or a list of prompts, got {type(dataset).__name__}. Streaming data "
            "sets and dicts of data sets are not supported, because a rung may draw for any of the prompts."
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty. Pass None for unconditional generation from one empty prompt.")
    dataset = _rows_are_dicts(dataset, name)
    _check_columns(dataset.column_names, name)
    return dataset


def _from_rows(rows: Sequence[Any], name: str) -> Dataset:
    """A data set of prompts or dicts. `Dataset.from_list` would take the columns of the first row for those of all."""
    rows = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
    for index, row in enumerate(rows):
        other = sorted(map(str, row.keys() ^ rows[0].keys()))
        if other:
            raise ValueError(
                f"{name} must have the same columns in all rows: rows 0 and {index} differ in {', '.join(other)}. "
                "Write None where a row has no value."
            )
    for column in rows[0] if rows else ():
        if not isinstance(column, str):
            raise ValueError(f"{name} has a column {column!r}, and names of columns must be text. Rename it.")
    try:
        return Dataset.from_list(rows)
    except (ValueError, TypeError) as error:  # pyarrow's, for rows of mixed types and for text with lone surrogates
        raise ValueError(
            f"{name} must be a list of texts, or a list of lists of messages, and other columns must hold values of "
            f"one type (nested ones of different shapes can be written as JSON text): {error}"
        ) from error


def _rows_are_dicts(dataset: Dataset, name: str) -> Dataset:
    """The data set in a format whose rows are dicts of exactly its columns."""
    how = dataset.format
    if how["columns"] is not None and not how["output_all_columns"] and len(how["columns"]) < len(dataset.column_names):
        dataset = dataset.select_columns(how["columns"])
    if how["type"] in _TABLES:
        return dataset.with_format(None)
    if how["type"] == "custom" and set(dataset[0]) != set(dataset.column_names):
        raise ValueError(
            f"{name} has a transform that turns its columns {dataset.column_names} into {list(dataset[0])}. Apply it "
            "with dataset.map(transform, batched=True)."
        )
    return dataset


def _check_columns(columns: list[str], name: str) -> None:
    if {"role", "content"} <= {*columns}:
        raise ValueError(
            f"{name} is one conversation, and its messages would each be a prompt. Pass a list of conversations: "
            "[[{'role': 'user', 'content': …}], …]."
        )
    if "prompt" not in columns:
        rename = next((column for column in ("prompts", "text", "messages") if column in columns), columns[0])
        raise ValueError(
            f"{name} has no column 'prompt'; its columns are {columns}. Rename one of them: "
            f"dataset.rename_column({rename!r}, 'prompt')."
        )
    taken = [column for column in columns if column in RESERVED_COLUMNS]
    if taken:
        raise ValueError(
            f"{name} has a column {taken[0]!r}, which a cost function could not tell from its argument of that name. "
            f"Reserved are {', '.join(RESERVED_COLUMNS)}. Rename it: dataset.rename_column({taken[0]!r}, 'reference')."
        )
