"""A prior that knows which words may follow each other and how many there are: all other texts have probability 0."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from aldrift_hf.models.shared_prompts.cache import CACHE
from aldrift_hf.toy import completion_ids

RULED_OUT = -1e4
"""Added to a logit: the probability is 0 in floating point, while its logarithm and gradients are finite."""


class FeasibleGPT2(GPT2LMHeadModel):
    """A GPT-2 whose next token depends on rules as well, whatever it learns. The prompt is one token.

    Attributes:
        rules: `[2, V, V]`, added to the logits after each token: until a text has all its words, and from there on.
        length: the number of words.
    """

    rules: Tensor

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.register_buffer("rules", torch.zeros(2, config.vocab_size, config.vocab_size))
        self.length = 0

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> Any:
        """As GPT-2's; always returns an output with names."""
        if position_ids is None:
            cache: Cache | None = inputs.get(CACHE)
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = past + torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        output = super().forward(
            input_ids, position_ids=position_ids, logits_to_keep=logits_to_keep, return_dict=True, **inputs
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        has_all = position_ids >= self.length
        output.logits = output.logits + self.rules[has_all.long()[:, kept], input_ids[:, kept]]
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, vocab_size=self.config.vocab_size)
        return output


def with_rules(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    words: list[str],
    pairs: Iterable[tuple[str, str]],
    length: int,
) -> FeasibleGPT2:
    """A model that writes nothing but texts of one length, with no other neighbours than some.

    Args:
        model: a GPT-2, which is left as it is.
        tokenizer: its tokenizer, with a token for each word; its end-of-text token is the prompt.
        words: all words.
        pairs: words that may follow each other.
        length: words of a text.
    """
    token = {word: ids[0] for word, ids in zip(words, completion_ids(words, tokenizer), strict=True)}
    end = cast(int, tokenizer.eos_token_id)
    made = FeasibleGPT2(model.config)
    made.load_state_dict(model.state_dict(), strict=False)
    made.length = length
    made.rules.fill_(RULED_OUT)
    made.rules[0, end, [*token.values()]] = 0.0
    for one, other in pairs:
        made.rules[0, token[one], token[other]] = 0.0
    made.rules[1, :, end] = 0.0
    made.eval()
    return made
