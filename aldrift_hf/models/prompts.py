"""Prompts as users write them (text or chat messages), encoded as the model reads them (token ids)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..types import Prompts
from . import templates
from .fingerprint import row_keys
from .vocabulary import check_prompts

logger = logging.getLogger(__name__)


def encode_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_completion_length: int,
    context_length: int | None = None,
    vocabulary: int | None = None,
) -> Prompts:
    """Tokenise every prompt once; chat messages go through the tokenizer's chat template.

    Args:
        dataset: has a column `"prompt"`.
        tokenizer: the model's.
        max_completion_length: tokens that a completion may have.
        context_length: most positions that the model can attend to, where it is known.
        vocabulary: number of tokens that the model has, where it is known.

    Raises:
        ValueError: for a prompt that is neither text nor messages, for an empty prompt if there is no token to start
            from, or for a prompt that the model cannot read or that leaves no room for a completion in its context.
    """
    rows = _read(dataset)
    token_ids = [encode_prompt(row["prompt"], index, tokenizer, row) for index, row in enumerate(rows)]
    for index, ids in enumerate(token_ids):
        if context_length is not None and len(ids) + max_completion_length > context_length:
            room = context_length - max(map(len, token_ids))
            lower = f"lower max_completion_length to {room} or less, or " if room > 0 else ""
            remedy = f"{lower}shorten the prompt, or leave it out."
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens; with max_completion_length={max_completion_length} that "
                f"exceeds the model's context of {context_length}. {remedy[0].upper()}{remedy[1:]}"
            )
    check_prompts(token_ids, tokenizer, vocabulary)
    _say_what_has_no_effect(rows, tokenizer)
    return Prompts(rows, token_ids, row_keys(dataset, rows))


def encode_prompt(
    prompt: Any, index: int, tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of one prompt (text or messages), at least one.

    A text has the tokens before it that the tokenizer adds, as a BOS, unless it begins with them already; an EOS or SEP
    that the tokenizer adds behind it is left out, because the model goes on from there. Special tokens that are written
    in the text itself stay, also an EOS at its end. Chat messages have those that the chat template writes.

    Args:
        prompt: text, or a list of messages.
        index: the row's number, for error messages.
        tokenizer: the model's.
        row: other columns of the row; [`aldrift_hf.models.templates`] knows `tools` and `chat_template_kwargs`.
    """
    if isinstance(prompt, str):
        ids = _encode_text(prompt, tokenizer)
    elif templates.is_chat(prompt):
        text = templates.render({**(row or {}), "prompt": prompt}, index, tokenizer)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        raise ValueError(
            f"prompt {index} is neither text nor a list of messages with 'role' and 'content': {str(prompt)[:80]!r}"
        )
    if ids:
        return ids
    # An empty prompt: generation still needs one token to start from.
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError(
            f"prompt {index} is empty and the tokenizer has neither a BOS nor an EOS token to start from. Set "
            "tokenizer.bos_token, or write a prompt."
        )
    return [start]


def _read(dataset: Dataset) -> list[dict[str, Any]]:
    """The data set's rows. What becomes the prompt is plain whatever the format of the other columns: in numpy's, a
    list of messages would be an array.
    """
    plain = dataset if dataset.format["type"] == "custom" else dataset.with_format(None)
    names = [name for name in ("prompt", *templates.COLUMNS) if name in dataset.column_names]
    return [{**row, **{name: as_is[name] for name in names}} for row, as_is in zip(dataset, plain, strict=True)]


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    own = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(text)["input_ids"])
    if not own:
        return _without_end(whole, tokenizer)
    for start in range(len(whole) - len(own) + 1):
        if whole[start : start + len(own)] == own:
            added = whole[:start]
            return own if own[:start] == added else added + own
    return whole  # a tokenizer that does not put its special tokens around the text


def _without_end(added: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Of the special tokens of an empty text, those that stand before it."""
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    count = len(added)
    while count and added[count - 1] in ends:
        count -= 1
    return added[:count]


def _say_what_has_no_effect(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn of columns for the chat template that change nothing."""
    if any(isinstance(row["prompt"], str) and templates.has_options(row) for row in rows):
        logger.warning(
            f"columns {' and '.join(templates.COLUMNS)} have no effect on prompts that are text: they are handed to "
            "the chat template, which is for lists of messages."
        )
    with_tools = next((row for row in rows if row.get("tools") and not isinstance(row["prompt"], str)), None)
    if with_tools is not None and templates.ignores_tools(with_tools, tokenizer):
        logger.warning("the tokenizer's chat template has no place for tools: the model does not see that column.")
