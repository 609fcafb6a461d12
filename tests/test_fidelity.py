"""The prior is what was passed in, and what is passed in can be trained: checked in numbers before a run."""

import copy

import peft
import pytest
import torch
from conftest import (
    EOS,
    ALDRIFTTrainer,
    count_a,
    every_completion,
    fuzz,
    log_probs,
    lora,
    lora_config,
    tiny_gpt2,
    tiny_llama,
)
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import FalconConfig, FalconForCausalLM

from aldrift_hf.models import fidelity, prior
from aldrift_hf.models.prior import base_model
from aldrift_hf.models.scoring import inference
from aldrift_hf.models.shared_prompts.attention import sharing
from aldrift_hf.toy import word_tokenizer

MAKERS = {"gpt2": tiny_gpt2, "llama": tiny_llama}
LAYERS = {
    "gpt2": ["c_attn", "c_proj", "c_fc", "wte", "lm_head", "ln_f"],
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj", "embed_tokens", "lm_head", "norm"],
}
CAUSAL = {"task_type": "CAUSAL_LM"}


def scores(model) -> torch.Tensor:
    return log_probs(model, [EOS], every_completion())


def policy_and_prior(trainer) -> tuple[torch.Tensor, torch.Tensor]:
    with inference(trainer.model):
        policy = scores(base_model(trainer.model))
        with trainer.rollout.prior.active(trainer.model) as model:
            return policy, scores(model)


def one_update(config, model, peft_config=None, **settings):
    args = config(num_rungs=1, updates_per_rung=1, num_generations=16, learning_rate=0.05, **settings)
    tokenizer = word_tokenizer(["a", "b", "c"], " ")
    return ALDRIFTTrainer(model, count_a, args, processing_class=tokenizer, peft_config=peft_config)


# ---- Any adapter -----------------------------------------------------------------------------------------------------


@st.composite
def lora_configs(draw, family: str):
    """Of any kind that PEFT offers, those included that change the base model or act in one place only."""
    layers = st.lists(st.sampled_from(LAYERS[family]), min_size=1, max_size=3, unique=True)
    options = {
        "r": draw(st.integers(1, 4)),
        "lora_alpha": draw(st.sampled_from([0, 1, 8])),
        "target_modules": draw(st.one_of(st.just("all-linear"), layers)),
        "lora_dropout": draw(st.sampled_from([0.0, 0.5])),
        "bias": draw(st.sampled_from(["none", "none", "all", "lora_only"])),
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
        "init_lora_weights": draw(st.sampled_from([True, False, "gaussian", "orthogonal", "pissa", "olora", "eva"])),
        "modules_to_save": draw(st.one_of(st.none(), layers)),
        "layers_to_transform": draw(st.sampled_from([None, None, [0], [1], [7]])),
        "trainable_token_indices": draw(st.sampled_from([None, None, [EOS, 2], [4]])),
        "layer_replication": draw(st.sampled_from([None, None, None, [(0, 2), (0, 2)]])),
        "alora_invocation_tokens": draw(st.sampled_from([None, None, None, [2]])),
        "inference_mode": draw(st.booleans()),
        "fan_in_fan_out": family == "gpt2",
        "task_type": draw(st.sampled_from(["CAUSAL_LM", "CAUSAL_LM", None, "SEQ_CLS"])),
    }
    return lambda: LoraConfig(**options)


