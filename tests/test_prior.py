"""The prior is exactly the model that was passed in, before training and after."""

import copy

import pytest
import torch
from conftest import (
    EOS,
    ALDRIFTTrainer,
    count_a,
    every_completion,
    log_probs,
    lora,
    lora_config,
    perturb,
    tiny_gpt2,
    tiny_llama,
)
from peft import LoraConfig, PeftModel, PromptTuningConfig

from aldrift_hf.models import prior
from aldrift_hf.models.prior import base_model
from aldrift_hf.models.scoring import inference

pytestmark = pytest.mark.versions

MAKERS = {"gpt2": tiny_gpt2, "llama": tiny_llama}


def prior_scores(trainer):
    with inference(trainer.model), trainer.rollout.prior.active(trainer.model) as model:
        return log_probs(model, [EOS], every_completion())


@pytest.mark.slow
@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("kind", ["adapter-off", "peft-model", "full"])
def test_training_leaves_the_prior_alone(family, kind, config, tokenizer):
    """An edited in-memory model whose config names another one: what counts is what was passed in."""
    model = MAKERS[family]()
    model.config._name_or_path = "some/other-model"
    if kind == "peft-model":
        model = lora(model, seed=3)
    else:
        perturb(model, seed=4)
    before = log_probs(model, [EOS], every_completion())
    peft_config = lora_config(model) if kind == "adapter-off" else None
    trainer = ALDRIFTTrainer(model, count_a, config(), processing_class=tokenizer, peft_config=peft_config)
    assert torch.equal(prior_scores(trainer), before)
    assert torch.allclose(log_probs(base_model(trainer.model), [EOS], every_completion()), before, atol=1e-6)
    trainer.train()
    assert torch.equal(prior_scores(trainer), before)
    after = log_probs(base_model(trainer.model), [EOS], every_completion())
    assert (after - before).abs().max() > 0.1, "nothing was learnt: the test shows nothing"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter-off", "peft-model"])
def test_only_the_policys_adapter_is_trained(kind, config, tokenizer):
    model = tiny_gpt2()
    base = copy.deepcopy(model.state_dict())
    peft_config = lora_config(model) if kind == "adapter-off" else None
    if kind == "peft-model":
        model = lora(model, seed=3)
    trainer = ALDRIFTTrainer(model, count_a, config(), processing_class=tokenizer, peft_config=peft_config)
    trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name and ".default." in name for name in trainable)
    trainer.train()
    assert [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad] == trainable
    for name, tensor in base_model(trainer.model).state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, base[name.replace(".base_layer", "")]), name


def test_switching_comes_back_after_an_exception():
    model, frozen = prior.split(lora(tiny_gpt2(), seed=3), None)
    perturb(model, seed=9)
    before = log_probs(base_model(model), [EOS], every_completion())
    with pytest.raises(KeyError), frozen.active(model):
        raise KeyError
    assert model.active_adapters == ["default"]
    assert torch.equal(log_probs(base_model(model), [EOS], every_completion()), before)


@pytest.mark.slow
def test_an_adapter_loaded_for_inference_is_trained_on(config, tokenizer, tmp_path):
    """`PeftModel.from_pretrained` freezes what it loads; passed to the trainer, a copy is frozen and it is trained."""
    lora(tiny_gpt2(), seed=3).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "adapter")
    before = log_probs(model, [EOS], every_completion())
    trainer = ALDRIFTTrainer(model, count_a, config(), processing_class=tokenizer)
    assert torch.equal(prior_scores(trainer), before)
    trainer.train()
    assert (log_probs(base_model(trainer.model), [EOS], every_completion()) - before).abs().max() > 0.1


@pytest.mark.slow
def test_the_saved_adapter_holds_policy_and_prior(config, tokenizer, tmp_path):
    trainer = ALDRIFTTrainer(lora(tiny_gpt2(), seed=3), count_a, config(), processing_class=tokenizer)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    policy = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "saved")
    assert torch.equal(
        log_probs(policy, [EOS], every_completion()), log_probs(base_model(trainer.model), [EOS], every_completion())
    )
    kept = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "saved" / "prior")
    assert torch.equal(log_probs(kept, [EOS], every_completion()), prior_scores(trainer))


@pytest.mark.parametrize(
    ("peft_config", "message"),
    [
        (LoraConfig(task_type="CAUSAL_LM", bias="all", target_modules=["c_attn"]), "bias='none'"),
        (LoraConfig(task_type="CAUSAL_LM", init_lora_weights="pissa", target_modules=["c_attn"]), "rewrites the base"),
        (LoraConfig(task_type="CAUSAL_LM", init_lora_weights="OLoRA", target_modules=["c_attn"]), "rewrites the base"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "virtual tokens"),
        (LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn"]), "task_type='CAUSAL_LM'"),
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], alora_invocation_tokens=[3]), "Use LoRA"),
    ],
)
def test_adapters_that_cannot_be_switched_off_are_refused(peft_config, message, config, tokenizer):
    with pytest.raises(ValueError, match=message):
        ALDRIFTTrainer(tiny_gpt2(), count_a, config(), processing_class=tokenizer, peft_config=peft_config)


def test_a_frozen_copy_is_frozen():
    policy, copied = prior.split(tiny_gpt2(), None)
    with copied.active(policy) as module:
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert all(parameter.requires_grad for parameter in policy.parameters())


def test_ambiguous_adapters_are_refused():
    model = lora(tiny_gpt2())
    with pytest.raises(ValueError, match="peft_config is ambiguous"):
        prior.split(model, lora_config(tiny_gpt2()))
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        prior.split(model, None)
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="switched off"):
        prior.split(model, None)
    model.base_model.enable_adapter_layers()
    model.add_adapter("other", lora_config(tiny_gpt2()))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="2 active adapters"):
        prior.split(model, None)
