"""What distinguishes one row of a data set from another: the key under which its costs are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from datasets.utils.file_utils import xopen

from ..content import Content

READ_AT_ONCE = 1_000
"""Rows that are read from the data set at once."""


def row_keys(dataset: Dataset, rows: Sequence[dict[str, Any]]) -> list[str]:
    """A key per row, from what the data set stores: the same in every format (python, numpy, torch, pandas, arrow) and
    in every process. Of an image, a recording or a video it is the file's bytes, wherever the file lies.

    Args:
        dataset: the data set.
        rows: its rows as the objective gets them. They are a part of the keys where the data set has a transform of the
            user's own, because then they may be anything.
    """
    form = dataset.format
    stored = dataset.with_format("arrow", columns=None if form["output_all_columns"] else form["columns"])
    with_files = {name: feature for name, feature in dataset.features.items() if _has_files(feature)}
    keys: list[str] = []
    for table in stored.iter(READ_AT_ONCE):
        for row in table.to_pylist():
            for name in with_files.keys() & row.keys():
                row[name] = _with_files(row[name], with_files[name])
            keys.append(Content().digest([row, rows[len(keys)]] if form["type"] == "custom" else row).hex())
    return keys


def _has_files(feature: Any) -> bool:
    """Whether a feature is, or has within it, one whose values lie in files."""
    return hasattr(feature, "decode") or any(map(_has_files, _inner(feature)))


def _inner(feature: Any) -> list[Any]:
    if isinstance(feature, dict):
        return list(feature.values())
    if isinstance(feature, (list, tuple)):
        return list(feature)
    return [feature.feature] if hasattr(feature, "feature") else []


def _with_files(value: Any, feature: Any) -> Any:
    """A stored value with the files' bytes in place of their paths."""
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, (list, tuple)) else feature.feature
        return [_with_files(item, inner) for item in value]
    if not isinstance(value, dict):
        return value
    if hasattr(feature, "decode"):
        if value.get("bytes") is None and value.get("path") is not None:
            value = {**value, "bytes": _read(value["path"])}
        # Where the value is not decoded, the objective gets the path as it is.
        return value["bytes"] if feature.decode and value.get("bytes") is not None else value
    if hasattr(feature, "feature"):  # a sequence of structures is stored as a structure of sequences
        return {name: _with_files(items, [feature.feature[name]]) for name, items in value.items()}
    return {name: _with_files(item, feature[name]) for name, item in value.items()}


def _read(path: str) -> bytes | None:
    """The bytes of a file; `None` where it cannot be read: the path stands for it then."""
    try:
        with xopen(path, "rb") as file:
            return bytes(file.read())
    except Exception:  # whatever the file systems behind a URL raise
        return None
