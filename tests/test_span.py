"""`sampler="span"`: chains that redraw a span in the middle of their texts and go on from rung to rung."""

import itertools
import math

import pytest
import torch
from conftest import (
    ALDRIFTTrainer,
    count_a,
    exact_kl,
    exact_target,
    lora_config,
    tiny_gpt2,
)

from aldrift_hf.algorithm.samplers import span
from aldrift_hf.algorithm.samplers.span import SpanChains, span_chains
from aldrift_hf.selftest.exact import chi_square_p
from aldrift_hf.streams import generator
from aldrift_hf.types import Completions, Proposals

LONGEST = 4
"""Most tokens of the table's texts."""
TAU = 1.5


class Table:
    """A model of texts of up to four of three tokens, of which 0 ends one, with a prior and costs at random.

    `q` of a token depends on all tokens before it, so that what follows a span has another `log q` behind another one.
    """

    eos_token_ids = (0,)

    def __init__(self, scale=0.6):
        self.scale, self.chance = scale, generator(2)
        self.texts = [*self.every(())]
        self.cost, noise = torch.rand((2, len(self.texts)), generator=self.chance, dtype=torch.float64)
        self.log_prior = noise.log_softmax(-1)
        self.target = (self.log_prior - TAU * self.cost).softmax(-1)
        self.asked, self.drawn = 0, 0
        self.learn(1)

    def learn(self, seed):
        """Another model `q`."""
        logits = torch.randn((LONGEST, *(3,) * LONGEST), generator=generator(seed), dtype=torch.float64)
        self.q = (self.scale * logits).log_softmax(-1)
        self.laws = self.q.exp().cumsum(-1)
        self.log_q = torch.zeros(len(self.texts), LONGEST, dtype=torch.float64)
        for row, text in enumerate(self.texts):
            for at, token in enumerate(text):
                self.log_q[row, at] = self.q[self.place(text[:at])][token]

    def every(self, text):
        for token in range(3):
            new = (*text, token)
            yield from [new] if token == 0 or len(new) == LONGEST else self.every(new)

    def place(self, before):
        return (len(before), *[*before, 0, 0, 0][: LONGEST - 1])

    def draw(self, before, most):
        new = []
        while len(new) < most and new[-1:] != [0]:
            share = torch.rand(1, generator=self.chance, dtype=torch.float64)
            new.append(min(2, int(torch.searchsorted(self.laws[self.place([*before, *new])], share))))
        return new

    def proposals(self, tokens):
        completions = Completions(
            torch.tensor([[*row, *[0] * (LONGEST - len(row))] for row in tokens]), torch.tensor([*map(len, tokens)])
        )
        events = self.events(completions)
        empty = torch.zeros(1, len(tokens), dtype=torch.float64)
        drawn = Proposals(torch.zeros(len(tokens)).long(), completions, self.cost[events][None],
                          self.log_prior[events][None], empty)  # fmt: skip
        drawn.token_log_model = self.token_log_prob(drawn)
        drawn.log_model = drawn.token_log_model.sum(-1)[None]
        return drawn

    def token_log_prob(self, proposals):
        return self.log_q[self.events(proposals.completions)]

    def fresh(self, count):
        return self.proposals([self.draw([], LONGEST) for _ in range(count)])

    def at_target(self, count):
        drawn = torch.multinomial(self.target, count, replacement=True, generator=self.chance).tolist()
        return self.proposals([self.texts[row] for row in drawn])

    def redraw(self, step, spans, screen):
        most = [max(width, 1) for width in spans.widths]
        draws = [self.draw(before, size) for before, size in zip(spans.tokens, most, strict=True)]
        filled = spans.filled(Completions.of(draws, 0), LONGEST, 0, self.eos_token_ids)
        proposed = self.proposals(filled.tokens())
        hidden, proposed.objective = proposed.objective, torch.full_like(proposed.objective, math.nan)
        asked = screen(proposed)
        proposed.objective[asked] = hidden[asked]
        self.asked, self.drawn = self.asked + int(asked.sum()), self.drawn + asked.numel()
        return proposed

    def events(self, completions):
        return torch.tensor([self.texts.index(tuple(tokens)) for tokens in completions.tokens()])

    def p(self, proposals, target=None):
        counts = self.events(proposals.completions).bincount(minlength=len(self.texts))
        return chi_square_p(counts, self.target if target is None else target)


