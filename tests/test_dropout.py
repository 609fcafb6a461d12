"""Dropout, under whatever name a model keeps its rates: all of it turned off, or an error."""

import peft
import pytest
import torch
from conftest import EOS, VOCABULARY, ALDRIFTTrainer, count_a, lora, tiny_gpt2, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    BloomConfig,
    FalconConfig,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    MixtralConfig,
    OPTConfig,
    XGLMConfig,
)

from aldrift_hf.models.dropout import has_dropout, without_dropout

TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": 1}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3, **TOKENS}
EXPERTS = {"num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size": 32}
CONFIGS = {
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16, init_std=0.3, dropout=0.5),
    "opt, skipped layers": lambda: OPTConfig(
        **SIZES, ffn_dim=32, word_embed_proj_dim=16, init_std=0.3, dropout=0.0, layerdrop=0.9
    ),
    "bloom": lambda: BloomConfig(**SIZES, hidden_dropout=0.5),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, intermediate_size=32, hidden_dropout=0.5),
    "gpt_bigcode": lambda: GPTBigCodeConfig(**TOKENS, n_embd=16, n_layer=2, n_head=2, attn_pdrop=0.5),
    "xglm": lambda: XGLMConfig(**TOKENS, d_model=16, num_layers=2, attention_heads=2, ffn_dim=32, dropout=0.5),
    "biogpt": lambda: BioGptConfig(**SIZES, intermediate_size=32, attention_probs_dropout_prob=0.5),
    "mixtral, jitter": lambda: MixtralConfig(**SIZES, **EXPERTS, router_jitter_noise=0.5),
}
MODELS = {
    "gpt2": lambda: tiny_gpt2(dropout=0.5),
    "llama": lambda: tiny_llama(dropout=0.5),
    "lora": lambda: lora(tiny_gpt2(), dropout=0.5, seed=1),
    **{
        f"loha, {name}": lambda name=name: peft.get_peft_model(
            tiny_llama(),
            peft.LoHaConfig(
                task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_weights=False, **{name: 0.5}
            ),
        )
        for name in ("rank_dropout", "module_dropout")
    },
    **{name: lambda make=make: AutoModelForCausalLM.from_config(make()) for name, make in CONFIGS.items()},
}


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[2, 3, 4, 2]])).logits


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_what_is_trained_is_what_is_scored(make):
    torch.manual_seed(0)
    model = make()
    exact = logits(model.eval())
    model.train()
    assert has_dropout(model)
    assert any(not torch.equal(logits(model), exact) for _ in range(5)), "it has no effect: the test shows nothing"
    without_dropout(model)
    assert not has_dropout(model)
    assert torch.equal(logits(model), exact)


def test_what_cannot_be_turned_off_is_an_error_where_it_matters(config, tokenizer):
    """Falcon's layers ask their config."""

    def trainer(loss):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FalconConfig(**SIZES, hidden_dropout=0.5))
        settings = config(sampler="archive", loss_type=loss)
        return ALDRIFTTrainer(model, count_a, settings, processing_class=tokenizer)

    trainer("nll")
    with pytest.raises(ValueError, match="drops something at random that could not be turned off"):
        trainer("generalized_kl")


def test_the_check_leaves_the_modes(config, tokenizer):
    model = tiny_llama(dropout=0.5).eval()
    trainer = ALDRIFTTrainer(model, count_a, config(sampler="archive", loss_type="generalized_kl"),
                             processing_class=tokenizer)  # fmt: skip
    assert not any(module.training for module in trainer.model.modules())
    assert not has_dropout(trainer.model)
