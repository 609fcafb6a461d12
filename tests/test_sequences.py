"""The scorer and the generator against enumeration: every way to get a sequence's log-probability subtly wrong."""

import math

import pytest
import torch
from conftest import (
    EOS,
    MAX_LENGTH,
    VOCABULARY,
    chi_square_p,
    every_completion,
    log_probs,
    lora,
    tiny_gpt2,
    tiny_llama,
)
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from aldrift_hf.proposals import assert_neutral, generate, neutral_generation_config, stream_seed
from aldrift_hf.sequences import Completions, completion_length, inference, join, sequence_logprobs

MODELS = {
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "gpt2-lora": lambda: lora(tiny_gpt2(), seed=1),
    "llama-lora": lambda: lora(tiny_llama(), seed=1),
}
PROMPTS = [[EOS], [2, 3], [4, 4, 2, 3, 1]]


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def neutral(length=MAX_LENGTH, eos=(EOS,), pad=EOS):
    return neutral_generation_config(max_completion_length=length, eos_token_ids=eos, pad_token_id=pad)


def base(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def by_hand(model, prompt, completion):
    """Token by token, without padding, batch or mask."""
    total = 0.0
    with torch.no_grad():
        for end in range(len(completion)):
            logits = model(input_ids=torch.tensor([[*prompt, *completion[:end]]])).logits[0, -1]
            total += logits.double().log_softmax(-1)[completion[end]].item()
    return total


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
def test_probabilities_sum_to_one(model, prompt):
    """Over completions that end and completions that are cut."""
    total = log_probs(model, prompt, every_completion()).exp().sum().item()
    assert total == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", ["gpt2-lora", "llama-lora"])
def test_probabilities_sum_to_one_with_the_adapter_off(name):
    model = MODELS[name]()
    with model.disable_adapter():
        off = log_probs(base(model), [EOS], every_completion())
    on = log_probs(model, [EOS], every_completion())
    assert off.exp().sum().item() == pytest.approx(1.0, abs=1e-6)
    assert (on - off).abs().max() > 0.1, "the adapter makes no difference: the test shows nothing"


def test_scores_are_those_of_single_steps(model):
    completions = every_completion()
    for prompt in PROMPTS:
        scores = log_probs(model, prompt, completions)
        for row in range(0, len(scores), 7):
            assert scores[row].item() == pytest.approx(by_hand(model, prompt, completions.tokens()[row]), abs=1e-5)


def test_padding_and_batch_size_change_nothing(model):
    """Prompts of different lengths in one batch, in batches of one, and beside other rows."""
    completions = every_completion()
    rows = list(range(0, len(completions.length), 5))
    picked = Completions(completions.ids[rows], completions.length[rows])
    prompts = [PROMPTS[row % 3] for row in rows]
    with inference(model):
        scores = [
            sequence_logprobs(model, prompts, picked, pad_token_id=pad, batch_size=size)
            for size, pad in ((64, EOS), (64, 3), (1, EOS), (3, EOS))
        ]
    alone = torch.tensor(
        [by_hand(model, prompt, picked.tokens()[row]) for row, prompt in enumerate(prompts)], dtype=torch.float64
    )
    for score in scores:
        assert torch.allclose(score, alone, atol=1e-5)


def test_wrong_positions_would_be_seen(model):
    """The trap itself: a left-padded row without position ids scores differently, so the test above is no formality."""
    plain = model(input_ids=torch.tensor([[2, 3, 4]])).logits[0, -1].log_softmax(-1)
    padded = (
        model(
            input_ids=torch.tensor([[0] * 6 + [2, 3, 4]]),
            attention_mask=torch.tensor([[0] * 6 + [1] * 3]),
            position_ids=torch.arange(9)[None],
        )
        .logits[0, -1]
        .log_softmax(-1)
    )
    if base(model).config.model_type == "gpt2":  # rotary positions are relative: Llama forgives a shift
        assert (plain - padded).abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_generation_draws_from_the_scored_distribution(model, seed):
    """Prompts of different lengths, so that generation pads on the left; each prompt's draws meet its own scores."""
    completions = every_completion()
    index = {tuple(tokens): row for row, tokens in enumerate(completions.tokens())}
    batch = [prompt for prompt in PROMPTS for _ in range(3000)]
    with inference(model):
        drawn = generate(base(model), batch, neutral(), seed)
    tokens = drawn.tokens()
    for number, prompt in enumerate(PROMPTS):
        rows = range(number * 3000, (number + 1) * 3000)
        counts = torch.tensor([index[tuple(tokens[row])] for row in rows]).bincount(minlength=len(index))
        assert chi_square_p(counts, log_probs(model, prompt, completions).exp()) > 1e-3


def test_a_checkpoints_generation_config_does_not_leak():
    """Every knob that a `generation_config.json` can carry, turned; the draws are the model's own all the same."""
    model = tiny_gpt2()
    own = GenerationConfig(
        do_sample=True,
        temperature=0.2,
        top_k=2,
        top_p=0.5,
        min_p=0.3,
        typical_p=0.5,
        epsilon_cutoff=0.05,
        repetition_penalty=3.0,
        no_repeat_ngram_size=1,
        bad_words_ids=[[2]],
        suppress_tokens=[3],
        min_new_tokens=2,
        forced_eos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    model.generation_config = own
    assert_neutral(model, [EOS], neutral())
    test_generation_draws_from_the_scored_distribution(model, 0)
    assert model.generation_config is own
    with torch.no_grad():
        processed = model.generate(
            input_ids=torch.tensor([[EOS]]),
            max_new_tokens=1,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
    assert not torch.equal(processed.scores[0], processed.logits[0]), "the knobs do nothing: the test shows nothing"


def test_a_bare_sampling_config_would_truncate():
    """Why it has to be neutral: left to itself, `generate` keeps the 50 likeliest tokens."""
    model = tiny_gpt2(vocab_size=200, initializer_range=0.02)
    output = model.generate(
        input_ids=torch.tensor([[EOS]]),
        generation_config=GenerationConfig(do_sample=True, max_new_tokens=1, pad_token_id=EOS),
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert output.scores[0].isfinite().sum() == 50
    assert_neutral(model, [EOS], neutral())


def test_a_processor_that_generate_adds_itself_is_refused():
    class Bias(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores + torch.arange(scores.shape[-1])

    model = tiny_gpt2()
    original = model._get_logits_processor
    model._get_logits_processor = lambda *args, **kwargs: LogitsProcessorList([*original(*args, **kwargs), Bias()])
    with pytest.raises(RuntimeError, match="changes the logits before it samples"):
        assert_neutral(model, [EOS], neutral())


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_dropout_is_off_and_the_modes_come_back(make):
    """Llama's attention dropout is no module, and LoRA brings its own: eval mode is what reaches all of them."""
    model = lora(make(dropout=0.5), dropout=0.5, seed=1)
    quiet = log_probs(model, [EOS], every_completion())
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.Dropout))
    frozen.eval()
    before = [module.training for module in model.modules()]
    assert torch.equal(log_probs(model, [EOS], every_completion()), quiet)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ZeroDivisionError), inference(model):
        1 / any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    noisy = model(input_ids=torch.tensor([[2, 3, 4]])).logits
    assert not torch.equal(noisy, model(input_ids=torch.tensor([[2, 3, 4]])).logits), "no dropout to switch off"


def test_log_softmax_is_in_fp32_whatever_the_model_is():
    """bf16 logits are taken as they are, but normalised in fp32: probabilities still sum to 1."""
    model = tiny_gpt2().to(torch.bfloat16)
    completions = every_completion(length=1)
    scores = log_probs(model, [EOS], completions)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[EOS]])).logits[0, -1]
    exact = logits.double().log_softmax(-1)[completions.ids[:, 0]]
    assert torch.allclose(scores, exact, atol=1e-6)
    rounded = logits.log_softmax(-1)[completions.ids[:, 0]].double()
    assert (rounded - exact).abs().max() > 1e-4, "bf16 loses nothing here: the test shows nothing"


