"""A real chat model with a real tokenizer, chat template and 49,152 words: what small models cannot show."""

import contextlib
import math
from pathlib import Path

import pytest
import torch
from conftest import ALDRIFTTrainer
from peft import LoraConfig, get_peft_model
from problems.real_model import real_gguf, real_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from aldrift_hf.models.head import projected_logprobs
from aldrift_hf.models.passes import apart, join
from aldrift_hf.models.prior import base_model, keep_four_bit_weights
from aldrift_hf.models.prompts import encode_prompt
from aldrift_hf.models.scoring import inference, learning_pass, sequence_logprobs
from aldrift_hf.models.shared_prompts import support
from aldrift_hf.models.shared_prompts.attention import sharing

pytestmark = [pytest.mark.slow, pytest.mark.real_model]

CHAT = [{"role": "user", "content": "Write a one-sentence review of a restaurant."}]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def folder():
    try:
        return str(real_model())
    except OSError as error:
        pytest.skip(f"the real model cannot be made here: {error}")


@pytest.fixture(scope="module")
def gguf():
    try:
        return str(real_gguf())
    except OSError as error:
        pytest.skip(f"the real model cannot be downloaded here: {error}")


def long(prompts, completions):
    return [len(text) / 100 for text in completions]


def trainer_of(folder, config, dtype, **settings):
    args = config(
        num_rungs=1,
        num_generations=8,
        chain_length=1,
        sampler="archive",
        tau_step=None,
        tau_max=1.0,
        objective_range=2.0,
        max_completion_length=6,
        updates_per_rung=2,
        per_device_train_batch_size=4,
        learning_rate=1e-4,
        model_init_kwargs={"dtype": dtype},
        **settings,
    )
    return ALDRIFTTrainer(folder, long, args, train_dataset=[CHAT], peft_config=LoraConfig(**LORA))


def computes_in_bf16() -> bool:
    """Whether the CPU has instructions for it; without, a product takes six times as long as in fp32."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "amx_bf16" in flags or "avx512_bf16" in flags


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        pytest.param("bfloat16", marks=pytest.mark.skipif(not computes_in_bf16(), reason="a CPU without bf16")),
    ],
)
def test_a_rung_from_the_prior_to_the_first_updates(dtype, folder, config):
    trainer = trainer_of(folder, config, dtype)
    template = AutoTokenizer.from_pretrained(folder).apply_chat_template(CHAT, add_generation_prompt=True)
    assert trainer.inputs.prompts.token_ids == [list(getattr(template, "input_ids", template))]
    assert trainer.rollout.prior.is_start
    trainer.train()
    (rung,) = trainer.record.rungs
    assert abs(rung["kl_to_prior"]) < (1e-3 if dtype == "float32" else 0.3)
    assert math.isfinite(rung["loss"])
    assert len({draw["completion"] for draw in trainer.record.draws}) > 4
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    drawn = trainer.rollout.propose(trainer.inputs.prompts, 4, (1, 2))
    prompts = trainer.inputs.prompts.token_ids * 4
    with inference(plain):
        expected = sequence_logprobs(plain, prompts, drawn.completions, pad_token_id=0, batch_size=4)
    assert torch.allclose(drawn.log_prior.flatten(), expected, atol=1e-3 if dtype == "float32" else 0.5)
    with inference(trainer.model):
        moved = sequence_logprobs(base_model(trainer.model), prompts, drawn.completions, pad_token_id=0, batch_size=4)
    assert (moved - expected).abs().max() > 1e-3


def test_the_gguf_file_is_the_folders_model(folder, gguf, config):
    """The folder was made from the file, in fp16."""
    trainer = trainer_of(gguf, config, "float32")
    from_folder = AutoTokenizer.from_pretrained(folder)
    assert trainer.processing_class.chat_template == from_folder.chat_template
    assert trainer.processing_class.get_vocab() == from_folder.get_vocab()
    assert trainer.run.eos_token_ids == (from_folder.eos_token_id,)
    assert trainer.record.settings["base_model"] == gguf
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    ours, theirs = base_model(trainer.model).config.to_dict(), plain.config.to_dict()
    about_the_folder = {"dtype", "architectures", "_name_or_path", "transformers_version", "use_cache"}
    assert {key for key in theirs if ours.get(key) != theirs[key]} <= about_the_folder
    drawn = trainer.rollout.propose(trainer.inputs.prompts, 2, (1, 2))
    prompts = trainer.inputs.prompts.token_ids * 2
    with inference(plain):
        expected = sequence_logprobs(plain, prompts, drawn.completions, pad_token_id=0, batch_size=2)
    assert torch.allclose(drawn.log_prior.flatten(), expected, atol=0.05)  # weights rounded to fp16


def test_a_shared_prompt_in_four_bits_gives_the_scores_and_gradients_of_rows_alone(folder):
    """The prompt's keys and values, computed once, come from quantised layers."""
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    keep_four_bit_weights(model)
    policy = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False))
    base, tokenizer = base_model(policy), AutoTokenizer.from_pretrained(folder)
    prompt = encode_prompt(CHAT, 0, tokenizer)
    texts = [" The food was cold.", " A quiet place, with good bread and slow service.", " Never again!"]
    completions = tokenizer(texts)["input_ids"]

    def gradients(shared):
        policy.zero_grad()
        rows = join([prompt] * len(texts), completions, 0)
        forward = learning_pass(base, rows) if shared else apart(rows)
        with sharing(base) if shared else contextlib.nullcontext():
            scores = forward.table(projected_logprobs(base, forward.select, forward.targets, **forward.inputs)).sum(-1)
            (scores * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        return scores.detach(), gradient, forward.inputs["input_ids"].numel()

    with inference(policy):
        assert support.can_share_prompts(base, 10)
    (scores, gradient, tokens), (alone, expected, all_tokens) = gradients(True), gradients(False)
    assert tokens < 0.6 * all_tokens
    assert torch.allclose(scores, alone, atol=1e-3)
    assert (gradient - expected).norm() < 1e-3 * expected.norm()
