"""A prompt that is computed once for its completions gives them the probabilities that they have by themselves."""

import pytest
import torch
from conftest import VOCABULARY, ALDRIFTTrainer, every_completion, lora_config, tiny_gpt2, tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import GraniteConfig, GraniteForCausalLM

from aldrift_hf.models import generation, head
from aldrift_hf.models.head import projecting
from aldrift_hf.models.passes import apart, join
from aldrift_hf.models.prior import base_model
from aldrift_hf.models.scoring import inference, learning_pass, sequence_logprobs
from aldrift_hf.models.shared_prompts import attention, cache, packing, support
from aldrift_hf.models.shared_prompts.attention import Layout, sharing
from aldrift_hf.streams import uniforms
from aldrift_hf.types import Completions

EOS = 0
PROMPTS = [[2, 3, 4, 3], [3, 1], [4, 2, 2]]
MODELS = {
    "gpt2": lambda: tiny_gpt2(n_positions=32),
    "llama": lambda: tiny_llama(max_position_embeddings=32),
    "grouped heads": lambda: tiny_llama(max_position_embeddings=32, num_attention_heads=4, num_key_value_heads=2),
    "products scaled in its own way": lambda: GraniteForCausalLM(
        GraniteConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            attention_multiplier=3.0,
            initializer_range=0.3,
            bos_token_id=EOS,
            eos_token_id=EOS,
            pad_token_id=None,
        )
    ),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]().eval()


def rows_of_all(completions):
    """Every prompt with every completion, in an order in which no prompt follows itself."""
    return [(prompt, completion) for completion in completions for prompt in PROMPTS]


def passes_counted(model, counts):
    """Count the tokens that go through the model's first layer."""
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    return layers[0].register_forward_hook(lambda module, args, output: counts.append(args[0].shape[:2].numel()))


@pytest.mark.slow
@pytest.mark.parametrize("batch_tokens", [2**14, 40])
def test_scores_are_those_of_each_row_alone(model, batch_tokens):
    rows = rows_of_all(every_completion().tokens())
    completions = Completions.of([completion for _, completion in rows], EOS)
    counts: list[int] = []
    with inference(model):
        support.can_share_prompts(model, 10)
        handle = passes_counted(model, counts)
        found = sequence_logprobs(
            model, [p for p, _ in rows], completions, pad_token_id=EOS, batch_size=1000, batch_tokens=batch_tokens
        )
        handle.remove()
        expected = torch.stack([log_prob(model, *row) for row in rows])
    assert torch.allclose(found, expected.double(), atol=2e-5)
    separate = sum(len(prompt) + len(completion) for prompt, completion in rows)
    assert sum(counts) < 0.75 * separate


@pytest.mark.parametrize("chunk", [1, 3, 128])
def test_a_packed_row_attends_in_blocks_of_any_size(model, chunk, monkeypatch):
    monkeypatch.setattr(attention, "MIN_CHUNK", chunk)
    rows = rows_of_all([[1], [4, 3, 2, 0], [1, 2], [3, 3, 3, 3, 3]])
    forward = packing.pack(*zip(*rows))
    with inference(model), sharing(model):
        logits = model(**forward.inputs).logits
        found = head.token_logprobs(forward.select(logits), forward.targets)
        expected = [log_prob(model, *row).item() for row in rows]
    assert forward.table(found).sum(-1).tolist() == pytest.approx(expected, abs=2e-5)


def test_blocks_cover_the_row_and_see_nothing_else():
    layout = Layout.of([(3, [2, 0, 4]), (2, [1])])
    assert [(b.tokens.start, b.tokens.stop) for b in layout.blocks] == [(0, 3), (3, 9), (9, 11), (11, 12)]
    mask = layout.blocks[1].mask()[0, 0]
    assert mask[:, :3].all()
    assert mask[:, 3:].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 1],
    ]


def weighted_gradient(model, log_probs):
    """The gradient of `Σ weight·log p`, where the weights are unlike each other."""
    model.zero_grad()
    (log_probs * torch.linspace(-1, 2, len(log_probs))).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("trained", ["adapter", "head", "all"])
def test_learning_has_the_gradients_of_rows_alone(model, trained, shared, checkpointing, monkeypatch):
    """Whatever is trained: through the prompt's keys and values, and through a head in chunks, frozen or not."""
    monkeypatch.setattr(head, "LOGITS_BUDGET", 3 * 5)  # three tokens at once
    rows = rows_of_all([[1], [4, 3, 2, 0], [1, 2], [3, 3, 0]])
    if trained != "all":
        settings = LoraConfig(
            target_modules=["lm_head"] if trained == "head" else "all-linear", init_lora_weights=False
        )
        model = get_peft_model(model, settings)
    base = base_model(model)
    with inference(base):  # what is known of it before it is trained
        assert support.can_share_prompts(base, 10)
        sequence_logprobs(base, [[2]], Completions.of([[1]], EOS), pad_token_id=EOS, batch_size=1)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    forward = learning_pass(base, join(*zip(*rows), EOS)) if shared else apart(join(*zip(*rows), EOS))
    assert (len(forward.inputs["input_ids"]) == 1) == shared
    with sharing(base):
        with projecting(base, forward.select, forward.targets) as projection:
            values = forward.table(projection.of(model(**forward.inputs).logits)).sum(-1)
        found = weighted_gradient(model, values)
    alone = torch.stack([log_prob(model, *row) for row in rows])
    assert torch.allclose(values, alone, atol=2e-5)
    expected = weighted_gradient(model, alone)
    assert found.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-4, rtol=1e-3), name