def test_length_counts_the_first_eos_and_never_the_padding():
    ids = torch.tensor([[2, 0, 0, 0], [2, 1, 0, 0], [0, 2, 2, 2], [2, 3, 2, 3]])
    assert completion_length(ids, [0]).tolist() == [2, 3, 1, 4]
    assert completion_length(ids, [0, 1]).tolist() == [2, 2, 1, 4]


def test_any_of_several_eos_tokens_ends_a_completion():
    model = tiny_gpt2()
    completions = every_completion(eos=(0, 1))
    probabilities = log_probs(model, [2], completions).exp()
    assert probabilities.sum().item() == pytest.approx(1.0, abs=1e-6)
    index = {tuple(tokens): row for row, tokens in enumerate(completions.tokens())}
    with inference(model):
        drawn = generate(model, [[2]] * 4000, neutral(eos=(0, 1)), 0)
    counts = torch.tensor([index[tuple(tokens)] for tokens in drawn.tokens()]).bincount(minlength=len(index))
    assert chi_square_p(counts, probabilities) > 1e-3


def test_padding_with_the_eos_token_is_not_taken_for_an_end():
    """A cut completion whose padding token is EOS keeps its full length, and an ended one does not grow."""
    model = tiny_gpt2()
    with inference(model):
        drawn = generate(model, [[2]] * 500, neutral(), 0)
    assert set(drawn.length.tolist()) == {1, 2, 3}
    for tokens in drawn.tokens():
        assert EOS not in tokens[:-1]
        assert len(tokens) == MAX_LENGTH or tokens[-1] == EOS


def test_draws_depend_on_their_seed_alone():
    model = tiny_gpt2()
    with inference(model):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = generate(model, [[2]] * 50, neutral(), 7)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        second = generate(model, [[2]] * 50, neutral(), 7)
        other = generate(model, [[2]] * 50, neutral(), 8)
    assert torch.equal(first.ids, second.ids)
    assert not torch.equal(first.ids, other.ids)


def test_streams_of_different_addresses_differ():
    seeds = [stream_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)] + [
        stream_seed(0),
        stream_seed(0, 1),
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_rows_are_joined_without_a_gap():
    padded = join([[4], [2, 3]], [[1, 2, 0], [3]], pad_token_id=9)
    assert padded.input_ids.tolist() == [[4, 1, 2, 0], [2, 3, 3, 9]]
    assert padded.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert padded.completion_mask.tolist() == [[False, True, True, True], [False, False, True, False]]


def test_scoring_never_holds_more_logits_than_its_budget(monkeypatch):
    from aldrift_hf import sequences

    model, seen = tiny_gpt2(), []
    forward = model.forward

    def watched(*args, **kwargs):
        output = forward(*args, **kwargs)
        seen.append(output.logits.numel())
        return output

    model.forward = watched
    unbounded = log_probs(model, [2], every_completion())
    assert max(seen) > 8 * VOCABULARY * 4
    seen.clear()
    monkeypatch.setattr(sequences, "LOGITS_BUDGET", 8 * VOCABULARY * 4)
    bounded = log_probs(model, [2], every_completion())
    assert max(seen) <= 8 * VOCABULARY * 4
    assert torch.allclose(bounded, unbounded, atol=1e-6)
    assert math.isclose(bounded.exp().sum().item(), 1.0, abs_tol=1e-6)
