"""How much memory drawing and scoring take beside a model's weights: an estimate from its config.

Both are estimated from above for attention and feed-forward layers as Llama's: what one layer has in memory at a time,
the keys and values of all of them, and logits. What a config does not say is guessed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from .configs import numbers, text_config
from .head import LOGITS_BUDGET

FP32, FP64 = 4, 8
"""Bytes of a number."""


@dataclass(frozen=True)
class Work:
    """What is drawn and scored.

    Attributes:
        prompt: tokens of the longest prompt.
        completion: most tokens of a completion.
        scoring_batch_tokens: most tokens of a forward pass that scores, unless a single row has more.
        per_prompt: completions, one after the other, for which a prompt is computed and kept once; 1 where the model
            computes it for each.
    """

    prompt: int
    completion: int
    scoring_batch_tokens: int
    per_prompt: int = 1

    @property
    def width(self) -> int:
        """Tokens of a row."""
        return self.prompt + self.completion

    def prompts(self, rows: int) -> int:
        """How many prompts are computed and kept for `rows` completions, wherever the first of them begins."""
        return rows if self.per_prompt == 1 else min(rows, (rows + self.per_prompt - 2) // self.per_prompt + 1)


@dataclass(frozen=True)
class Footprint:
    """Bytes that a model takes beside its weights.

    Attributes:
        cached: keys and values of a token, in all layers.
        state: what recurrent layers keep of a row, in all layers.
        attended: the same in one layer, for all heads: as they are handed to attention, and as they are appended to.
        activations: what one layer has in memory at a time, for each token of a forward pass.
        mask: of attention, for each pair of tokens of a row.
        heads: of attention, in one layer.
        vocabulary: number of tokens.
        itemsize: bytes of a number of the model's precision.
    """

    cached: int
    state: int
    attended: int
    activations: int
    mask: int
    heads: int
    vocabulary: int
    itemsize: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Footprint:
        """A model's."""
        config, size = text_config(model.config), model.dtype.itemsize
        hidden = _most(config, "hidden_size", 4096)
        heads = _most(config, "num_attention_heads", 0)
        head_dim = _most(config, "head_dim", 0) or math.ceil(hidden / max(1, heads))
        key_heads = _most(config, "num_key_value_heads", heads)
        inner = _most(config, "intermediate_size", 4 * hidden)
        experts = _most(config, "moe_intermediate_size", 0) * _most(config, "num_experts_per_tok", 1)
        # A gate, what is multiplied with it, their product, and the results of an adapter beside two of them; and about
        # as many copies of the hidden states, of queries, keys and values, some of them in fp32.
        activations = 6 * max(inner, experts) * size + 4 * hidden * FP32 + 6 * heads * head_dim * size
        eager = getattr(config, "_attn_implementation", None) == "eager"
        return cls(
            cached=2 * _most(config, "num_hidden_layers", 32) * key_heads * head_dim * size,
            state=_most(config, "num_hidden_layers", 32) * inner * _most(config, "state_size", 0) * FP32,
            attended=2 * (key_heads + heads) * head_dim * size,
            activations=activations,
            # True or false, and in some kernels the same in numbers; without such a kernel, the products themselves.
            mask=1 + size + (heads * (FP32 + 2 * size) if eager else 0),
            heads=heads,
            vocabulary=_most(config, "vocab_size", 2**17),
            itemsize=size,
        )

    def drawing(self, rows: int, work: Work) -> int:
        """Bytes in which `rows` completions are drawn at once."""
        tokens = work.prompts(rows) * work.prompt
        prefill = tokens * (self.activations + work.prompt * self.mask)
        # A step's logits, generate's copy in fp32 and the scores in which one token is left, those of the step before
        # too; and for some rows at a time, their exponentials, differences, and sums in fp64.
        chosen = min(rows * self.vocabulary, max(LOGITS_BUDGET // 2, self.vocabulary)) * (2 * FP32 + FP64)
        logits = rows * self.vocabulary * (self.itemsize + 3 * FP32) + chosen
        attention = (tokens + rows * work.completion) * self.attended
        if work.per_prompt > 1:  # to the prompt by plain products, in fp32
            attention += 5 * rows * work.prompt * self.heads * FP32
        kept = rows * self.state + (tokens + rows * work.completion) * self.cached
        return kept + max(prefill, attention + logits)

    def scoring(self, rows: int, work: Work) -> int:
        """Bytes in which `rows` completions are scored, in as many forward passes as that takes."""
        together = max(1, min(rows, work.scoring_batch_tokens // work.width))
        tokens = together * work.width
        # In up to three copies: see LOGITS_BUDGET.
        logits = min(together * work.completion * self.vocabulary, max(LOGITS_BUDGET, self.vocabulary)) * 3 * FP32
        return tokens * (self.activations + work.width * self.mask) + logits

    def needed(self, rows: int, work: Work) -> int:
        """Bytes in which `rows` completions are drawn, and then scored."""
        return max(self.drawing(rows, work), self.scoring(rows, work))


def _most(config: PreTrainedConfig, name: str, guess: int) -> int:
    """The largest number that a config has for any layer."""
    return max(numbers(config, name), default=guess)