@st.composite
def other_configs(draw, family: str):
    """Adapters that are not LoRA, with PEFT's defaults."""
    targets = {"target_modules": LAYERS[family][:3]}
    kinds = {
        "LoHaConfig": {"r": 2, **targets},
        "LoKrConfig": {"r": 2, **targets},
        "AdaLoraConfig": {"r": 2, "total_step": 10, **targets},
        "IA3Config": {"feedforward_modules": [], **targets},
        "OFTConfig": {"oft_block_size": 4, **targets},
        "VeraConfig": {"r": 2, **targets},
        "FourierFTConfig": {"n_frequency": 8, **targets},
        "HRAConfig": {"r": 2, **targets},
        "LNTuningConfig": {"target_modules": LAYERS[family][-1:]},
        "VBLoRAConfig": {"r": 2, "num_vectors": 16, "vector_length": 4, "topk": 2, **targets},
        "C3AConfig": {"block_size": 4, **targets},
        "ShiraConfig": {"r": 2, **targets},
        "TrainableTokensConfig": {"token_indices": [2, 3]},
        "PromptTuningConfig": {"num_virtual_tokens": 2},
        "PolyConfig": {"r": 2, **targets},
    }
    name = draw(st.sampled_from(sorted(kinds)))
    return lambda: getattr(peft, name)(**CAUSAL, **kinds[name])


@pytest.mark.slow
@fuzz(40)
@given(st.data())
def test_either_the_prior_stays_and_the_adapter_moves_or_it_is_refused(data):
    """Whatever PEFT offers: after one update the prior is what was passed in, and the policy is not what it was."""
    family = data.draw(st.sampled_from(sorted(MAKERS)))
    make_config = data.draw(st.one_of(lora_configs(family), other_configs(family)))
    model = MAKERS[family]()
    passed_in = scores(model)
    try:
        trainer = one_update(_config, model, make_config())
        start, at_once = policy_and_prior(trainer)
        starts_as_prior = trainer.rollout.prior.is_start
        trainer.train()
    except ValueError:
        return
    policy, afterwards = policy_and_prior(trainer)
    assert (at_once - passed_in).abs().max() <= 1e-6
    assert (afterwards - passed_in).abs().max() <= 1e-6
    assert (policy - start).abs().max() > 1e-6
    assert torch.equal(start, at_once) or not starts_as_prior


@pytest.fixture(autouse=True)
def _configured(config):
    """Hypothesis and function-scoped fixtures do not go together: one folder for all examples."""
    global _config
    _config = config


@pytest.mark.slow
def test_ordinary_adapters_are_not_refused(config):
    """What the test above would accept is refused nowhere in the ordinary range."""
    for family, make in MAKERS.items():
        fan = {"fan_in_fan_out": family == "gpt2"}
        for options in (
            {"target_modules": "all-linear"},
            {"target_modules": LAYERS[family][:2], "use_dora": True},
            {"target_modules": LAYERS[family][:2], "init_lora_weights": False},
            {"target_modules": LAYERS[family][:2], "modules_to_save": ["lm_head"]},
            {"target_modules": LAYERS[family][:2], "trainable_token_indices": [2]},
            {"target_modules": ["lm_head"]},
        ):
            trainer = one_update(config, make(), LoraConfig(**CAUSAL, **fan, **options))
            start, _ = policy_and_prior(trainer)
            trainer.train()
            assert (policy_and_prior(trainer)[0] - start).abs().max() > 1e-3, (family, options)


# ---- What a model has been through -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_that_has_been_through_a_trainer_is_refused(config):
    """A cell of a notebook that is run again: the layers of the first run are still in the model."""
    model = tiny_gpt2()
    one_update(config, model, lora_config(model)).train()
    other = LoraConfig(**CAUSAL, target_modules=["c_proj"], fan_in_fan_out=True)
    with pytest.raises(ValueError, match="adapter layers in it already"):
        one_update(config, model, other)
    with pytest.raises(ValueError, match="adapter layers in it already"):
        one_update(config, model)
    trainer = one_update(config, get_peft_model(tiny_gpt2(), lora_config(model)).unload(), other)
    assert {name.split(".")[-4] for name, p in trainer.model.named_parameters() if p.requires_grad} == {"c_proj"}


def test_a_transformers_adapter_inside_is_refused(config):
    model = tiny_gpt2()
    try:
        model.add_adapter(lora_config(model))
    except ValueError as error:  # transformers' own, for an older PEFT
        pytest.skip(str(error))
    with pytest.raises(ValueError, match="adapter layers in it already"):
        one_update(config, model, lora_config(model))


