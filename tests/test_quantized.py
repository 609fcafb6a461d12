"""QLoRA on the CPU: bitsandbytes' NF4 under a Llama and under a GPT-2, whose weights are transposed (`Conv1D`)."""

import contextlib
import math

import pytest
import torch
from conftest import EOS, ALDRIFTTrainer, count_a, every_completion, log_probs, perturb
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig

from aldrift_hf.models.loading import check_trainable
from aldrift_hf.models.prior import base_model, keep_four_bit_weights
from aldrift_hf.models.scoring import inference
from aldrift_hf.selftest.exact import chi_square_p

pytestmark = pytest.mark.versions

bitsandbytes = pytest.importorskip("bitsandbytes")

TOKENS = {"vocab_size": 5, "initializer_range": 0.2, "bos_token_id": EOS, "eos_token_id": EOS}
CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=16, **TOKENS,
    ),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.0, **TOKENS),
}  # fmt: skip


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path, tokenizer):
    """A checkpoint in full precision, as it would come from the Hub."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param])
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def nf4():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def quantized(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4(), dtype=torch.float32)
    keep_four_bit_weights(model)
    return model


def adapter():
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


def prior_scores(trainer):
    with inference(trainer.model), trainer.rollout.prior.active(trainer.model) as model:
        return log_probs(model, [EOS], every_completion())


def test_the_base_is_really_in_four_bits(folder):
    model = quantized(folder)
    kinds = {type(module).__name__ for module in model.modules()}
    assert "Linear4bit" in kinds
    assert "Conv1D" not in kinds
    in_full = AutoModelForCausalLM.from_pretrained(folder)
    difference = log_probs(model, [EOS], every_completion()) - log_probs(in_full, [EOS], every_completion())
    assert difference.abs().max() > 1e-3


@pytest.mark.slow
def test_gradients_are_those_of_the_dequantized_model(folder, config, tokenizer):
    """After generation in eval mode, as in a run: on some CPUs bitsandbytes then loses the gradients of its layers."""
    gradients = []
    for model in (quantized(folder), quantized(folder).dequantize()):
        trainer = ALDRIFTTrainer(model, count_a, config(), processing_class=tokenizer, peft_config=adapter())
        perturb(trainer.model, seed=1, scale=0.1)
        trainer.sample(2)
        trainer.model.train()
        tokens = torch.tensor([[0, 2, 3, 4]])
        trainer.model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == len(gradients[1]) > 8
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_a_model_that_bitsandbytes_has_repacked_is_refused(folder, config, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4(), dtype=torch.float32)
    if not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules()):
        pytest.skip("a CPU without AVX512-BF16, on which nothing is repacked")
    before = log_probs(quantized(folder), [EOS], every_completion())
    used = log_probs(model, [EOS], every_completion())
    assert (used - before).abs().max() > 0.01, "repacking does no harm: there is nothing to refuse"
    with pytest.raises(ValueError, match="Load it again"):
        ALDRIFTTrainer(model, count_a, config(), processing_class=tokenizer, peft_config=adapter())


@pytest.mark.slow
def test_the_whole_life_of_a_run(folder, config, tokenizer, tmp_path):
    """By path with a quantisation config: train, evaluate, sample, save, load what was saved, resume."""
    arguments = {
        "model_init_kwargs": {"quantization_config": nf4()},
        "save_strategy": "epoch",
        "save_total_limit": None,
        "num_generations": 512,
        "learning_rate": 2e-3,
    }

    def make(name):
        run = config(output_dir=str(tmp_path / name), **arguments)
        return ALDRIFTTrainer(str(folder), count_a, run, peft_config=adapter())

    trainer = make("out")
    before = prior_scores(trainer)
    assert torch.equal(before, log_probs(quantized(folder), [EOS], every_completion()))
    assert before.exp().sum().item() == pytest.approx(1, abs=1e-5)
    trainer.train()
    assert torch.equal(prior_scores(trainer), before), "the prior moved"
    learnt = log_probs(base_model(trainer.model), [EOS], every_completion())
    assert (learnt - before).abs().max() > 0.05
    texts = tokenizer.batch_decode(every_completion().tokens(), skip_special_tokens=True)
    # Of 512 draws, the mean weight is the target's mass as far as its exact standard error goes.
    mass = (before - trainer.args.tau_max * torch.tensor(count_a([], texts))).exp()
    log_z = trainer.evaluate()["eval_log_z"]
    error = ((mass**2 / learnt.exp()).sum() / mass.sum() ** 2 - 1).sqrt() / 512**0.5
    assert math.exp(log_z) / mass.sum().item() == pytest.approx(1, abs=4 * error.item())
    # What is drawn in 4 bits is what is scored in 4 bits; the correction itself is tested elsewhere.
    names = sorted(set(texts))
    exact = torch.zeros(len(names), dtype=torch.float64)
    exact.index_add_(0, torch.tensor([names.index(text) for text in texts]), learnt.exp())
    drawn = torch.tensor([names.index(text) for text in trainer.sample(2000, chain_length=1)["completion"]])
    assert chi_square_p(drawn.bincount(minlength=len(names)), exact) > 1e-3

    trainer.save_model(str(tmp_path / "adapter"))
    assert not list((tmp_path / "adapter").glob("model*.safetensors")), "the base model was saved with the adapter"
    loaded = PeftModel.from_pretrained(quantized(folder), tmp_path / "adapter")
    assert torch.allclose(log_probs(base_model(loaded), [EOS], every_completion()), learnt, atol=1e-6)

    again = make("out")
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    for name, tensor in trainer.model.state_dict().items():
        if "lora_" in name:
            assert torch.equal(again.model.state_dict()[name], tensor), name


@pytest.mark.slow
def test_a_peft_model_on_it_has_a_second_frozen_adapter_as_its_prior(folder, config, tokenizer):
    policy = get_peft_model(quantized(folder), adapter())
    perturb(policy, seed=1, scale=0.1)
    passed_in = log_probs(base_model(policy), [EOS], every_completion())
    plain = log_probs(quantized(folder), [EOS], every_completion())
    assert (passed_in - plain).abs().max() > 0.01, "the adapter does nothing: the test shows nothing"
    trainer = ALDRIFTTrainer(policy, count_a, config(), processing_class=tokenizer)
    trainer.train()
    assert torch.equal(prior_scores(trainer), passed_in)
    assert (log_probs(base_model(trainer.model), [EOS], every_completion()) - passed_in).abs().max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["metropolis_hastings", "archive"])
def test_gradient_checkpointing_changes_nothing(folder, config, tokenizer, tmp_path, sampler):
    """Nor does it stay on where it would be in the way: cached generation between the updates."""
    adapters = []
    for on in (False, True):
        run = config(output_dir=str(tmp_path / str(on)), gradient_checkpointing=on, sampler=sampler)
        trainer = ALDRIFTTrainer(quantized(folder), count_a, run, processing_class=tokenizer, peft_config=adapter())
        trainer.train()
        assert trainer.model.is_gradient_checkpointing is on
        adapters.append({name: tensor for name, tensor in trainer.model.state_dict().items() if "lora_" in name})
    for name, tensor in adapters[0].items():
        assert torch.allclose(adapters[1][name], tensor, atol=1e-5), name


@pytest.mark.parametrize("by_name", [True, False])
def test_8_bits_with_outlier_columns_of_the_batch_are_refused(by_name):
    """Their log-probabilities would depend on later tokens; without outliers 8 bits are as good as any."""
    for threshold, message in ((6.0, "LLM.int8 chooses outlier columns by the whole batch"), (0.0, "")):
        how = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
        given = {"quantization_config": how.to_dict() if by_name else how}
        with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
            check_trainable(GPT2Config(), given, True)


def test_fine_tuning_in_full_is_refused(folder, config, tokenizer, monkeypatch):
    model = quantized(folder)
    monkeypatch.setattr(
        "aldrift_hf.models.loading.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("loaded")
    )
    nf4 = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    for given, kwargs in ((model, None), (str(folder), nf4)):
        with pytest.raises(ValueError, match=r"cannot be fine-tuned in full\. Pass a peft_config"):
            ALDRIFTTrainer(given, count_a, config(model_init_kwargs=kwargs), processing_class=tokenizer)
