"""What the other tests see on the CPU, on a GPU: whole runs in fp32, bf16 and 4 bits."""

from importlib import util

import pytest
import torch
from conftest import EOS, ALDRIFTTrainer, count_a, every_completion, log_probs, tiny_llama
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from aldrift_hf.models.prior import base_model
from aldrift_hf.models.scoring import inference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU")]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("sampler", ["metropolis_hastings", "archive"])
def test_a_run_on_a_gpu(precision, sampler, config, tokenizer, tmp_path):
    """The prior stays what it was, draws meet their scores, and the model moves towards the target."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=5, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=16, initializer_range=0.2, bos_token_id=EOS,
            eos_token_id=EOS,
        )
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={"": 0}, quantization_config=quantization if precision == "nf4" else None
    )
    trainer = ALDRIFTTrainer(
        model,
        count_a,
        config(
            use_cpu=False,
            bf16=precision == "bf16",
            sampler=sampler,
            num_generations=256,
            per_device_generation_batch_size=None,
        ),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    )

    def scores(prior):
        with trainer.rollout.runtime.running(True), inference(trainer.model):
            if not prior:
                return log_probs(base_model(trainer.model), [EOS], every_completion())
            with trainer.rollout.prior.active(trainer.model) as prior_model:
                return log_probs(prior_model, [EOS], every_completion())

    before = scores(prior=True)
    trainer.train()
    assert next(trainer.model.parameters()).is_cuda
    assert torch.equal(scores(prior=True), before)
    log_q = scores(prior=False)
    assert log_q.exp().sum().item() == pytest.approx(1.0, abs=0.05 if precision == "bf16" else 1e-4)
    place = {tuple(tokens): row for row, tokens in enumerate(every_completion().tokens())}
    proposals = trainer.rollout.propose(trainer.inputs.prompts, 500, (9,))
    drawn = torch.stack([log_q[place[tuple(tokens)]] for tokens in proposals.completions.tokens()])
    tolerance = 0.1 if precision == "bf16" else 2e-3
    assert torch.allclose(proposals.log_model[0], drawn, atol=tolerance)
    assert proposals.objective.mean() < trainer.record.rungs[0]["objective_mean"]


@pytest.mark.skipif(util.find_spec("vllm") is None, reason="vLLM is in an environment of its own")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("full", [False, True])
def test_a_run_with_vllm_on_a_gpu(precision, full, config, tokenizer):
    """vLLM sleeps while the model learns, wakes up with its weights, and draws from the model up to rounding."""
    model = tiny_llama(hidden_size=64, initializer_range=0.15).to("cuda", getattr(torch, precision))
    settings = {"engine": "vllm", "engine_kwargs": {"gpu_memory_utilization": 0.1}, "use_cpu": False}
    args = config(num_generations=256, per_device_generation_batch_size=None, sampler="archive", **settings)
    lora = None if full else LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    trainer = ALDRIFTTrainer(model, count_a, args, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    first, last = trainer.record.rungs[0], trainer.record.rungs[-1]
    assert last["objective_mean"] < first["objective_mean"]
    assert last["engine/logprob_gap_std"] < (1e-3 if precision == "float32" else 0.2)