def test_base_weights_that_are_trained_too_are_refused(config, monkeypatch):
    """The prior of a PeftModel shares its base: a layer norm that its user has made trainable would move it."""

    def with_a_trainable_norm(model, peft_config):
        policy, kept = prior.split(model, peft_config)
        base_model(policy).transformer.ln_f.weight.requires_grad_(True)  # which some versions of PEFT undo
        return policy, kept

    monkeypatch.setattr(fidelity, "split", with_a_trainable_norm)
    model = lora(tiny_gpt2(), seed=3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="once trainable parameters have moved"):
        one_update(config, model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items() if name in before)


def test_biases_of_the_base_that_a_peft_model_trains_are_refused(config):
    options = LoraConfig(**CAUSAL, target_modules=["c_attn"], fan_in_fan_out=True, bias="all")
    with pytest.raises(ValueError, match="bias='none'"):
        one_update(config, get_peft_model(tiny_gpt2(), options))


def test_repeated_layers_are_refused(config):
    options = LoraConfig(**CAUSAL, target_modules=["q_proj"], layer_replication=[(0, 2), (0, 2)])
    with pytest.raises(ValueError, match=r"differ by .* nats\. Either the LORA adapter"):
        one_update(config, tiny_llama(), options)


def test_a_model_that_is_trained_as_another_one_than_is_scored_is_refused(config, monkeypatch):
    """As aLoRA would be: its layers act only when the whole model is called."""

    def scaled(model, factor):
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.scaling = dict.fromkeys(module.scaling, factor)

    def with_dependent_layers(model, peft_config):
        policy = get_peft_model(model, peft_config)
        scaled(policy, 0.0)

        def forward(*args, **kwargs):
            scaled(policy, 2.0)
            try:
                return type(policy).forward(policy, *args, **kwargs)
            finally:
                scaled(policy, 0.0)

        policy.forward = forward
        return policy

    monkeypatch.setattr(prior, "get_peft_model", with_dependent_layers)
    with pytest.raises(ValueError, match="another one when it is trained"):
        one_update(config, tiny_gpt2(), lora_config(tiny_gpt2()))


def test_an_adapter_with_which_the_model_cannot_be_run_is_refused(config):
    options = peft.PolyConfig(**CAUSAL, r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="with the POLY adapter 'default' the model cannot be run"):
        one_update(config, tiny_llama(), options)


def test_an_adapter_that_peft_cannot_make_is_refused_in_one_line(config):
    options = peft.LoHaConfig(**CAUSAL, r=2, target_modules=["c_attn"])
    with pytest.raises(ValueError, match="PEFT cannot put the LOHA adapter"):
        one_update(config, tiny_gpt2(), options)


def test_a_frozen_model_is_refused(config):
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        one_update(config, tiny_gpt2().requires_grad_(False))


@pytest.mark.slow
def test_a_saved_adapters_config_is_one_to_train(config):
    """PEFT writes inference_mode=True into every config that it saves; and the user's object is left alone."""
    saved = LoraConfig(**CAUSAL, target_modules="all-linear", fan_in_fan_out=True, inference_mode=True)
    before = copy.deepcopy(saved)
    trainer = one_update(config, tiny_gpt2(), saved)
    start, _ = policy_and_prior(trainer)
    trainer.train()
    assert (policy_and_prior(trainer)[0] - start).abs().max() > 1e-3
    assert saved == before


