"""A data set of prompts, checked before anything is computed."""

from __future__ import annotations

from typing import Any

from datasets import Dataset


def check_dataset(dataset: Any, name: str) -> Dataset:
    """The data set as a [`datasets.Dataset`] with a column `"prompt"` and at least one row.

    Raises:
        TypeError, ValueError: saying what is wrong with it and how to mend it.
    """
    if dataset is None:
        return Dataset.from_dict({"prompt": [""]})
    if isinstance(dataset, (list, tuple)):
        try:
            dataset = Dataset.from_list([row if isinstance(row, dict) else {"prompt": row} for row in dataset])
        except (ValueError, TypeError) as error:  # pyarrow's, and of text that is no Unicode
            raise ValueError(f"{name} must be a list of texts, or of lists of messages: {error}") from error
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} must be a datasets.Dataset (or a list of prompts), got {type(dataset).__name__}. Streaming data "
            "sets and dicts of data sets do not fit: every rung visits every prompt."
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty. Pass None for unconditional generation from one empty prompt.")
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"{name} has no column 'prompt' (it has {dataset.column_names}). Rename one: "
            "dataset.rename_column('text', 'prompt')."
        )
    return dataset
