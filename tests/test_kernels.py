"""cuDNN's attention, which builds a new plan for every shape, is left out wherever shapes change."""

import pytest
import torch
from conftest import ALDRIFTTrainer, count_a, tiny_llama
from peft import LoraConfig

from aldrift_hf.algorithm.samplers.kernels import systematic_resample
from aldrift_hf.models.kernels import attention_of_any_shape
from aldrift_hf.toy import fit


@pytest.fixture(params=[True, False])
def given(request):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(request.param)
    yield request.param
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_the_choice_is_given_back(given):
    with attention_of_any_shape():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == given
    with pytest.raises(KeyError), attention_of_any_shape():
        raise KeyError
    assert torch.backends.cuda.cudnn_sdp_enabled() == given


def test_priors_are_trained_without_it(tokenizer):
    model, found = tiny_llama(), set()
    model.register_forward_pre_hook(lambda *inputs: found.add(torch.backends.cuda.cudnn_sdp_enabled()))
    fit(model, tokenizer, lambda count, rng: ["a b"] * count, steps=2, batch_size=2, learning_rate=1e-3, seed=0)
    assert found == {False}
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_drawing_scoring_and_learning_do_without_it(config, tokenizer):
    """Also layers that checkpointing computes again in the backward pass."""
    model, found = tiny_llama(), {"draw or score": set(), "learn": set()}
    attention = [module for name, module in model.named_modules() if name.endswith("self_attn")]

    def look(module, *inputs):
        found["learn" if module.training else "draw or score"].add(torch.backends.cuda.cudnn_sdp_enabled())

    for module in attention:
        module.register_forward_pre_hook(look, with_kwargs=True)
    trainer = ALDRIFTTrainer(
        model,
        count_a,
        config(gradient_checkpointing=True),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
    )
    for seen in found.values():  # without what was looked at before the run
        seen.clear()
    trainer.train()
    trainer.sample(4)
    assert found == {"draw or score": {False}, "learn": {False}}
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_the_last_tooth_is_never_beyond_the_weights(monkeypatch):
    log_weight = next(
        w
        for seed in range(1000)
        for w in [torch.randn(1, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)]
        if w.softmax(-1).cumsum(-1)[0, -1] < 1 - 2**-53
    )
    monkeypatch.setattr(torch, "rand", lambda shape, **kwargs: torch.full(shape, 1 - 2**-53, dtype=torch.float64))
    assert systematic_resample(log_weight, 1, torch.Generator()).item() == 49
