"""Chat prompts as the text that the model reads: through the tokenizer's chat template, as in TRL."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import apply_chat_template, is_conversational

COLUMNS = ("tools", "chat_template_kwargs")
"""Columns of the data set that are handed to the chat template, row by row."""


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, each with a role."""
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and is_conversational({"prompt": prompt})
        and all(isinstance(message, dict) and message.get("role") is not None for message in prompt)
    )


def render(row: Mapping[str, Any], index: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a row's chat prompt, up to where the model's answer begins; a last message of the assistant is one
    that the model continues.

    Args:
        row: `"prompt"` with messages and, if it has them, `"tools"` (JSON schemas in a list, or as JSON text) and
            `"chat_template_kwargs"` (a mapping). Keys without a value are left out: Arrow adds those that other rows
            have, and templates would take them for given.
        index: the row's number, for error messages.
        tokenizer: has the template.

    Raises:
        ValueError: for a tokenizer without a template, messages with anything but text, tools that are not schemas, or
            if the template fails.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"prompt {index} is a list of chat messages, but the tokenizer has no chat template. Set "
            "tokenizer.chat_template, or pass plain text."
        )
    _check_text_alone(row["prompt"], index)
    tools, options = _tools(row.get("tools"), index), _options(row.get("chat_template_kwargs"), index)
    example = {"prompt": _without_none(row["prompt"]), "chat_template_kwargs": options}
    try:
        return str(apply_chat_template(example, tokenizer, tools=tools)["prompt"])
    except Exception as error:  # a template is a program: it may raise anything
        also = f" with {len(tools)} tools" if tools else ""
        also += f" with chat_template_kwargs={options}" if options else ""
        raise ValueError(f"the chat template cannot be applied to prompt {index}{also}: {error}") from error


def has_options(row: Mapping[str, Any]) -> bool:
    """Whether a row has something for the template beside its prompt."""
    return any(row.get(name) not in (None, "", [], {}) for name in COLUMNS)


def ignores_tools(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes the same text for a row without its tools."""
    try:
        return render({**row, "tools": None}, 0, tokenizer) == render(row, 0, tokenizer)
    except ValueError:  # it insists on tools
        return False


def _tools(tools: Any, index: int) -> list[dict[str, Any]] | None:
    """JSON schemas; `None` where there are none, because some templates take an empty list for tools."""
    tools = _parsed(tools, "tools", index) if isinstance(tools, str) and tools else _without_none(tools)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(
            f"tools of prompt {index} must be a list of JSON schemas (dicts), or the JSON text of one, got "
            f"{str(tools)[:80]!r}"
        )
    return tools


def _options(options: Any, index: int) -> dict[str, Any]:
    if isinstance(options, str) and options:
        options = _parsed(options, "chat_template_kwargs", index)
    options = _without_none(options) or {}
    if not isinstance(options, dict):
        raise ValueError(f"chat_template_kwargs of prompt {index} must be a mapping, got {str(options)[:80]!r}")
    return options


def _parsed(text: str, name: str, index: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} of prompt {index} is text, but not JSON: {error}") from error


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _check_text_alone(messages: list[dict[str, Any]], index: int) -> None:
    """Refuse pictures and sounds: the template would write a token for them that stands for nothing."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and part.get("type") not in ("text", None):
                raise ValueError(
                    f"prompt {index} has content of type {part['type']!r}, and models are given text alone here. "
                    "Describe it in words, or leave it out."
                )
