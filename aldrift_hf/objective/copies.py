"""Copies of what cost functions are called with, so that a function may edit its arguments."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

_IMMUTABLE = {str, int, float, bool, type(None), bytes}


def copies_of(arguments: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """New lists, of copies of their own: no two items share a part, even where two rows have the same prompt."""
    return {name: list(map(copy_of, values)) for name, values in arguments.items()}


def copy_of(value: Any) -> Any:
    """A deep copy; what cannot be copied, such as a decoder of a file, is passed as it is."""
    if type(value) in _IMMUTABLE:
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # whatever copying the parts raises
        if type(value) in (list, tuple):
            return type(value)(map(copy_of, value))
        return {key: copy_of(part) for key, part in value.items()} if type(value) is dict else value
