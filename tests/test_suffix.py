"""`sampler="suffix"`: chains of a rung that redraw the ends of their texts, in a run of the trainer.

Their law, exactly: tests/test_exactness.py.
"""

import math

import pytest
import torch
from conftest import (
    EOS,
    ALDRIFTTrainer,
    count_a,
    every_completion,
    exact_kl,
    exact_target,
    log_probs,
    lora_config,
    pool_of,
    tiny_gpt2,
)

from aldrift_hf.algorithm.samplers import SuffixChains
from aldrift_hf.algorithm.samplers.suffix import suffix_chains
from aldrift_hf.selftest.exact import chi_square_p
from aldrift_hf.streams import generator
from aldrift_hf.types import Beginnings, Completions, Draws, Proposals


def trainer_of(settings, tokenizer, objective=count_a, **changes):
    model = tiny_gpt2()
    return ALDRIFTTrainer(
        model, objective, settings, processing_class=tokenizer, peft_config=lora_config(model), **changes
    )


class Rounded:
    """A model of texts of up to three of three tokens, of which 0 ends one; each is drawn with a rounding of its own.

    Its law is one of two tables, at random, and not that of `q`, which a scorer would have.

    Args:
        scored: whether tokens get their log-probability from the scorer.
    """

    def __init__(self, scored):
        self.chance, self.scored = generator(2), scored
        q = torch.randn((3, 3, 3, 3), generator=self.chance, dtype=torch.float64)  # by position and the tokens before
        error = 0.7 * torch.randn(q.shape, generator=self.chance, dtype=torch.float64)
        self.q, self.tables = q.log_softmax(-1), [(q + sign * error).log_softmax(-1) for sign in (1, -1)]
        self.texts = [(0,), *((a, 0) for a in (1, 2)), *((a, b, c) for a in (1, 2) for b in (1, 2) for c in range(3))]
        self.target = torch.rand(len(self.texts), generator=self.chance, dtype=torch.float64)

    def at_target(self, count):
        """Texts of the target, each token with a rounding of its own."""
        drawn = torch.multinomial(self.target, count, replacement=True, generator=self.chance).tolist()
        texts = [self.texts[row] for row in drawn]
        return self.proposals(
            [(text, [self.law(text[:n])[text[n]].item() for n in range(len(text))]) for text in texts]
        )

    def redraw(self, step, beginnings):
        draws = []
        for tokens, parts in zip(*beginnings):
            while len(tokens) < 3 and tokens[-1:] != [0]:
                law = self.law(tokens)
                token = int(torch.multinomial(law.exp(), 1, generator=self.chance))
                part = self.q[self.place(tokens)] if self.scored else law
                tokens, parts = [*tokens, token], [*parts, part[token].item()]
            draws.append((tokens, parts))
        return self.proposals(draws)

    def law(self, tokens):
        return self.tables[int(torch.randint(2, (), generator=self.chance))][self.place(tokens)]

    def place(self, tokens):
        return (len(tokens), *[*tokens, 0, 0][:2])

    def proposals(self, draws):
        completions = Completions.of([tokens for tokens, _ in draws], 0)
        log_q = torch.tensor([[*parts, 0.0, 0.0][:3] for _, parts in draws], dtype=torch.float64)
        log_p = self.target.log()[torch.tensor(self.events(completions))][None]
        zeros, rows = torch.zeros(log_p.shape, dtype=torch.float64), torch.zeros(len(draws)).long()
        return Proposals(rows, completions, zeros, log_p, log_q.sum(-1)[None], token_log_model=log_q)

    def events(self, completions):
        return [self.texts.index(tuple(tokens)) for tokens in completions.tokens()]


@pytest.mark.slow
@pytest.mark.parametrize("scored", [False, True])
def test_tokens_keep_the_probability_that_they_were_drawn_with(scored):
    """Then chains stay at the target whatever rounds; with a scorer's `log q` in its place they leave it."""
    model = Rounded(scored)
    last = suffix_chains(model.at_target(4000), 9, 1.0, model.redraw, generator(1)).pool
    counts = torch.tensor(model.events(last.completions)).bincount(minlength=len(model.texts))
    p = chi_square_p(counts, model.target / model.target.sum())
    assert p < 1e-6 if scored else p > 1e-2


def test_what_follows_a_beginning_is_put_behind_it():
    beginnings = Beginnings([[1, 2], []], [[-1.0, -2.0], []])
    rest = Draws(
        Completions(torch.tensor([[2, 9], [0, 9]]), torch.tensor([1, 1])), torch.tensor([[-3.0, 0], [-4.0, 0]])
    )
    whole = beginnings.continued(rest, 4, 7)
    assert whole.completions.ids.tolist() == [[1, 2, 2, 7], [0, 7, 7, 7]]
    assert whole.completions.length.tolist() == [3, 1]
    assert whole.token_log_probs.tolist() == [[-1, -2, -3, 0], [-4, 0, 0, 0]]
    assert rest.completions.length.tolist() == [1, 1], "untouched"
    assert beginnings.select(range(1, 2)) == ([[]], [[]])


