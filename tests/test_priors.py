"""Priors made on the spot: tokenizer, fit, cache and adapters; and exact references by enumeration."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import lora_config, tiny_gpt2
from evaluation.enumeration import Enumeration, kl_divergence, total_variation
from peft import PeftModel
from problems.line_scheduling import LineSchedulingProblem
from problems.spanning_tree import SEPARATOR, SpanningTreeProblem, load_problem
from problems.warm_up import warm_up
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from aldrift_hf import toy
from aldrift_hf.models.prompts import encode_prompt
from aldrift_hf.models.scoring import inference, sequence_logprobs
from aldrift_hf.toy import END, UNKNOWN, SmallPriorConfig, completion_ids, small_prior, word_tokenizer
from aldrift_hf.types import Completions

SMALL = {"layers": 1, "width": 16, "heads": 2, "steps": 30, "batch_size": 16}
EDGES = [(0, 1), (1, 2), (2, 3), (0, 3), (0, 2)]  # a 4-cycle and a chord
PROBLEM = SpanningTreeProblem(list("abcd"), sorted(EDGES), [f"{'abcd'[a]}-{'abcd'[b]}" for a, b in sorted(EDGES)])
TEXTS = list(PROBLEM.all_texts())


def make(folder, draw=PROBLEM.random_texts, words=PROBLEM.names, **changes):
    return small_prior(words, SEPARATOR, draw, SmallPriorConfig(**{**SMALL, **changes}), cache_dir=folder)


def enumeration(tokenizer):
    return Enumeration.of(TEXTS, PROBLEM.cost_of, PROBLEM.worst_cost, tokenizer)


def no_fit(*args, **kwargs):
    raise RuntimeError("fitted")


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("separator", [", ", " ", " and ", ","])
@pytest.mark.parametrize("reloaded", [False, True], ids=["as made", "reloaded"])
def test_words_and_back(separator, reloaded, tmp_path):
    words = ["a-b", "sand", "n't", ".", "Éve-D", "land"]
    tokenizer = word_tokenizer(words, separator)
    if reloaded:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == len(words) + 2
    for chosen in ([0], [0, 1], [3, 2, 1, 0], [0, 0, 5, 4], list(range(6))):
        text = separator.join(words[index] for index in chosen)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == [index + 2 for index in chosen], "one token a word"
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
        assert completion_ids([text, text], tokenizer) == [[*ids, tokenizer.eos_token_id]] * 2
    assert tokenizer.eos_token == tokenizer.bos_token == END
    assert tokenizer(f"sand{END}", add_special_tokens=False)["input_ids"] == [3, tokenizer.eos_token_id]
    # A prompt is the beginning of a text, as the prior saw them: with the token that opens it.
    assert encode_prompt("", 0, tokenizer) == [tokenizer.bos_token_id]
    assert encode_prompt("sand", 0, tokenizer) == [tokenizer.bos_token_id, 3]


@pytest.mark.parametrize("reloaded", [False, True], ids=["as made", "reloaded"])
def test_words_without_a_separator(reloaded, tmp_path):
    """A text is cut into the longest words, whatever their order in the vocabulary."""
    words = ["C", "l", "Cl", "[C@H]", "(", ")", ".", " "]
    tokenizer = word_tokenizer(words, "")
    if reloaded:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text, expected in {
        "CCl": [0, 2],
        "C[C@H](Cl)lC": [0, 3, 4, 2, 5, 1, 0],
        "C.C l": [0, 6, 0, 7, 1],
        "": [],
    }.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == [index + 2 for index in expected]
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    ids = tokenizer("CxxC", add_special_tokens=False)["input_ids"]
    assert ids == [2, tokenizer.unk_token_id, 2]
    assert encode_prompt("Cl", 0, tokenizer) == [tokenizer.bos_token_id, 4]


def test_unknown_words():
    tokenizer = word_tokenizer(["a", "b"], ", ")
    ids = tokenizer("a, zebra, b", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[1] == UNKNOWN
    assert ids[1] == tokenizer.unk_token_id not in (ids[0], ids[2])
    whole = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert whole == [tokenizer.unk_token_id], "no word is cut into others"


@pytest.mark.parametrize("graph", ["florentine", "davis", "karate"])
def test_the_problems_own_words(graph):
    problem = load_problem(graph)
    tokenizer = word_tokenizer(problem.names, SEPARATOR)
    texts = problem.random_texts(20, np.random.default_rng(0))
    rows = completion_ids(texts, tokenizer)
    assert {len(row) for row in rows} == {problem.size + 1}
    assert tokenizer.batch_decode(rows, skip_special_tokens=True) == texts


def test_problems_that_hardly_differ_have_priors_of_their_own(tmp_path):
    """Eight draws of these two are the same; a thousand are not."""
    lines = [LineSchedulingProblem(stations=3, longest_visit=6, preference=preference) for preference in (2.0, 2.1)]
    draws = [line.random_texts(8, np.random.default_rng(0)) for line in lines]
    assert draws[0] == draws[1]
    for line in lines:
        small_prior(line.words, line.separator, line.random_texts, SmallPriorConfig(steps=1), tmp_path)
    assert len(list(tmp_path.glob("prior-*"))) == 2


def test_small_prior_is_made_once(tmp_path, monkeypatch):
    model, tokenizer = make(tmp_path)
    assert isinstance(model, GPT2LMHeadModel)
    assert not any(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (model.config.n_layer, model.config.n_embd, model.config.n_head) == (1, 16, 2)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.n_positions >= PROBLEM.size + 2
    assert model.config.eos_token_id == tokenizer.eos_token_id
    made = contents(tmp_path)
    assert len(made) == 1
    monkeypatch.setattr(toy, "fit", no_fit)
    again, _ = make(tmp_path)
    assert contents(tmp_path) == made
    assert same_weights(model, again)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / made[0])
    assert same_weights(model, reloaded)
    assert AutoTokenizer.from_pretrained(tmp_path / made[0])(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


def test_small_prior_is_the_same_anywhere(tmp_path):
    """Its randomness is its own: neither the global state nor the folder matter."""
    torch.manual_seed(1)
    first, _ = make(tmp_path / "a")
    torch.manual_seed(2)
    second, _ = make(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert same_weights(first, second)


@pytest.mark.slow
def test_a_change_makes_another_prior(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.setattr(toy, "fit", no_fit)
    changes = [{name: 2 * value} for name, value in SMALL.items()] + [{"seed": 1}, {"learning_rate": 1e-3}]
    changes.append({"draw": lambda count, rng: [TEXTS[0]] * count})
    changes.append({"words": [*PROBLEM.names, "e-f"]})
    for change in changes:
        with pytest.raises(RuntimeError, match="fitted"):
            make(tmp_path, **change)
    assert len(contents(tmp_path)) == 1, "a failed fit leaves nothing behind"
    monkeypatch.undo()
    make(tmp_path, seed=1)
    assert len(contents(tmp_path)) == 2


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "fit", no_fit)
    with pytest.raises(RuntimeError, match="fitted"):
        make(tmp_path)
    assert contents(tmp_path) == []
    monkeypatch.undo()
    make(tmp_path)
    assert len(contents(tmp_path)) == 1


def test_default_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("ALDRIFT_CACHE", str(tmp_path / "chosen"))
    make(None, steps=2)
    assert len(contents(tmp_path / "chosen")) == 1
    monkeypatch.delenv("ALDRIFT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make(None, steps=2)
    assert contents(tmp_path / "home" / ".cache" / "aldrift_hf") == contents(tmp_path / "chosen")


@pytest.mark.parametrize("cached", [False, True], ids=["made", "from the cache"])
def test_global_random_state_is_untouched(cached, tmp_path):
    if cached:
        make(tmp_path, steps=2)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    make(tmp_path, steps=2)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_batches_of_texts_of_near_length():
    def draw(count, rng):
        return ["x" * int(length) for length in rng.integers(1, 100, size=count)]

    drawn = draw(40, np.random.default_rng(0))
    batches = [*itertools.islice(toy._batches(draw, 10, 4, np.random.default_rng(0)), 4)]
    assert sorted(itertools.chain.from_iterable(batches)) == sorted(drawn), "each text of a draw is in one batch"
    spans = sorted((min(map(len, batch)), max(map(len, batch))) for batch in batches)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert spans != [(min(map(len, batch)), max(map(len, batch))) for batch in batches], "in random order"
    one_by_one = [*itertools.islice(toy._batches(draw, 10, 1, np.random.default_rng(0)), 2)]
    rng = np.random.default_rng(0)
    assert one_by_one == [draw(10, rng), draw(10, rng)]


def test_room_for_the_longest_text(tmp_path):
    model, _ = make(tmp_path, steps=1, longest=100)
    assert model.config.n_positions == 128
    with pytest.raises(
        ValueError, match=r"a text has \d+ tokens with its ends, and the model's context is 4: .* set longest"
    ):
        make(tmp_path / "short", steps=1, longest=2)


def test_a_word_is_there_once():
    with pytest.raises(ValueError, match="must be there once: got 'a' again"):
        word_tokenizer(["a", "b", "a"], " ")


@pytest.mark.slow
def test_small_prior_learns_the_local_rule(tmp_path):
    """Nearly all mass on well-formed strings, spread evenly, so that trees are as frequent as in the enumeration."""
    model, tokenizer = make(tmp_path, width=32, steps=250, batch_size=64, learning_rate=1e-2)
    strings = enumeration(tokenizer)
    log_p = strings.log_probs(model)
    assert math.exp(log_p[-1]) < 0.05
    uniform = np.append(np.full(len(TEXTS), 1 / len(TEXTS)), 0)
    assert total_variation(np.exp(log_p), uniform) < 0.1
    assert strings.success(log_p) == pytest.approx(np.mean(strings.cost == 0), abs=0.1)
    untrained, _ = make(tmp_path, width=32, steps=2, batch_size=32)
    assert math.exp(strings.log_probs(untrained)[-1]) > 0.5, "nothing to learn: the test shows nothing"


@pytest.fixture
def base_folder(tmp_path):
    """A model and tokenizer as someone would download them."""
    tokenizer = word_tokenizer(PROBLEM.names, SEPARATOR)
    save_base(tmp_path / "base", tokenizer, seed=0)
    return tmp_path / "base"


def save_base(folder, tokenizer, seed):
    model = tiny_gpt2(seed, vocab_size=len(tokenizer), initializer_range=0.1, n_layer=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def warmed_up(folder, cache, **changes):
    """A freshly loaded base, its weights before, and the model that `warm_up` made of it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"steps": 20, "batch_size": 16, "learning_rate": 2e-2, **changes}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return before, warm_up(
        model, tokenizer, PROBLEM.random_texts, lora_config(model, dropout=0.1), **settings, cache_dir=cache
    )


