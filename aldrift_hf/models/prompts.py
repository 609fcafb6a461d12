"""Prompts as users write them (text or chat messages), encoded as the model reads them (token ids)."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import apply_chat_template, is_conversational

from ..types import Prompts
from .fingerprint import row_keys


def encode_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_completion_length: int, context_length: int | None
) -> Prompts:
    """Tokenise every prompt once; chat messages go through the tokenizer's chat template.

    Raises:
        ValueError: for a prompt that is neither text nor messages, for an empty prompt if there is no token to start
            from, or for a prompt that leaves no room for a completion in the model's context.
    """
    # Prompts are text and lists of messages whatever the format of the other columns: numpy's would be an array.
    plain = dataset if dataset.format["type"] == "custom" else dataset.with_format(None)
    rows = [{**row, "prompt": as_text["prompt"]} for row, as_text in zip(dataset, plain, strict=True)]
    token_ids = [encode_prompt(row["prompt"], index, tokenizer) for index, row in enumerate(rows)]
    for index, ids in enumerate(token_ids):
        if context_length is not None and len(ids) + max_completion_length > context_length:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens; with max_completion_length={max_completion_length} that "
                f"exceeds the model's context of {context_length}. Lower max_completion_length to "
                f"{max(0, context_length - max(map(len, token_ids)))} or less, or shorten the prompt."
            )
    return Prompts(rows, token_ids, row_keys(dataset, rows))


def encode_prompt(prompt: Any, index: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of one prompt (text or messages), at least one; `index` is for error messages."""
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
    elif prompt and is_conversational({"prompt": prompt}):
        if tokenizer.chat_template is None:
            raise ValueError(
                f"prompt {index} is a list of chat messages, but the tokenizer has no chat template. Set "
                "tokenizer.chat_template, or pass plain text."
            )
        text = apply_chat_template({"prompt": prompt}, tokenizer)["prompt"]
        # The template writes the special tokens itself.
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
