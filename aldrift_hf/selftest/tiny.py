"""A tiny model of any family with random weights, all of whose completions can be enumerated."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

END, PAD = 0, 1
"""The first two tokens of `word_tokenizer`."""
HEADS = 2
HEAD_DIMS = (32, None)
"""Tried in this order: narrow heads are fast, but some families have settings that fit their own width only (`None`;
Phi-3's rope factors)."""
MIN_POSITIONS = 64
"""The checks' texts are shorter."""
LAYERS = (2, 3, 4, 6, 8, 12)
MAX_SIZES = {"window": 2, "window_size": 2, "chunk_size": 2, "experts": 4, "experts_per_tok": 2, "topk": 2, "_group": 1}
"""Upper limits of settings, by the end of their names."""
LOGITS_STD = 1.2
"""Standard deviation of the logits: the distribution is far from uniform, but no token is too rare to be drawn."""


class NotShrunkError(ValueError):
    """No tiny model of this family could be made."""


def tiny_model(config: PreTrainedConfig, vocabulary: int, seed: int) -> PreTrainedModel:
    """A model of `config`'s family, with the fewest layers that include every kind of layer.

    Args:
        config: the config of a causal language model of any size.
        vocabulary: number of tokens; the first one ends a completion.
        seed: seed of the random weights.

    Raises:
        NotShrunkError: if it cannot be made; the message says why.
    """
    small = _smallest(config.get_text_config(), vocabulary)
    torch.manual_seed(seed)
    model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(small)).eval()
    # A family's own initialization can make all logits equal, or one token certain.
    rows, weight = torch.randint(vocabulary, (64, 6)), model.get_output_embeddings().weight
    with torch.no_grad():
        for _ in range(3):  # once is not enough where a family caps its logits
            std = model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits.float().std(-1).mean().item()
            weight.mul_(min(max(LOGITS_STD / std, 0.01), 100.0))
    return model


def _smallest(config: PreTrainedConfig, vocabulary: int) -> PreTrainedConfig:
    """The config with the fewest layers of which a model can be made and run, and has every kind of layer."""
    problem = f"{LAYERS[-1]} layers do not include every kind of layer"
    for head_dim in HEAD_DIMS:
        try:
            with torch.device("meta"):
                kinds = _kinds(AutoModelForCausalLM.from_config(_shrunk(config, vocabulary, None, head_dim)))
            for layers in LAYERS:
                small = _shrunk(config, vocabulary, layers, head_dim)
                model = AutoModelForCausalLM.from_config(small)
                if _kinds(model) == kinds:
                    ids = torch.zeros(1, 3, dtype=torch.long)
                    model(input_ids=ids, attention_mask=torch.ones_like(ids))
                    return small
        except Exception as error:  # a family can fail in any way for sizes that it was not written for
            problem = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    raise NotShrunkError(f"no tiny model of type {config.model_type} could be made ({problem})")


def _kinds(model: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in model.modules()}


def _shrunk(config: PreTrainedConfig, vocabulary: int, layers: int | None, head_dim: int | None) -> PreTrainedConfig:
    """`config` with `layers` layers (`None`: all), few heads, experts and tokens, and short windows; widths follow."""
    heads, width, depth = getattr(config, "num_attention_heads", 1), config.hidden_size, config.num_hidden_layers
    head_dim = head_dim or getattr(config, "head_dim", None) or width // heads
    values = {name: value for name, value in copy.deepcopy(config).to_dict().items() if "quantization" not in name}
    positions = type(config).attribute_map.get("max_position_embeddings", "max_position_embeddings")
    kept, numbers = _layers_to_keep(values, depth, layers or depth), list(range(depth))
    for name, value in values.items():
        if isinstance(value, list) and len(value) == depth:
            values[name] = numbers[: len(kept)] if value == numbers else [value[layer] for layer in kept]
        elif not isinstance(value, int) or isinstance(value, bool):
            continue
        elif value == config.vocab_size and "vocab" in name:  # before widths and positions, which may be as many
            values[name] = vocabulary
        elif name == positions:
            values[name] = max(value, MIN_POSITIONS)
        elif value == width:
            values[name] = HEADS * head_dim
        elif any(part in name for part in ("intermediate", "ffn", "inner")):
            values[name] = max(64, 64 * round(value * HEADS * head_dim / width / 64))  # 4-bit layers need that
        else:
            values[name] = min([value, *(size for end, size in MAX_SIZES.items() if name.endswith(end))])
    grouped = getattr(config, "num_key_value_heads", heads) not in (None, heads)
    std = (HEADS * head_dim) ** -0.5  # the usual 0.02 is for wide models
    sizes = {"num_hidden_layers": len(kept), "num_attention_heads": HEADS, "head_dim": head_dim}
    sizes |= {"num_key_value_heads": 1 if grouped else HEADS, "initializer_range": std, "init_std": std}
    for name, size in sizes.items():
        own_name = type(config).attribute_map.get(name, name)
        if values.get(own_name) is not None:
            values[own_name] = size
    tokens = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": PAD}
    return cast(PreTrainedConfig, type(config).from_dict(values | tokens))


def _layers_to_keep(values: dict[str, Any], depth: int, layers: int) -> list[int]:
    """The first layer of each kind that the config lists, and further layers in order, up to `layers` in all."""
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == depth]
    lists = [value for value in lists if value != list(range(depth))]  # lists of layer numbers are no kinds
    kinds = [str(kind) for kind in zip(*lists, strict=True)] or [""] * depth
    first = {kinds.index(kind) for kind in kinds}
    others = [layer for layer in range(depth) if layer not in first]
    return sorted([*first, *others[: max(0, layers - len(first))]])
