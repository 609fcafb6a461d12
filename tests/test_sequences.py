"""The scorer and the generator against enumeration: every way to get a sequence's log-probability subtly wrong."""

import contextlib
import math
import threading

import pytest
import torch
from conftest import (
    EOS,
    MAX_LENGTH,
    VOCABULARY,
    every_completion,
    log_probs,
    lora,
    tiny_gpt2,
    tiny_llama,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from aldrift_hf.models.generation import assert_neutral, generate, neutral_generation_config
from aldrift_hf.models.head import projected_logprobs
from aldrift_hf.models.passes import join
from aldrift_hf.models.scoring import completion_length, inference, sequence_logprobs
from aldrift_hf.selftest.exact import chi_square_p
from aldrift_hf.streams import stream_seed, uniforms
from aldrift_hf.types import Completions

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


def draw(model, prompts, config=None, seed=0):
    config = config or neutral()
    return generate(model, prompts, config, uniforms((seed,), range(len(prompts)), config.max_new_tokens))


def log_probs_of(model, prompts, completions):
    with inference(model):
        return sequence_logprobs(model, prompts, completions, pad_token_id=EOS, batch_size=64)


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
        drawn = generate(base(model), batch, neutral(), uniforms((seed,), range(len(batch)), MAX_LENGTH))
    tokens = drawn.completions.tokens()
    for number, prompt in enumerate(PROMPTS):
        rows = range(number * 3000, (number + 1) * 3000)
        counts = torch.tensor([index[tuple(tokens[row])] for row in rows]).bincount(minlength=len(index))
        assert chi_square_p(counts, log_probs(model, prompt, completions).exp()) > 1e-3


@pytest.mark.slow
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
        drawn = draw(model, [[2]] * 4000, neutral(eos=(0, 1))).completions
    counts = torch.tensor([index[tuple(tokens)] for tokens in drawn.tokens()]).bincount(minlength=len(index))
    assert chi_square_p(counts, probabilities) > 1e-3


def test_padding_with_the_eos_token_is_not_taken_for_an_end():
    """A cut completion whose padding token is EOS keeps its full length, and an ended one does not grow."""
    model = tiny_gpt2()
    with inference(model):
        drawn = draw(model, [[2]] * 500).completions
    assert set(drawn.length.tolist()) == {1, 2, 3}
    for tokens in drawn.tokens():
        assert EOS not in tokens[:-1]
        assert len(tokens) == MAX_LENGTH or tokens[-1] == EOS


def test_draws_depend_on_their_rows_numbers_alone(model):
    """Not on the batch that they are drawn in, nor on any global random state."""
    prompts = [PROMPTS[row % 3] for row in range(60)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with inference(model):
        whole = draw(base(model), prompts, seed=7)
        parts = [
            generate(base(model), prompts[start:stop], neutral(), uniforms((7,), range(start, stop), MAX_LENGTH))
            for start, stop in ((0, 1), (1, 20), (20, 60))
        ]
        other = draw(base(model), prompts, seed=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.cat([part.completions.ids for part in parts]), whole.completions.ids)
    assert torch.allclose(torch.cat([part.log_probs for part in parts]), whole.log_probs, atol=1e-5)
    assert not torch.equal(other.completions.ids, whole.completions.ids)


def test_any_stretch_of_a_stream_can_be_had_alone():
    whole = uniforms((3, 1), range(100), 5)
    assert torch.equal(uniforms((3, 1), range(30, 70), 5), whole[30:70])
    assert whole.min() >= 0
    assert whole.max() < 1
    assert len(whole.unique()) == 500, "rows must not share numbers"
    assert not torch.equal(uniforms((3, 2), range(100), 5), whole)


@pytest.mark.parametrize("adapter", ["on", "off"])
def test_generation_knows_what_it_drew_with(model, adapter):
    """`log q` comes with the draws, and is the scorer's up to rounding: also where rows end at different lengths."""
    if adapter == "off" and not hasattr(model, "disable_adapter"):
        pytest.skip("no adapter")
    prompts = [PROMPTS[row % 3] for row in range(300)]
    with inference(model), model.disable_adapter() if adapter == "off" else contextlib.nullcontext():
        drawn = draw(base(model), prompts)
        scored = sequence_logprobs(base(model), prompts, drawn.completions, pad_token_id=EOS, batch_size=64)
    assert len(drawn.completions.length.unique()) == MAX_LENGTH
    assert torch.allclose(drawn.log_probs, scored, atol=1e-5)


def test_finished_rows_leave_the_batch(monkeypatch):
    """Half of the rows have ended: the rest goes on without them, from the cache that is there."""
    model, widths = tiny_gpt2(), []
    forward = model.forward

    def watched(*args, **kwargs):
        widths.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", watched)
    with inference(model):
        drawn = draw(model, [[2]] * 400, neutral(length=12))
    rows = [rows for rows, _ in widths]
    assert rows[0] == 400
    assert rows[-1] <= 200
    assert len(widths) == 12, "a prompt was computed again"
    assert all(tokens == 1 for _, tokens in widths)
    monkeypatch.undo()
    scored = log_probs_of(model, [[2]] * 400, drawn.completions)
    assert torch.allclose(drawn.log_probs, scored, atol=1e-5)


def test_a_token_is_as_likely_as_its_share_of_the_numbers():
    """Inverse transform, on a grid of numbers instead of random ones: every token's share to within one step."""
    from aldrift_hf.models.generation import _draw

    scores = torch.tensor([[0.0, -math.inf, 3.0, -9.0, 1.0]])
    grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    tokens, log_probs = _draw(scores.expand(len(grid), -1), grid)
    shares = tokens.bincount(minlength=5) / len(grid)
    assert torch.allclose(shares.double(), scores[0].double().softmax(0), atol=1e-5)
    assert shares[1] == 0
    assert torch.allclose(log_probs, scores[0].double().log_softmax(0)[tokens], atol=1e-6)
    last = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert _draw(scores, last)[0].item() == 4
    impossible = torch.tensor([[-math.inf, 0.0, 0.0]])
    assert _draw(impossible, torch.zeros(1, dtype=torch.float64))[0].item() == 1


def test_rare_tokens_do_not_vanish_beside_a_likely_one():
    """100,000 tokens of weight 1e-8 behind one of weight 1: in fp32 their sum would stay at 1."""
    from aldrift_hf.models.generation import _draw

    scores = torch.full((1, 100_001), math.log(1e-8))
    scores[0, 0] = 0.0
    rank = torch.tensor([1.0, 10.0, 1_000.0, 50_000.0, 99_999.0], dtype=torch.float64)
    total = 1 + 100_000 * 1e-8
    tokens, log_probs = _draw(scores.expand(5, -1), (1 + (rank - 0.5) * 1e-8) / total)
    assert ((tokens - rank).abs() <= 2 + 1e-4 * rank).all()
    assert torch.allclose(log_probs, torch.tensor(math.log(1e-8 / total), dtype=torch.float64), atol=1e-5)


def test_another_thread_may_run_the_model_meanwhile():
    """The scorer's hook is its own thread's: a cost that runs the model sees all of the model's logits."""
    model, shapes, threads = tiny_gpt2(), [], []
    ids = torch.tensor([[0, 2, 3, 4]])

    def other():
        with torch.no_grad():
            shapes.append(tuple(model(input_ids=ids[:, 1:]).logits.shape))

    def select(hidden):
        if not threads:
            threads.append(threading.Thread(target=other))
            threads[0].start()
            threads[0].join()
        return hidden[:, :-1].flatten(0, 1)

    with inference(model):
        found = projected_logprobs(model, select, ids[0, 1:], input_ids=ids)
    assert shapes == [(1, 3, model.config.vocab_size)]
    assert found.sum().item() == pytest.approx(by_hand(model, [0], [2, 3, 4]), abs=1e-5)


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


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


@pytest.mark.parametrize("make", [tiny_gpt2, lambda: lora(tiny_gpt2(vocab_size=1000), seed=1)])
def test_scoring_never_holds_more_logits_than_its_budget(monkeypatch, make):
    from aldrift_hf.models import head as projection

    model = make()
    vocabulary = base(model).config.vocab_size
    rows = torch.randint(1, vocabulary, (100, 7), generator=torch.Generator().manual_seed(0))
    completions = Completions(rows, torch.arange(100) % 7 + 1)
    whole = log_probs_of(base(model), [[2]] * 100, completions)
    budget = 9 * vocabulary
    monkeypatch.setattr(projection, "LOGITS_BUDGET", budget)
    largest_weight = max(parameter.numel() for parameter in model.parameters())
    with inference(model), _Largest() as seen:
        chunked = sequence_logprobs(
            base(model), [[2]] * 100, completions, pad_token_id=EOS, batch_size=100, batch_tokens=64
        )
    assert torch.allclose(chunked, whole, atol=1e-5)
    assert seen.elements <= max(budget, 64 * 4 * base(model).config.n_embd, largest_weight)
    monkeypatch.undo()
    with inference(model), _Largest() as seen:
        sequence_logprobs(base(model), [[2]] * 100, completions, pad_token_id=EOS, batch_size=100)
    assert seen.elements > 2 * budget, "all at once is no more: the test shows nothing"


def test_logits_changed_behind_the_output_embedding_are_seen(caplog):
    """A model that does to its logits what nobody knows of is scored from its own logits."""
    model = tiny_gpt2()
    plain = log_probs(model, [2], every_completion())
    other = tiny_gpt2()
    forward = other.forward

    def odd(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output

    other.forward = odd
    doubled = log_probs(other, [2], every_completion())
    assert doubled.exp().sum().item() == pytest.approx(1.0, abs=1e-6)
    assert (doubled - plain).abs().max() > 0.1
    assert "whole batches of logits" in caplog.text


class _RowByRow(TorchDispatchMode):
    """Products with the output embedding that take a batch row by row, each row with the weights of its own."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.products = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function is torch.ops.aten.bmm.default and args[1].shape[-1] == self.vocabulary
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_a_frozen_head_is_one_product_for_the_batch(make):
    """A prefill hands the head `hidden[:, -1:]`: strided, and with frozen weights a copy of them for every row."""
    model = make().requires_grad_(False)
    prompts = [[2, 3, 4], [3, 2], [2, 2, 2]] * 4
    with inference(model), _RowByRow(VOCABULARY) as seen:
        drawn = draw(model, prompts)
        log_probs_of(model, prompts, drawn.completions)
    assert not seen.products
    with inference(model), _RowByRow(VOCABULARY) as seen:
        model(input_ids=torch.tensor([[2, 3], [2, 4]]), logits_to_keep=1)
    assert seen.products, "the model's own way is no slower: the test shows nothing"


@pytest.mark.parametrize("ends", [EOS, VOCABULARY])
@pytest.mark.parametrize("positions", [7, 16])
def test_limits_cut_draws_and_nothing_else(positions, ends):
    """Each row is the beginning of what it would have been; none goes on beyond the positions that the model has, also
    where most rows of a batch go on (no token is called `VOCABULARY`)."""
    model = tiny_gpt2(n_positions=16)
    small = tiny_gpt2(n_positions=positions)
    small.load_state_dict(
        {name: tensor[:positions] if "wpe" in name else tensor for name, tensor in model.state_dict().items()}
    )
    length, config = 5, neutral(5, eos=(ends,))
    prompts = [[2, 3, 4, 1] if row % 8 == 0 else [2, 3][: 1 + row % 2] for row in range(40)]
    limits = [min(length, 7 - len(prompt)) for prompt in prompts]
    numbers = uniforms((0,), range(len(prompts)), length)
    with inference(model, small):
        whole = [generate(model, [p], config, numbers[r : r + 1]) for r, p in enumerate(prompts)]
        found = generate(small, prompts, config, numbers, limits)
        scores = sequence_logprobs(small, prompts, found.completions, pad_token_id=EOS, batch_size=64)
    expected = [draw.completions.tokens()[0][:limit] for draw, limit in zip(whole, limits)]
    assert found.completions.tokens() == expected
    assert torch.allclose(found.log_probs, scores, atol=1e-4)
    assert any(len(tokens) < length and EOS not in tokens for tokens in expected)


def test_several_limits_within_the_positions_that_a_model_has():
    """Rows end at three different times, in a batch that is too wide for the longest of them."""
    model, length = tiny_gpt2(n_positions=12), 10
    prompts, limits = [[2, 3, 4, 1, 2, 3, 4, 1, 2, 3], [2, 3, 4, 1, 2, 3], [2, 3]], [2, 6, 10]
    config = neutral(length, eos=(7,))  # no token is called so
    numbers = uniforms((0,), range(3), length)
    with inference(model):
        found = generate(model, prompts, config, numbers, limits)
        alone = [generate(model, [p], config, numbers[[r]], [limits[r]]) for r, p in enumerate(prompts)]
    assert found.completions.length.tolist() == limits
    assert found.completions.tokens() == [draw.completions.tokens()[0] for draw in alone]


def test_a_processor_that_begins_with_the_second_token_is_refused():
    class Later(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores + (input_ids.shape[1] > 1) * torch.arange(scores.shape[-1])

    model = tiny_gpt2()
    original = model._get_logits_processor
    model._get_logits_processor = lambda *args, **kwargs: LogitsProcessorList([*original(*args, **kwargs), Later()])
    with pytest.raises(RuntimeError, match="changes the logits before it samples"):
        assert_neutral(model, [EOS], neutral())