@pytest.mark.slow
@pytest.mark.parametrize("ladder", [{}, {"ladder": "adaptive", "tau_step": None}])
def test_a_run_learns_the_target(ladder, config, tokenizer):
    """The exact KL(p_T‖q) falls, and log Z is that of the target."""
    log_p, log_z = exact_target(tokenizer)
    trainer = trainer_of(
        config(sampler="suffix", num_generations=512, updates_per_rung=20, per_device_train_batch_size=32, **ladder),
        tokenizer,
    )
    before = exact_kl(log_p, trainer.model)
    trainer.train()
    assert exact_kl(log_p, trainer.model) < 0.35 * before
    assert trainer.record.log_z[0] == pytest.approx(log_z, abs=0.15)
    assert trainer.record.settings["sampler"] == "suffix"


@pytest.mark.slow
def test_the_targets_figures_are_those_of_the_proposals(config, tokenizer):
    """Of draws that were moved no weights are made: mean cost and KL(p_τ‖L) are within 5 % of the enumeration."""
    completions = every_completion()
    log_prior = log_probs(tiny_gpt2(), [EOS], completions)
    cost = torch.tensor(count_a([], tokenizer.batch_decode(completions.tokens(), skip_special_tokens=True))).double()
    trainer = trainer_of(config(sampler="suffix", num_generations=16_384, tau_step=1.5), tokenizer)
    trainer.run.start()
    with trainer.objective.open():
        trainer.run.begin_rung()
    (rung,) = trainer.run.state.rungs
    log_p = (log_prior - 1.5 * cost).log_softmax(0)
    assert rung["target_objective_mean"] == pytest.approx((log_p.exp() @ cost).item(), rel=0.05)
    assert rung["target_kl_to_prior"] == pytest.approx((log_p.exp() @ (log_p - log_prior)).item(), rel=0.05)


def test_every_draw_and_every_call_is_counted(config, tokenizer):
    """The chains' further proposals too: of 2 prompts, 16 chains and 3 moves beside 64 proposals."""
    asked, tokens = [], []

    def cost(prompts, completions):
        asked.extend(zip(prompts, completions, strict=True))
        return count_a(prompts, completions)

    settings = config(sampler="suffix", max_completion_length=8, objective_range=8.0)
    trainer = trainer_of(settings, tokenizer, cost, train_dataset=["", "a b"])
    prompts = torch.tensor([len(ids) for ids in trainer.inputs.prompts.token_ids])
    propose = trainer.rollout.propose

    def watched(*args, **kwargs):
        drawn = propose(*args, **kwargs)
        tokens.append((drawn.completions.length + prompts[drawn.rows]).sum().item())
        return drawn

    trainer.rollout.propose = watched
    trainer.run.start()
    with trainer.objective.open():
        trainer.run.begin_rung()
    (rung,) = trainer.run.state.rungs
    assert rung["proposals"] == 2 * (64 + 3 * 16)
    assert rung["objective_calls"] == len(asked) == len(set(asked))
    assert len(tokens) == 4
    assert rung["num_tokens"] == sum(tokens)
    assert 0 < rung["acceptance_rate"] < 1
    assert 0 < rung["acceptance_rate_of_whole_texts"] < 1


def test_seconds_of_all_draws_are_added_up(config, tokenizer):
    trainer = trainer_of(config(sampler="suffix"), tokenizer)
    seconds = []
    propose = trainer.rollout.propose

    def watched(*args, **kwargs):
        drawn = propose(*args, **kwargs)
        seconds.append(dict(trainer.rollout.seconds))
        return drawn

    trainer.rollout.propose = watched
    trainer.run.start()
    with trainer.objective.open():
        trainer.run.begin_rung()
    assert len(seconds) == 4
    for name in seconds[0]:
        assert trainer.run.state.rungs[0][name] == pytest.approx(sum(each[name] for each in seconds))


def test_a_chosen_draw_keeps_its_columns(config, tokenizer):
    trainer = trainer_of(config(), tokenizer, train_dataset=["", "a b"])
    drawn = trainer.rollout.propose(trainer.inputs.prompts, 8, (1,))
    index = torch.randint(8, (2, 3), generator=generator(1))
    chosen = drawn.select(index)
    for prompt in range(2):
        for place, position in enumerate(index[prompt].tolist()):
            new, old = 3 * prompt + place, 8 * prompt + position
            assert chosen.texts[new] == drawn.texts[old]
            assert chosen.rows[new] == drawn.rows[old] == prompt
            assert chosen.completions.tokens()[new] == drawn.completions.tokens()[old]
            for name in ("objective", "log_prior", "log_model"):
                assert getattr(chosen, name)[prompt, place] == getattr(drawn, name)[prompt, position]


def test_suffix_draws_are_counted_beforehand():
    for n, length in ((64, 4), (24, 3), (7, 7), (10, 1)):
        assert SuffixChains(length).draws_for(n) == n + (n // length) * (length - 1)


def test_chains_that_never_leave_an_excluded_start_are_replaced():
    pool = pool_of(
        torch.zeros(1, 200, dtype=torch.float64), torch.tensor([[0.0, -math.inf] * 100], dtype=torch.float64)
    )
    moved = suffix_chains(pool, 1, 1.0, None, torch.Generator().manual_seed(0))
    chosen = moved.selection.index[0]
    assert (chosen % 2 == 0).all()
    assert chosen[::2].tolist() == [*range(0, 200, 2)]