@pytest.fixture(autouse=True)
def short_spans(monkeypatch):
    """Texts are short: wider spans would rarely fit."""
    monkeypatch.setattr(span, "MAX_WIDTH", 2)


def test_chains_that_start_at_the_target_stay_there():
    """At every step, for texts that end and for texts that are cut at the maximum; most moves are not evaluated."""
    table = Table(scale=1.2)
    start = table.at_target(4000)
    states, redrawn, rate = span_chains(start, 17, TAU, (0,), table.redraw, generator(1))
    assert table.p(states[0]) > 1e-2
    assert table.p(states[-1]) > 1e-2
    assert 0.02 < rate < 0.9
    assert moved_share(table, states) > 0.3, "chains that stay show nothing"
    assert 0 < table.asked < 0.6 * table.drawn
    assert sum(int(each.objective.isfinite().sum()) for each in redrawn) == table.asked
    assert all(bool(state.objective.isfinite().all()) for state in states)


@pytest.mark.parametrize("vocabulary", [(1, 2), (1,)])
def test_spans_of_tokens_from_a_vocabulary_keep_the_target(vocabulary):
    """Of both tokens that texts are made of, or of one of them alone: then a span with the other one stays."""
    table = Table(scale=1.2)
    start = table.at_target(4000)
    states, _, rate = span_chains(start, 17, TAU, (0,), table.redraw, generator(1), torch.tensor(vocabulary))
    assert table.p(states[-1]) > 1e-2
    assert 0.02 < rate < 0.9
    assert moved_share(table, states) > 0.2, "chains that stay show nothing"


def moved_share(table, states):
    return (table.events(states[0].completions) != table.events(states[-1].completions)).double().mean()


@pytest.mark.slow
def test_chains_that_start_elsewhere_reach_the_target():
    """From draws of the model, among the texts that end and among those that are cut, which no move joins."""
    table = Table()
    start = table.fresh(1500)
    cut = torch.tensor([text[-1] != 0 for text in table.texts])
    last = span_chains(start, 160, TAU, (0,), table.redraw, generator(1))[0][-1]
    share, mass = cut[table.events(start.completions)].double().mean(), (table.target * cut).sum()
    target = table.target * torch.where(cut, share / mass, (1 - share) / (1 - mass))
    assert table.p(start, target) < 1e-6
    assert table.p(last, target) > 1e-2


def one_rung(sampler, table, chains, chance):
    pool = sampler.pool(table.fresh(chains), table)
    return sampler.move(pool, sampler.select(pool, 0.0, TAU, 1, chance), TAU, table.redraw, chance)


@pytest.mark.slow
def test_chains_go_on_from_rung_to_rung():
    """Their states stay at the target while the model changes, each state is a sample, and a checkpoint has them."""
    table, sampler = Table(), SpanChains(4)
    chance = generator(3)
    one_rung(sampler, table, 1500, chance)
    stored = sampler._states.of(0)
    at_target = table.at_target(1500)
    stored.completions, stored.objective, stored.log_prior = (
        at_target.completions,
        at_target.objective,
        at_target.log_prior,
    )
    for seed in (4, 5):
        table.learn(seed)
        again = SpanChains(4)
        again.load_state_dict(sampler.state_dict())
        sampler = again
        moved = one_rung(sampler, table, 1500, chance)
        assert moved.selection.index.tolist() == [[*range(6000)]]
        for step in range(4):
            assert table.p(moved.pool.select(torch.arange(1500 * step, 1500 * (step + 1))[None])) > 1e-3
    assert (
        table.events(sampler._states.of(0).completions).tolist()
        == table.events(moved.pool.select(torch.arange(4500, 6000)[None]).completions).tolist()
    )
    assert 0 < sampler.metrics(moved.pool, TAU)["evaluated_moves"] < 0.7
    sampler.load_state_dict({})
    assert not sampler.state_dict()


