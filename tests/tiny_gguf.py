"""A tiny Llama in a GGUF file, as llama.cpp's converter would write it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

TOKENS = ["<|end|>", "Ġ", "a", "b", "ab"]
END = 0
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %} "
SHAPE = {
    "vocab_size": len(TOKENS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "bos_token_id": END,
    "eos_token_id": END,
}


def llama(seed: int = 0) -> LlamaForCausalLM:
    """Sharp enough that its distribution is far from uniform."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.3, pad_token_id=None)).eval()


def write(file: Path, model: LlamaForCausalLM, quantize: bool = False) -> None:
    """A model's weights, tokenizer and chat template; matrices in blocks of 8 bits, or all in fp32."""
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))  # 3: control
    writer.add_token_merges(["a b", "a b"])  # older versions of transformers trip over a single one
    writer.add_bos_token_id(END)
    writer.add_eos_token_id(END)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in _tensors(model):
        values = tensor.detach().float().numpy()
        if quantize and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: LlamaForCausalLM):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        part = name.split(".")[-2]
        if part in heads:  # llama.cpp turns pairs of neighbours, transformers the two halves of a head
            tensor = tensor.view(heads[part], 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        yield names.get_name(name, (".weight",)), tensor
