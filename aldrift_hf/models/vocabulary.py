"""The tokens that a model has rows for, and those of its tokenizer: where a text begins, ends and is padded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import sharding
from .configs import text_config

logger = logging.getLogger(__name__)

_REMEDY = (
    "Use the model's own tokenizer; or, if the token was added to it, give the model a row for it with "
    "model.resize_token_embeddings(len(tokenizer))."
)


def size_of(model: PreTrainedModel) -> int:
    """Number of tokens that a model can both read and write.

    Raises:
        ValueError: if it can write some that it cannot read.
    """
    written = sharding.vocabulary_size(model)
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if weight is None:
        return written
    read = int(getattr(weight, "ds_shape", weight.shape)[0])
    if written > read:
        raise ValueError(
            f"the model can write {written} tokens, and read {read}: its output embeddings have more rows than its "
            "input embeddings. Resize both with model.resize_token_embeddings(n)."
        )
    return written


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, size: int | None = None) -> None:
    """Check that a completion can end.

    Args:
        tokenizer: what a user passed as such.
        size: number of the model's tokens, where it is known.

    Raises:
        ValueError: for a tokenizer without an end-of-text token, or with one that the model cannot write.
    """
    end = cast(Any, tokenizer.eos_token_id)
    if end is None:
        raise ValueError(
            "the tokenizer has no end-of-text token, so no completion could end. Set tokenizer.eos_token to the "
            "token that your model ends with."
        )
    if size is not None and end >= size:
        raise ValueError(
            f"the tokenizer's end-of-text token {tokenizer.eos_token!r} has the id {end}, beyond the model's {size} "
            f"tokens, so no completion could end. {_REMEDY}"
        )


def check_prompts(token_ids: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, size: int | None) -> None:
    """Check that a model can read prompts.

    Raises:
        ValueError: naming the first prompt and token that it cannot.
    """
    for index, ids in enumerate(token_ids):
        if size is not None and max(ids) >= size:
            token = next(each for each in ids if each >= size)
            raise ValueError(
                f"prompt {index} has the token {tokenizer.convert_ids_to_tokens(token)!r} with the id {token}, beyond "
                f"the model's {size} tokens. {_REMEDY}"
            )


def pad_token_id(tokenizer: PreTrainedTokenizerBase, size: int | None) -> int:
    """The token that fills rows: the tokenizer's, or its end-of-text token where the model has no row for that."""
    pad = cast(Any, tokenizer.pad_token_id)
    return int(cast(Any, tokenizer.eos_token_id) if pad is None or (size is not None and pad >= size) else pad)


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a completion, at least one: those of the generation config, and the tokenizer's own.

    Raises:
        ValueError: if the model cannot write the tokenizer's.
    """
    size = size_of(model)
    check_tokenizer(tokenizer, size)
    end = int(cast(Any, tokenizer.eos_token_id))
    # A configuration class can carry its family's default id into a model with a smaller vocabulary.
    own = {token for token in _ids(getattr(model.generation_config, "eos_token_id", None)) if 0 <= token < size}
    known = own.union(_ids(getattr(text_config(model.config), "eos_token_id", None)))
    if own and end not in known:
        logger.warning(
            f"the tokenizer ends texts with {tokenizer.eos_token!r} (id {end}), and the model with the ids "
            f"{sorted(own)}. Any of them ends a completion here. If the tokenizer is another model's, its texts have "
            "no meaning: pass the model's own as processing_class."
        )
    return tuple(sorted({end, *own}))


def _ids(value: Any) -> set[int]:
    """Of one id, several, or none."""
    return set() if value is None else {int(token) for token in torch.as_tensor(value).flatten().tolist()}
