"""Keys and values of prompts, held once for all rows that are drawn after them.

A row's attention is computed in two parts, to its prompt and to its own tokens, each with the logarithm of its
normaliser, from which the whole is exact. The first part is one product for all rows of a prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..passes import Tokens
from .support import can_share_prompts

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls the keys and values that a model takes and returns; `past_key_values` before 5.24."""
MIN_PROMPT = 16
"""Tokens of a prompt from which on sharing it saves more than attention in two parts costs."""


class _Layer(DynamicLayer):
    """The rows' own keys and values, counted as if the prompt's came before them."""

    def __init__(self, prompt_keys: Tensor, prompt_values: Tensor) -> None:
        super().__init__()
        self.prompt_keys, self.prompt_values = prompt_keys, prompt_values

    def get_seq_length(self) -> int:
        return self.prompt_keys.shape[-2] + int(super().get_seq_length())


class SharedPrompts(DynamicCache):
    """A cache of `n` rows after `U` distinct prompts.

    Args:
        computed: the cache of the distinct prompts, one row each.
        mask: `[U, P]`, 1 on the prompts' tokens, 0 on padding before them.
        prompt_of: `[n]`, the prompt of each row.
    """

    def __init__(self, computed: DynamicCache, mask: Tensor, prompt_of: Tensor) -> None:
        super().__init__()
        self.layers = [_Layer(layer.keys, layer.values) for layer in computed.layers]
        self._padding = mask[:, None, None] == 0
        self._arrange(prompt_of)

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows only."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        self._arrange(self.prompt_of[rows])

    def _arrange(self, prompt_of: Tensor) -> None:
        """Give every row a place among those of its prompt."""
        self.prompt_of = prompt_of
        order = prompt_of.argsort(stable=True)
        counts = torch.bincount(prompt_of, minlength=len(self._padding))
        self._place = torch.empty_like(order)
        starts = counts.cumsum(0) - counts
        self._place[order] = torch.arange(len(order), device=order.device) - starts[prompt_of[order]]
        self._rows = torch.zeros((len(counts), max(1, int(counts.max()))), dtype=torch.long, device=order.device)
        self._rows[prompt_of, self._place] = torch.arange(len(order), device=order.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attention from each row's newest token to its prompt and its own tokens, in fp32.

        Args:
            layer: its number.
            query: `[n, heads, 1, head_dim]`.
            key, value: `[n, key heads, tokens, head_dim]`, the rows' own.
            scaling: of the products.

        Returns:
            `[n, 1, heads, head_dim]`.
        """
        n, heads, _, width = query.shape
        prompt: Any = self.layers[layer]
        queries = query.reshape(n, key.shape[1], -1, width).float()
        queries = queries * (width**-0.5 if scaling is None else scaling)
        # [U, key heads, rows of the prompt × heads per key head, head_dim]
        grouped = queries[self._rows.to(query.device)].transpose(1, 2).flatten(2, 3)
        shared, log_shared = _part(grouped, prompt.prompt_keys, prompt.prompt_values, self._padding)
        # Back to a row of its own for each: [n, key heads, heads per key head, …]
        shared, log_shared = (
            part.view(*part.shape[:2], -1, queries.shape[2], part.shape[-1]).transpose(1, 2)[
                self.prompt_of, self._place
            ]
            for part in (shared, log_shared)
        )
        own, log_own = _part(queries, key, value)
        weight = torch.sigmoid(log_shared - log_own)
        return torch.lerp(own, shared, weight).reshape(n, 1, heads, -1).to(query.dtype)


def _part(queries: Tensor, keys: Tensor, values: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention to some of the keys, and the logarithm of its normaliser, `[…, 1]`."""
    scores = queries @ keys.float().transpose(-1, -2)
    if padding is not None:  # finite: a row whose prompt has no such tokens gets weight 0
        scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
    log_sum = scores.logsumexp(-1, keepdim=True)
    return (scores - log_sum).exp() @ values.float(), log_sum


def prefill(
    model: PreTrainedModel, prompts: Tokens, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int
) -> SharedPrompts | None:
    """The cache of all but the last token of each prompt; `None` where prompts are not shared, or too short, or where
    the model cannot share them.

    Args:
        model: in eval mode, without gradients.
        prompts: `n` lists of token ids.
        input_ids, attention_mask: `[n, width]`, the same prompts, padded on the left.
        max_new_tokens: most tokens that follow.
    """
    numbers: dict[tuple[int, ...], int] = {}
    prompt_of = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]
    length = input_ids.shape[1]
    if 2 * len(numbers) > len(prompts) or length < MIN_PROMPT:
        return None
    if not can_share_prompts(model, length + max_new_tokens):
        return None
    first = torch.tensor([prompt_of.index(number) for number in range(len(numbers))], device=input_ids.device)
    ids, mask = input_ids[first, :-1], attention_mask[first, :-1]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    computed = getattr(output, CACHE)
    if type(computed) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in computed.layers):
        return None
    return SharedPrompts(computed, mask, torch.tensor(prompt_of, device=input_ids.device))