def mean_log_prob(model, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = completion_ids(TEXTS, tokenizer)
    with inference(model):
        scores = sequence_logprobs(
            model, [[tokenizer.bos_token_id]] * len(rows), Completions.of(rows, 0), pad_token_id=0, batch_size=64
        )
    return float(scores.mean())


def test_warm_up_fits_an_adapter(base_folder, tmp_path):
    before, fitted = warmed_up(base_folder, tmp_path / "cache")
    assert isinstance(fitted, PeftModel)
    trainable = {name for name, parameter in fitted.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in fitted.named_parameters() if "lora_" in name} != set()
    with fitted.disable_adapter():
        without = mean_log_prob(fitted, base_folder)
    assert without == pytest.approx(mean_log_prob(AutoModelForCausalLM.from_pretrained(base_folder), base_folder))
    assert mean_log_prob(fitted, base_folder) > without + 0.5
    base = fitted.unload().state_dict()
    assert base.keys() == before.keys()
    assert all(torch.equal(base[name], before[name]) for name in before), "bit for bit"


@pytest.mark.slow
def test_warm_up_is_cached(base_folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    _, first = warmed_up(base_folder, cache)
    made = contents(cache)
    assert len(made) == 1
    with monkeypatch.context() as patch:
        patch.setattr("problems.warm_up.fit", no_fit)
        _, second = warmed_up(base_folder, cache)
        assert contents(cache) == made
        assert same_weights(first, second)
        for change in ({"steps": 21}, {"batch_size": 8}, {"learning_rate": 1e-2}, {"seed": 1}):
            with pytest.raises(RuntimeError, match="fitted"):
                warmed_up(base_folder, cache, **change)
        assert contents(cache) == made, "a failed fit leaves nothing behind"
    assert any(parameter.requires_grad for parameter in second.parameters())
    _, other = warmed_up(base_folder, cache, seed=1)
    assert len(contents(cache)) == 2
    assert not same_weights(first, other)


def test_warm_up_of_other_weights_under_the_same_name(base_folder, tmp_path, monkeypatch):
    """A folder that was overwritten, or another revision of the same id, does not get the old adapter."""
    warmed_up(base_folder, tmp_path / "cache")
    save_base(base_folder, AutoTokenizer.from_pretrained(base_folder), seed=1)
    monkeypatch.setattr("problems.warm_up.fit", no_fit)
    with pytest.raises(RuntimeError, match="fitted"):
        warmed_up(base_folder, tmp_path / "cache")


@pytest.fixture(scope="module")
def exact():
    """The enumeration, and an untrained model's log-probabilities of its events."""
    tokenizer = word_tokenizer(PROBLEM.names, SEPARATOR)
    strings = enumeration(tokenizer)
    model = tiny_gpt2(1, vocab_size=len(tokenizer))
    return strings, model, strings.log_probs(model)


def test_log_probs_sum_to_one(exact):
    strings, model, log_p = exact
    assert log_p.shape == (len(TEXTS) + 1,)
    assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-9)
    tokenizer = strings.tokenizer
    for text, log_prob in zip(TEXTS, log_p):
        row = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert row[0] == tokenizer.bos_token_id
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0, :-1]
        by_hand = logits.log_softmax(-1).gather(-1, torch.tensor(row[1:])[:, None]).sum()
        assert log_prob == pytest.approx(float(by_hand), abs=1e-4)
    assert strings.log_probs(model, batch_size=3) == pytest.approx(log_p, abs=1e-5)


