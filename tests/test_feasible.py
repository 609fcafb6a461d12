"""A prior that keeps to rules: its probabilities are those of a model that never breaks them, however it is used."""

import itertools

import numpy as np
import pytest
import torch
from evaluation.baselines import drawing_config, drawn_texts
from evaluation.enumeration import text_log_probs
from problems.ehrlich import EhrlichProblem
from problems.feasible import with_rules
from problems.prior import RecipeModelConfig
from transformers import GPT2Config, GPT2LMHeadModel

from aldrift_hf.models.shared_prompts.cache import CACHE
from aldrift_hf.toy import completion_ids, word_tokenizer

PROBLEM = EhrlichProblem(states=7, length=4, motifs=1, size=3, function_seed=1, rules_known=True)
TOKENIZER = word_tokenizer(PROBLEM.words, PROBLEM.separator)
EVERY = [" ".join(states) for length in (1, 3, 4, 5) for states in itertools.product(PROBLEM.words, repeat=length)]


@pytest.fixture(scope="module")
def plain():
    """A model with random weights, far from uniform."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(TOKENIZER), n_positions=8, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def test_the_neighbours_of_the_data_are_those_that_are_feasible():
    allowed = PROBLEM.function.transitions > 0
    assert PROBLEM.neighbours == {(str(one), str(other)) for one, other in zip(*np.nonzero(allowed))}
    assert 0.5 < allowed.mean() < 1


def test_the_prior_is_the_model_where_no_rules_are_known(plain):
    assert EhrlichProblem(7, 4, 1, 3, 1).prior_from(plain, TOKENIZER) is plain


def test_all_of_the_probability_is_on_feasible_texts(plain):
    """That of each is the model's, where what breaks a rule is left out of each step."""
    model = PROBLEM.prior_from(plain, TOKENIZER)
    feasible = [text for text in EVERY if PROBLEM.is_feasible(text)]
    assert 500 < len(feasible) == PROBLEM.number_of_strings() < 2000
    log_probs = text_log_probs(feasible, model, TOKENIZER)
    assert np.exp(log_probs).sum() == pytest.approx(1, abs=1e-5)
    assert text_log_probs([text for text in EVERY if not PROBLEM.is_feasible(text)], model, TOKENIZER).max() < -5000
    for text, ids, log_prob in [*zip(feasible, completion_ids(feasible, TOKENIZER), log_probs)][::97]:
        with torch.no_grad():
            logits = plain(torch.tensor([[0, *ids[:-1]]])).logits[0].double()
        by_hand = 0.0
        for place, states in enumerate([PROBLEM.words, *map(followers, text.split(" ")[:-1])]):
            allowed = [ids[0] for ids in completion_ids(states, TOKENIZER)]
            by_hand += (logits[place, ids[place]] - logits[place, allowed].logsumexp(-1)).item()
        assert log_prob == pytest.approx(by_hand, abs=1e-4), text


def followers(state):
    """What may follow a state."""
    return [other for one, other in PROBLEM.neighbours if one == state]


def test_draws_and_losses_keep_to_the_rules(plain):
    """With a cache, where a pass sees one token, and with labels."""
    model = PROBLEM.prior_from(plain, TOKENIZER)
    drawn = drawn_texts(model, TOKENIZER, drawing_config(PROBLEM, TOKENIZER, RecipeModelConfig()), "", 2000, (0,))
    assert all(map(PROBLEM.is_feasible, drawn))
    assert len({*drawn}) > 100
    chance = np.exp(text_log_probs([drawn[0]], model, TOKENIZER)[0])
    assert drawn.count(drawn[0]) / 2000 == pytest.approx(chance, abs=4 * (chance / 2000) ** 0.5)
    (ids,) = completion_ids(drawn[:1], TOKENIZER)
    row = torch.tensor([[0, *ids]])
    loss = model(row, labels=row).loss.item()
    assert loss == pytest.approx(-np.log(chance) / len(ids), abs=1e-4)
    assert torch.equal(model(row, logits_to_keep=2).logits, model(row).logits[:, -2:])
    begun = model(row[:, :-1], use_cache=True)
    last = model(row[:, -1:], **{CACHE: begun[CACHE]}).logits  # places as GPT-2 counts them
    assert torch.allclose(last, model(row).logits[:, -1:], atol=1e-3)
    with torch.no_grad():
        by_generate = model.generate(torch.tensor([[0]] * 200), do_sample=True, max_new_tokens=6, pad_token_id=0)
    assert all(map(PROBLEM.is_feasible, TOKENIZER.batch_decode(by_generate, skip_special_tokens=True)))


def test_the_model_that_is_given_rules_is_left_alone(plain):
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    made = with_rules(plain, TOKENIZER, PROBLEM.words, PROBLEM.neighbours, 4)
    with torch.no_grad():
        made.transformer.h[0].attn.c_attn.weight.zero_()
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