def test_a_vocabulary_without_tokens_or_with_the_end_of_texts_is_refused():
    with pytest.raises(ValueError, match=r"has a token that ends a text: leave out \(0,\)"):
        SpanChains(4, [0, 1]).pool(Table().fresh(8), Table())
    with pytest.raises(ValueError, match="has no token to draw"):
        SpanChains(4, [])


def test_a_token_that_is_named_twice_is_drawn_as_often_as_others():
    """The acceptance ratio takes every token of the vocabulary to be equally likely."""
    assert SpanChains(4, [2, 1, 2]).vocabulary.tolist() == [1, 2]


def test_engines_that_round_are_refused():
    table = Table()
    drawn = table.fresh(8)
    drawn.as_scored = False
    with pytest.raises(ValueError, match=r"sampler='span' compares .* in fp32"):
        SpanChains(4).pool(drawn, table)


# ---- In a run of the trainer -----------------------------------------------------------------------------------------


def trainer_of(settings, tokenizer, objective=count_a, **changes):
    model = tiny_gpt2()
    return ALDRIFTTrainer(
        model, objective, settings, processing_class=tokenizer, peft_config=lora_config(model), **changes
    )


@pytest.mark.slow
def test_a_run_learns_the_target(config, tokenizer):
    """The exact KL(p_T‖q) falls, and log Z is that of the target."""
    log_p, log_z = exact_target(tokenizer)
    settings = config(sampler="span", num_generations=512, updates_per_rung=20, per_device_train_batch_size=32)
    trainer = trainer_of(settings, tokenizer)
    before = exact_kl(log_p, trainer.model)
    trainer.train()
    assert exact_kl(log_p, trainer.model) < 0.35 * before
    assert trainer.record.log_z[0] == pytest.approx(log_z, abs=0.15)


def test_every_call_is_counted_and_what_is_screened_is_not_evaluated(config, tokenizer):
    """On two rungs, of 48 chains for each of 2 prompts, one whole text and 3 moves each; scored as they stand."""
    asked, drawn = [], []

    def cost(prompts, completions):
        asked.extend(zip(prompts, completions, strict=True))
        return count_a(prompts, completions)

    settings = config(sampler="span", num_generations=192, max_completion_length=12, objective_range=12.0,
                      tau_max=12.0, tau_step=6.0)  # fmt: skip
    trainer = trainer_of(settings, tokenizer, cost, train_dataset=["", "a b"])
    propose = trainer.rollout.propose

    def watched(*args, **kwargs):
        drawn.append(propose(*args, **kwargs))
        return drawn[-1]

    trainer.rollout.propose = watched
    trainer.run.start()
    with trainer.objective.open():
        for _ in range(2):
            trainer.run.begin_rung()
    rung = trainer.run.state.rungs[-1]
    assert rung["proposals"] == 2 * 2 * 192
    assert rung["objective_calls"] == len(asked) == len(set(asked))
    assert [each.objective.shape for each in drawn] == 8 * [(2, 48)]
    moves = drawn[1:4] + drawn[5:]
    known = {*asked}
    for each in drawn:
        prompts = [trainer.inputs.prompts.rows[row]["prompt"] for row in each.rows.tolist()]
        measured = each.objective.flatten().isfinite().tolist()
        for pair, is_measured in zip(zip(prompts, each.texts, strict=True), measured, strict=True):
            assert not is_measured or pair in known
    share = torch.stack([each.objective.isfinite().double() for each in moves[3:]]).mean()
    assert rung["evaluated_moves"] == pytest.approx(share.item())
    assert 0 < share < 1
    screened = {
        (trainer.inputs.prompts.rows[row]["prompt"], text)
        for each in moves
        for row, text, value in zip(each.rows.tolist(), each.texts, each.objective.flatten().tolist(), strict=True)
        if math.isnan(value)
    }
    assert screened - known, "some texts were drawn and never evaluated"
    assert {name for name, value in rung.items() if not math.isfinite(value)} <= {"khat"}
    assert rung["draws"] == 48
    assert 0 < rung["acceptance_rate"] < 1
    exact = trainer.rollout.score(trainer.inputs.prompts, moves[-1])
    torch.testing.assert_close(exact, moves[-1].token_log_model.sum(-1).view_as(exact))