@pytest.mark.parametrize("tau", [0.0, 0.7, 6.0])
def test_target(exact, tau):
    strings, _, log_prior = exact
    cost = [*(PROBLEM.cost_of(text) for text in TEXTS), PROBLEM.worst_cost]
    weight = [math.exp(log_l) * math.exp(-tau * d) for log_l, d in zip(log_prior, cost)]
    target = strings.target(log_prior, tau)
    assert np.exp(target) == pytest.approx(np.array(weight) / sum(weight))
    if tau == 0:
        assert target == pytest.approx(log_prior)


def test_target_of_a_steep_ladder_is_finite(exact):
    strings, _, log_prior = exact
    target = strings.target(log_prior, 1e4)
    assert np.isfinite(target).all()
    assert strings.success(target) == pytest.approx(1)
    assert strings.mean_cost(target) == pytest.approx(0)


def test_success_and_mean_cost(exact):
    strings, _, log_p = exact
    trees = [math.exp(log_prob) for text, log_prob in zip(TEXTS, log_p) if PROBLEM.cost_of(text) == 0]
    assert len(trees) == 8
    assert strings.success(log_p) == pytest.approx(sum(trees))
    by_hand = sum(math.exp(log_prob) * PROBLEM.cost_of(text) for text, log_prob in zip(TEXTS, log_p))
    assert strings.mean_cost(log_p) == pytest.approx(by_hand + math.exp(log_p[-1]) * PROBLEM.worst_cost)


