"""Settings of the wrong kind, refused by name: the Trainer takes its own as they come, and would fail a rung in."""

from __future__ import annotations

import functools
import json
import math
import os
import types
from collections.abc import Collection, Hashable, Mapping
from dataclasses import fields
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

_IN_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}


def check_kinds(settings: Any, choices: Mapping[str, Collection[str]], mappings: Collection[str]) -> None:
    """Refuse values that are not of the kind that their field is annotated with: numbers, switches, text, one of a few.

    Args:
        settings: a dataclass.
        choices: the values of fields that are annotated as text and can be one of a few.
        mappings: fields that hold a mapping, JSON text of one, or the path of a file with one.

    Raises:
        ValueError: naming the field, what it wants and what it got.
    """
    kinds_of: dict[str, frozenset[Any]] = _kinds(cast(Hashable, type(settings)))
    for field in fields(settings):
        value, kinds = getattr(settings, field.name), kinds_of[field.name]
        few = choices.get(field.name) or _literals(kinds)
        if value is None and (type(None) in kinds or field.default in (None, "")):
            continue
        if field.name in mappings:
            fits, wanted = _is_mapping(value), "a mapping, JSON text of one, or the path of a file with one"
        elif few:
            fits, wanted = value in list(few), " or ".join([", ".join([*few][:-1]), [*few][-1]])
        elif all(kind in _IN_WORDS or kind is type(None) or get_origin(kind) is list for kind in kinds):
            fits = any(_is(kind, value) for kind in kinds) or (field.name == "max_grad_norm" and value == math.inf)
            wanted = " or ".join(sorted(_in_words(kind) for kind in kinds if kind is not type(None)))
        else:
            continue
        if not fits:
            raise ValueError(f"{field.name} must be {wanted}, got {value!r}")


def check_bounds(settings: Any, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Refuse numbers outside of their closed intervals; `None` is no number.

    Raises:
        ValueError: naming the field, its bounds and what it got.
    """
    for name, (low, high) in bounds.items():
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            limit = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise ValueError(f"{name} must be {limit}, got {value!r}")


@functools.cache
def _kinds(settings: type) -> dict[str, frozenset[Any]]:
    """What each field is annotated with, a union as its parts."""
    hints = get_type_hints(settings)
    unions = (Union, types.UnionType)
    return {name: frozenset(get_args(hint) if get_origin(hint) in unions else [hint]) for name, hint in hints.items()}


def _literals(kinds: Collection[Any]) -> list[str]:
    literals = [kind for kind in kinds if get_origin(kind) is Literal]
    return [*get_args(literals[0])] if len(literals) == 1 and not {*kinds} - {literals[0], type(None)} else []


def _in_words(kind: Any) -> str:
    if get_origin(kind) is list:
        return f"a list, each {_IN_WORDS.get(get_args(kind)[0], 'one of a few words')}"
    return _IN_WORDS[kind]


def _is(kind: Any, value: Any) -> bool:
    if get_origin(kind) is list:
        (inner,) = get_args(kind)
        return isinstance(value, (list, tuple)) and all(_is(inner, each) or inner not in _IN_WORDS for each in value)
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is int:
        return isinstance(value, int)
    if kind is float:
        return isinstance(value, (int, float)) and abs(value) < math.inf
    return isinstance(value, (str, os.PathLike)) and kind is str


def _is_mapping(value: Any) -> bool:
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            return False
    if isinstance(value, str):
        return os.path.isfile(value)
    # Or an object that was made of one, as Accelerate's configuration.
    return all(isinstance(key, str) for key in value) if isinstance(value, dict) else hasattr(value, "__dict__")