def test_the_model_draws_nothing_where_spans_come_from_a_vocabulary(config, tokenizer):
    """It draws the whole texts alone; all proposals have the scorer's log q, token by token."""
    settings = config(num_generations=32, chain_length=4, tau_step=1.0)
    vocabulary = [tokenizer.convert_tokens_to_ids(word) for word in ("a", "b")]
    trainer = trainer_of(settings, tokenizer, sampler=SpanChains(4, vocabulary))
    rollout, asked, moved = trainer.rollout, [], []
    generate, propose = rollout.engine.generate, rollout.propose

    def watched(*args, **kwargs):
        asked.append(len(args[0]))
        return generate(*args, **kwargs)

    def watched_proposals(*args, **kwargs):
        moved.append(propose(*args, **kwargs))
        return moved[-1]

    rollout.engine.generate, rollout.propose = watched, watched_proposals
    trainer.run.start()
    with trainer.objective.open():
        trainer.run.begin_rung()
    assert asked == [8], "8 chains"
    assert [len(each) for each in moved] == 4 * [8]
    for each in moved:
        expected = rollout.score_tokens(trainer.inputs.prompts, each)
        torch.testing.assert_close(each.token_log_model, expected, atol=1e-5, rtol=0)
    assert any(each.completions.tokens() != moved[0].completions.tokens() for each in moved[1:])


def test_a_move_to_the_same_text_is_not_an_accepted_one(monkeypatch):
    monkeypatch.setattr(span, "MAX_WIDTH", 2)
    table = Table(scale=1.2)
    states, _, rate = span_chains(table.at_target(500), 9, TAU, (0,), table.redraw, torch.Generator().manual_seed(1))
    changed = [
        sum(a != b for a, b in zip(one.completions.tokens(), other.completions.tokens())) / 500
        for one, other in itertools.pairwise(states)
    ]
    assert rate == pytest.approx(sum(changed) / 8)


def test_a_chain_without_a_move_is_refused():
    with pytest.raises(ValueError, match=r"SpanChains\(1\) makes no move: .* at least 2"):
        SpanChains(1)


def test_no_chain_begins_at_an_excluded_text():
    table, sampler = Table(), SpanChains(4)
    drawn = table.fresh(60)
    drawn.log_prior[0, ::3] = -math.inf
    pool = sampler.pool(drawn, table)
    sampler.select(pool, 0.0, TAU, 60, torch.Generator().manual_seed(0))
    assert sampler._start.log_prior.isfinite().all()
    kept = torch.arange(60) % 3 > 0
    assert torch.equal(sampler._start.completions.ids[kept], drawn.completions.ids[kept])


@pytest.mark.parametrize("sampler", ["span", "suffix"])
def test_a_redrawn_text_has_its_own_cost(config, tokenizer, sampler):
    model = tiny_gpt2()
    settings = config(sampler=sampler, num_generations=96, max_completion_length=8, objective_range=8.0)
    trainer = ALDRIFTTrainer(
        model, count_a, settings, processing_class=tokenizer, peft_config=lora_config(model), train_dataset=["", "a b"]
    )
    propose, drawn = trainer.rollout.propose, []
    trainer.rollout.propose = lambda *args, **kwargs: drawn.append(propose(*args, **kwargs)) or drawn[-1]
    trainer.run.start()
    with trainer.objective.open():
        trainer.run.begin_rung()
    for each in drawn:
        costs = each.objective.flatten()
        known = costs.isfinite()
        assert costs[known].tolist() == torch.tensor(count_a([], each.texts))[known].tolist()
        assert len(costs[known].unique()) > 1
