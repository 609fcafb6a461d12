"""Attention of many completions to one copy of their prompt.

It is an attention implementation of transformers. Models that look theirs up by name run it within a `with` block of
[`sharing`]. A forward pass says what shares a prompt by an argument (`shared_prompts`, a [`Layout`]), and generation by
its cache ([`aldrift_hf.models.shared_prompts.cache`]); any other call gets the implementation that the model had. The
argument travels with the layers' inputs, so that gradient checkpointing, which runs layers again in the backward pass,
finds it there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

NAME = "aldrift_shared_prompts"
REPLACED = "sdpa"
"""The implementation whose place ours takes; models that use another one compute every copy of a prompt."""

_replaced: Callable[..., tuple[Tensor, None]] = AttentionInterface()[REPLACED]

MIN_CHUNK = 128
"""Least number of completion tokens that one call of the kernel attends from. It is larger where the prompt is longer:
the call also computes products of tokens of different completions, which are discarded."""


@dataclass(frozen=True)
class Block:
    """Consecutive tokens that one call of the kernel attends from.

    Attributes:
        tokens: their positions in the packed row.
        prompt: the positions of the prompt that all of them attend to; empty where they are the prompt.
        rows: `[tokens]`, the completion of each token; a token attends within its own.
    """

    tokens: slice
    prompt: slice
    rows: Tensor | None = None

    def mask(self) -> Tensor | None:
        """`[1, 1, tokens, prompt + tokens]`, true where a token attends; `None` for plain causal attention."""
        if self.rows is None:
            return None
        own = (self.rows[:, None] == self.rows).tril()
        before = own.new_ones((len(own), self.prompt.stop - self.prompt.start))
        return torch.cat([before, own], dim=1)[None, None]


@dataclass
class Layout:
    """What attends to what in a packed row: prompts, each followed by its completions.

    Attributes:
        blocks: in the row's order.
        layers: the layers that have attended so.
    """

    blocks: list[Block]
    layers: set[int] = field(default_factory=set)
    _masks: dict[torch.device, list[Tensor | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, groups: Sequence[tuple[int, Sequence[int]]]) -> Layout:
        """From the length of each prompt and those of its completions."""
        blocks, start = [], 0
        for prompt_length, lengths in groups:
            prompt = slice(start, start + prompt_length)
            blocks.append(Block(prompt, slice(0, 0)))
            start, size, first = prompt.stop, max(MIN_CHUNK, prompt_length // 2), 0
            while first < len(lengths):
                last, tokens = first + 1, lengths[first]
                while last < len(lengths) and tokens + lengths[last] <= size:
                    tokens += lengths[last]
                    last += 1
                rows = torch.repeat_interleave(torch.arange(first, last), torch.tensor(lengths[first:last]))
                if tokens:
                    blocks.append(Block(slice(start, start + tokens), prompt, rows))
                start, first = start + tokens, last
        return cls(blocks)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        """The layer's attention, `[1, tokens, heads, head_dim]`."""
        self.layers.add(int(getattr(module, "layer_idx", -1)))
        parts = []
        for block, mask in zip(self.blocks, self._masks_on(query.device), strict=True):
            keys, values = (
                torch.cat([states[:, :, block.prompt], states[:, :, block.tokens]], dim=2) for states in (key, value)
            )
            parts.append(_attend(module, query[:, :, block.tokens], keys, values, mask, **kwargs))
        return torch.cat(parts, dim=1)

    def _masks_on(self, device: torch.device) -> list[Tensor | None]:
        """The blocks' masks: the same for all layers, which may lie on several devices."""
        if device not in self._masks:
            self._masks[device] = [mask if mask is None else mask.to(device) for mask in map(Block.mask, self.blocks)]
        return self._masks[device]


class Decoding(Protocol):
    """A cache that holds prompts once."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attention from the newest token of each row to its prompt and to its own tokens."""
        ...


class _Current(threading.local):
    """The cache that this thread decodes with: an objective in another thread may run the model too."""

    cache: Decoding | None = None


_current = _Current()


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As transformers calls it: `[n, heads, tokens, head_dim]` to `[n, tokens, heads, head_dim]`."""
    layout: Layout | None = kwargs.pop("shared_prompts", None)
    if layout is not None:
        return layout.attend(module, query, key, value, **kwargs), None
    if _current.cache is not None:
        layer = int(getattr(module, "layer_idx", -1))
        return _current.cache.attend(layer, query, key, value, kwargs.get("scaling")), None
    return _attend(module, query, key, value, attention_mask, **kwargs), None


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    """The implementation that ours replaces; in fp32 where a CPU would learn in bf16.

    There the backward pass of PyTorch's kernel takes three to six times as long in bf16 as in fp32, for short rows.
    """
    if not (query.requires_grad and query.device.type == "cpu" and _computed_in_bf16(query)):
        return _replaced(module, query, key, value, mask, **kwargs)[0]
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    with torch.autocast("cpu", enabled=False):
        output, _ = _replaced(module, query.float(), key.float(), value.float(), mask, **kwargs)
    return output.bfloat16()


def _computed_in_bf16(states: Tensor) -> bool:
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    return (autocast or states.dtype) == torch.bfloat16


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()[REPLACED])


@contextlib.contextmanager
def sharing(model: PreTrainedModel, cache: Decoding | None = None) -> Iterator[None]:
    """Within a `with` block the model attends by [`attention`], and decodes with a cache of shared prompts if given."""
    settings = {id(config): config for module in model.modules() for config in [getattr(module, "config", None)]}
    replaced = [
        config
        for config in settings.values()
        if isinstance(config, PreTrainedConfig) and config._attn_implementation_internal == REPLACED
    ]
    before, _current.cache = _current.cache, cache
    for config in replaced:
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        _current.cache = before
        for config in replaced:
            config._attn_implementation_internal = REPLACED


def may_share(model: PreTrainedModel, tokens: int) -> bool:
    """Whether a model may attend by [`attention`] to this many tokens: it uses the implementation that ours replaces,
    which may be in place now, and none of its layers looks at a window that is shorter."""
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    in_place = config._attn_implementation in (REPLACED, NAME)
    return in_place and all(not window or tokens <= window for window in windows)