def log_prob(model, prompt, completion):
    """`log p(completion | prompt)`, from the logits of this row alone."""
    predicted = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return predicted.gather(-1, torch.tensor(completion)[:, None]).sum()


def test_a_packed_pass_outside_of_sharing_fails(model):
    forward = packing.pack(*zip(*rows_of_all([[1, 2], [3, 0]])))
    with inference(model), pytest.raises(Exception, match=r"."):
        model(**forward.inputs)


@pytest.mark.slow
@pytest.mark.parametrize("half_of_the_rows", [False, True])
def test_draws_are_those_of_separate_prompts(model, half_of_the_rows, monkeypatch):
    """The same tokens and log-probabilities, also after finished rows have left, and with prompts of unequal length."""
    long = [[2, 3, 4, 3, 1, 2, 4] * 2, [3, 1, 4], [4]]
    monkeypatch.setattr(cache, "MIN_PROMPT", 2)
    monkeypatch.setattr(generation, "MIN_ROWS_TO_SPLIT", 2 if half_of_the_rows else 10**9)
    prompts = [long[row % 3] for row in range(60)]
    config = generation.neutral_generation_config(max_completion_length=6, eos_token_ids=[EOS, 1], pad_token_id=EOS)
    numbers = uniforms((0,), range(60), 6)
    used: list[int] = []
    attend = cache.SharedPrompts.attend
    monkeypatch.setattr(
        cache.SharedPrompts, "attend", lambda self, *args: used.append(len(args[1])) or attend(self, *args)
    )
    with inference(model):
        shared = generation.generate(model, prompts, config, numbers)
        assert used
        assert (min(used) < 60) == half_of_the_rows
        alone = [generation.generate(model, [prompts[r]], config, numbers[r : r + 1]) for r in range(60)]
    assert shared.completions.tokens() == [tokens for draw in alone for tokens in draw.completions.tokens()]
    assert torch.allclose(shared.log_probs, torch.cat([draw.log_probs for draw in alone]), atol=2e-5)


def test_models_that_cannot_share_prompts_compute_every_copy():
    eager = tiny_llama().eval()
    eager.config._attn_implementation = "eager"
    assert not support.can_share_prompts(eager, 10)
    windowed = tiny_llama().eval()
    windowed.config.sliding_window = 8
    assert support.can_share_prompts(windowed, 8)
    assert not support.can_share_prompts(windowed, 9)


def test_a_model_that_ignores_positions_is_found_out(monkeypatch):
    """Its packed row would have other probabilities, so that it is computed apart."""
    model = tiny_llama().eval()
    forward = model.model.rotary_emb.forward
    monkeypatch.setattr(
        model.model.rotary_emb,
        "forward",
        lambda states, position_ids: forward(states, torch.arange(states.shape[1])[None]),
    )
    with inference(model):
        assert not support.can_share_prompts(model, 10)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_cpu_learns_in_bf16_with_attention_in_fp32(monkeypatch, shared, autocast):
    """PyTorch's kernel takes several times as long in bf16 for the backward pass. Scores need none."""
    computed_in, kernel = [], attention._replaced

    def recorded(module, query, key, value, mask, **kwargs):
        output = kernel(module, query, key, value, mask, **kwargs)
        computed_in.append(output[0].dtype)
        return output

    monkeypatch.setattr(attention, "_replaced", recorded)
    model = tiny_llama(max_position_embeddings=32).to(torch.float32 if autocast else torch.bfloat16).eval()
    rows = join([PROMPTS[0]] * 3, [[2, 3, 4], [1, 2, 2], [4, 4, 0]], EOS)

    def scores(forward):
        with sharing(model), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return forward.table(head.projected_logprobs(model, forward.select, forward.targets, **forward.inputs))

    with inference(model):
        expected = scores(apart(rows))
    assert {*computed_in} == {torch.bfloat16}
    computed_in.clear()
    found = scores(learning_pass(model, rows) if shared else apart(rows))
    assert {*computed_in} == {torch.float32}
    found.sum().backward()
    assert torch.allclose(found, expected, atol=0.05)


def test_the_models_own_attention_is_back_afterwards(model):
    used = []

    def fails():
        used.append(model.config._attn_implementation)
        raise KeyError

    with pytest.raises(KeyError), sharing(model):
        fails()
    assert used == [attention.NAME]
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_a_run_learns_the_same_with_and_without_sharing(config, tokenizer, monkeypatch):
    """Draws, weights and updates of a whole run, to rounding."""

    learned_packed: list[bool] = []
    pack = packing.pack
    monkeypatch.setattr(packing, "pack", lambda *rows: learned_packed.append(torch.is_grad_enabled()) or pack(*rows))

    def run(max_share, min_prompt):
        monkeypatch.setattr(packing, "MAX_SHARE", max_share)
        monkeypatch.setattr(cache, "MIN_PROMPT", min_prompt)
        trainer = ALDRIFTTrainer(
            tiny_llama(),
            lambda prompts, completions: [min(1.0, len(text) / 20) for text in completions],
            config(num_rungs=2, num_generations=32, per_device_train_batch_size=16, updates_per_rung=3),
            train_dataset=["a b a b", "b a"],
            processing_class=tokenizer,
            peft_config=lora_config(tiny_llama()),
        )
        trainer.train()
        return trainer.record.rungs, [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]

    rungs, weights = run(0.8, 2)
    assert any(learned_packed)
    learned_packed.clear()
    other_rungs, other_weights = run(-1, 10**9)
    assert not learned_packed
    for rung, other in zip(rungs, other_rungs, strict=True):
        assert rung["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert rung["log_z"] == pytest.approx(other["log_z"], abs=1e-4)
    for one, other in zip(weights, other_weights, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