# ---- The check itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adapter-off", "peft-model", "full"])
def test_the_check_leaves_no_trace(kind, dtype, config):
    """Parameters, modes, random numbers and the user's objects are afterwards what they were."""
    model = tiny_llama(dropout=0.3).to(dtype)
    model = lora(model, seed=3) if kind == "peft-model" else model
    options = lora_config(tiny_llama()) if kind == "adapter-off" else None
    model.train()
    policy, kept = prior.split(copy.deepcopy(model), options)
    torch.manual_seed(5)
    checked, also_kept = fidelity.split_checked(model, copy.deepcopy(options))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        again, _ = prior.split(copy.deepcopy(model) if kind == "full" else policy, None) if kind == "full" else (0, 0)
        del again
    assert also_kept.is_start == kept.is_start
    assert also_kept.row_scores is not None
    assert [name for name, _ in checked.named_parameters()] == [name for name, _ in policy.named_parameters()]
    for (name, parameter), other in zip(checked.named_parameters(), policy.parameters(), strict=True):
        if "lora_A" not in name:  # drawn at random
            assert torch.equal(parameter, other), name
        assert parameter.requires_grad == other.requires_grad
        assert parameter.dtype == other.dtype
    assert checked.training


def test_the_check_draws_no_random_numbers(config):
    torch.manual_seed(5)
    get_peft_model(tiny_gpt2(), lora_config(tiny_gpt2()))
    expected = torch.rand(1)
    torch.manual_seed(5)
    model = tiny_gpt2()
    fidelity.split_checked(model, lora_config(model))
    assert torch.equal(torch.rand(1), expected)


def test_a_model_that_cannot_run_where_it_is_is_not_refused(config, caplog, monkeypatch):
    def only_on_an_accelerator(*args, **kwargs):
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(fidelity.Rows, "scores", only_on_an_accelerator)
    _, kept = fidelity.split_checked(tiny_gpt2(), lora_config(tiny_gpt2()))
    assert "could not be checked: no kernel for this device" in caplog.text
    assert kept.row_scores is None


def test_a_context_of_two_tokens_is_enough(config):
    fidelity.split_checked(tiny_gpt2(n_positions=2), lora_config(tiny_gpt2()))


# ---- Gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_gradient_of_zero_stops_the_first_update(config):
    options = LoraConfig(**CAUSAL, target_modules=["c_attn"], fan_in_fan_out=True, lora_alpha=0)
    trainer = one_update(config, tiny_gpt2(), options)
    with pytest.raises(ValueError, match="zero for every trainable parameter"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_gradient_that_checkpointing_loses_is_refused(config):
    """Reentrant checkpointing drops the gradient where a layer's input has none: so PEFT's frozen embeddings."""
    model = tiny_llama()
    policy, _ = prior.split(model, lora_config(model))
    fidelity.check_gradient(policy)
    base_model(policy).gradient_checkpointing_enable({"use_reentrant": True})
    policy.train()
    with pytest.raises(ValueError, match="use_reentrant"):
        fidelity.check_gradient(policy)
    base_model(policy).gradient_checkpointing_enable({"use_reentrant": False})
    fidelity.check_gradient(policy)


@pytest.mark.slow
def test_costs_that_are_all_the_same_have_a_gradient_of_zero_by_right(config, tokenizer):
    """Then all weights are equal, and with the archive's loss nothing pulls."""
    model = tiny_gpt2()
    args = config(num_rungs=1, updates_per_rung=2, sampler="archive", num_generations=16)
    trainer = ALDRIFTTrainer(
        model,
        lambda prompts, completions: [1.0] * len(completions),
        args,
        processing_class=tokenizer,
        peft_config=lora_config(model),
    )
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_model_that_is_trained_by_another_attention_is_refused_without_an_adapter_too(monkeypatch):
    """Falcon asks for its attention by name; without the name that it knows it sees later tokens."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 5, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = FalconForCausalLM(FalconConfig(**sizes, initializer_range=0.3, bos_token_id=0, eos_token_id=0))
    fidelity.split_checked(model, None)
    monkeypatch.setattr(fidelity, "sharing_if_known", sharing)
    with pytest.raises(ValueError, match=r"^the model is another one when it is trained .* Set another attn_impl"):
        fidelity.split_checked(model, None)