def test_draws_and_counts(exact):
    strings, _, log_p = exact
    draws = strings.draw(log_p, 20_000, np.random.default_rng(0))
    counts = strings.counts(draws)
    assert counts.shape == (len(TEXTS) + 1,)
    assert counts.sum() == 20_000
    p = np.exp(log_p)
    assert (np.abs(counts / 20_000 - p) <= 5 * np.sqrt(p * (1 - p) / 20_000) + 1e-9).all()
    assert set(draws) <= {*TEXTS, ""}
    assert strings.counts([TEXTS[2], "", TEXTS[2], "nonsense"]).tolist() == [0, 0, 2, *[0] * (len(TEXTS) - 3), 2]
    assert strings.counts([]).tolist() == [0] * (len(TEXTS) + 1)


def test_distances(exact):
    strings, _, log_prior = exact
    target = strings.target(log_prior, 2.0)
    assert kl_divergence(target, target) == 0
    assert kl_divergence(target, log_prior) > 1e-3
    assert kl_divergence(log_prior, target) > 1e-3
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.25, 0.5])
    assert total_variation(p, q) == total_variation(q, p) == 0.5
    assert total_variation(p, p) == 0
    assert kl_divergence(np.log(q), np.log([0.5, 0.25, 0.25])) == pytest.approx(
        0.25 * math.log(0.5) + 0.5 * math.log(2)
    )
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = np.log(rng.dirichlet(np.ones(6), 2))
        assert kl_divergence(a, b) >= 0
        assert total_variation(np.exp(a), np.exp(b)) <= math.sqrt(kl_divergence(a, b) / 2), "Pinsker"
