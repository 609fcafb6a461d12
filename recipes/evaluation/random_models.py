"""Models of several sizes with random weights: their outputs are meaningless, but they take as long as trained ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from aldrift_hf.toy import word_tokenizer

END = 0
"""The end-of-text token, which is the first token of `word_tokenizer`."""


@dataclass(frozen=True)
class Size:
    """The size of a model, and of the batches that it generates.

    Attributes:
        config: returns the architecture for a size of the vocabulary.
        vocabulary: number of tokens in the vocabulary.
        dtype: data type of the weights.
        rows: number of completions generated at once.
    """

    config: Callable[[int], PreTrainedConfig]
    vocabulary: int
    dtype: torch.dtype
    rows: int


def _gpt2(**sizes: int) -> Callable[[int], PreTrainedConfig]:
    return lambda vocabulary: GPT2Config(vocab_size=vocabulary, bos_token_id=END, eos_token_id=END, **sizes)


def _llama(**sizes: int) -> Callable[[int], PreTrainedConfig]:
    return lambda vocabulary: LlamaConfig(vocab_size=vocabulary, bos_token_id=END, eos_token_id=END, **sizes)


SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
"""The shape of SmolLM2-135M, the real model of other recipes (`problems.real_model`)."""

SIZES = {
    "tiny": Size(_gpt2(n_embd=64, n_layer=2, n_head=4), 512, torch.float32, 512),
    "small": Size(
        _llama(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4
        ),
        8_192,
        torch.float32,
        128,
    ),
    # A narrow model with a large vocabulary, to measure the memory of scoring.
    "wide": Size(
        _llama(
            hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4
        ),
        128_256,
        torch.float32,
        64,
    ),
    "smollm2": Size(_llama(**SMOLLM2), 49_152, torch.float32, 128),
    "smollm2-bf16": Size(_llama(**SMOLLM2), 49_152, torch.bfloat16, 128),
    # The shape of Llama 3.2 with 1.2 billion parameters.
    "1b": Size(
        _llama(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
        128_256,
        torch.bfloat16,
        256,
    ),
    # The shape of Llama 3.1 with 8 billion parameters.
    "8b": Size(
        _llama(
            hidden_size=4096,
            intermediate_size=14_336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=8192,
        ),
        128_256,
        torch.bfloat16,
        256,
    ),
}
"""The sizes by name."""


def make_model(size: Size, length: int, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with random weights and its tokenizer.

    Args:
        size: the model's size.
        length: the mean number of tokens in a completion, set by an output bias of the end-of-text token.
        device: the model's device.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(size.config(size.vocabulary), dtype=size.dtype)
        width = model.config.get_text_config().hidden_size
        model.lm_head = nn.Linear(width, size.vocabulary, dtype=size.dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)  # logits near 0: all tokens but END are about equally likely
        model.lm_head.bias.zero_()
        model.lm_head.bias[END] = torch.tensor((size.vocabulary - 1) / (length - 1)).log()
    return model.eval(), make_tokenizer(size)


def make_tokenizer(size: Size) -> PreTrainedTokenizerBase:
    """A tokenizer with as many words as the model's vocabulary has."""
    return word_tokenizer([f"w{number}" for number in range(size.vocabulary - 2)], " ")
