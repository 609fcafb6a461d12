"""A data set of prompts, checked before anything is computed."""

from __future__ import annotations

from typing import Any

from datasets import Dataset


def check_dataset(dataset: Any, name: str) -> Dataset:
    """Prompts as a [`datasets.Dataset`] with a column `"prompt"` and at least one row.

    Args:
        dataset: a `Dataset`; a list of prompts (texts or lists of chat messages) or of rows (dicts); or `None` for one
            empty prompt.
        name: the argument that it was passed as, for error messages.

    Raises:
        TypeError: for an object that is neither a `Dataset`, nor a list, nor `None`.
        ValueError: for a list that makes no data set, no rows, or no column `"prompt"`.
    """
    if dataset is None:
        return Dataset.from_dict({"prompt": [""]})
    if isinstance(dataset, (list, tuple)):
        try:
            dataset = Dataset.from_list([row if isinstance(row, dict) else {"prompt": row} for row in dataset])
        except (ValueError, TypeError) as error:  # pyarrow's, for rows of mixed types and for text with lone surrogates
            raise ValueError(f"{name} must be a list of texts, or a list of lists of messages: {error}") from error
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} must be a datasets.Dataset or a list of prompts, got {type(dataset).__name__}. Streaming data "
            "sets and dicts of data sets are not supported, because every rung visits every prompt."
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty. Pass None for unconditional generation from one empty prompt.")
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"{name} has no column 'prompt'; its columns are {dataset.column_names}. Rename one of them: "
            "dataset.rename_column('text', 'prompt')."
        )
    return dataset
