"""`TwinArchive`: each draw brings its twin, and the weights of both are exact."""

from dataclasses import replace

import pytest
import torch
from conftest import EOS, ALDRIFTTrainer, count_a, log_probs, lora_config, tiny_gpt2

from aldrift_hf import TwinArchive
from aldrift_hf.algorithm import diagnostics
from aldrift_hf.algorithm.archive import mixture
from aldrift_hf.algorithm.errors import by_draw
from aldrift_hf.algorithm.goals import TargetCost
from aldrift_hf.algorithm.ladders import AdaptiveLadder, LadderState
from aldrift_hf.algorithm.samplers import ArchiveSampler
from aldrift_hf.models import snapshots
from aldrift_hf.models.prior import base_model
from aldrift_hf.types import Completions, Proposals

# Five texts: "a" and "b" are twins, "c" is its own, and that of "d" cannot be written; "e" is "a" in another token.
TEXTS = ["a", "b", "c", "d", "a"]
TWINS = {"a": "b", "b": "a", "c": "c", "d": "x", "x": "d"}
TOKENS = {"a": [0], "b": [1], "c": [2], "d": [3]}
COST = torch.tensor([1.0, 1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
MODELS = [torch.tensor(law, dtype=torch.float64) / 16 for law in ([8, 2, 2, 3, 1], [0, 8, 4, 2, 2], [8, 0, 0, 8, 0])]
"""The prior, and two models; what they never write, their draws' twins are."""
LAWS = [torch.tensor(law, dtype=torch.float64) / 16 for law in ([8, 2, 2, 3, 1], [0, 4, 8, 2, 2], [8, 0, 0, 8, 0])]
"""What an engine with its own rounding draws from in place of each."""


class Policy:
    """Models whose log-probabilities are known."""

    def __init__(self):
        self.present = 0

    def decode(self, completions):
        return [TEXTS[token] for token in completions.ids[:, 0].tolist()]

    def encode(self, texts):
        return [TOKENS.get(text) for text in texts]

    def snapshot(self):
        return {"number": torch.tensor(self.present)} if self.present else {}

    def log_prob(self, snapshot, proposals):
        model = self.present if snapshot is None else int(snapshot["number"]) if snapshot else 0
        return MODELS[model].log()[proposals.completions.ids[:, 0]].view_as(proposals.objective)


def drawn(model, law, events, prompts=1):
    """These events, `[prompts · n]`, as draws of a model by a law of its engine."""
    shape = (prompts, len(events) // prompts)
    return Proposals(
        rows=torch.arange(prompts).repeat_interleave(shape[1]),
        completions=Completions(events[:, None], torch.ones(len(events), dtype=torch.long)),
        objective=COST[events].view(shape),
        log_prior=MODELS[0].log()[events].view(shape),
        log_model=law.log()[events].view(shape),
        as_scored=law is MODELS[model],
    )


def climb(laws, draw, tau=1.0):
    """The pool after a rung of each model, the present rung's proposals, log Z and its error."""
    policy, sampler = Policy(), TwinArchive(TWINS.__getitem__)
    for model, law in enumerate(laws):
        policy.present = model
        proposals = draw(model, law)
        pool = sampler.pool(proposals, policy)
    state = LadderState.start(len(proposals.prompts), 1.0)
    influence = sampler.influence(pool, state, tau)
    return pool, proposals, sampler.log_z(pool, state, tau), influence


def every(model, law, count=16):
    """Exactly `count · law(event)` draws of each event: a sample without sampling noise."""
    return drawn(model, law, torch.arange(5).repeat_interleave((law * count).round().long()))


@pytest.mark.parametrize("laws", [MODELS, LAWS], ids=["the scorer's", "an engine's own"])
@pytest.mark.parametrize("rungs", [1, 2, 3])
def test_weighted_frequencies_are_the_target_exactly(laws, rungs):
    pool, proposals, log_z, influence = climb(laws[:rungs], every)
    target = MODELS[0] * torch.exp(-COST)
    frequencies = torch.zeros(5).double()
    frequencies.index_add_(0, pool.completions.ids[:, 0], pool.log_weight(1.0)[0].softmax(0))
    assert frequencies == pytest.approx(target / target.sum(), abs=1e-12)
    assert log_z.exp().item() == pytest.approx(target.sum().item())
    assert influence.own.shape == proposals.objective.shape, "a pair is one draw"


def test_what_a_draw_brings():
    """Its twin, or itself where it has none; two writings of a text have not both the same twin."""
    pool = climb(MODELS[:1], lambda model, law: drawn(model, law, torch.arange(5)))[0]
    assert pool.completions.ids[:, 0].tolist() == [0, 1, 1, 0, 2, 2, 3, 3, 4, 4]
    assert pool.objective[0].tolist() == COST[pool.completions.ids[:, 0]].tolist()
    assert pool.log_prior[0].exp() == pytest.approx(MODELS[0][pool.completions.ids[:, 0]])
    assert pool.log_model[0].exp().tolist() == pytest.approx([x / 16 for x in [5, 5, 5, 5, 2, 2, 3, 3, 1, 1]])


def test_errors_of_log_z_against_the_spread_of_thousands_of_runs():
    """Were the two of a pair taken for two draws, the error would be too small by a factor of up to √2."""
    repetitions, tolerance = 4000, 0.06

    def draw(model, law):
        generator = torch.Generator().manual_seed(model)
        return drawn(model, law, torch.multinomial(law, repetitions * 100, True, generator=generator), repetitions)

    _, _, log_z, influence = climb(MODELS, draw)
    assert influence.error().square().mean().sqrt().item() == pytest.approx(log_z.std().item(), rel=tolerance)
    exact = (MODELS[0] * torch.exp(-COST)).sum().log().item()
    assert log_z.mean().item() == pytest.approx(exact, abs=0.005)


def test_a_pair_is_one_draw_for_the_ladder_and_for_the_error_of_t():
    """Where no text has a twin, everything is as in the archive."""
    proposals = drawn(0, MODELS[0], torch.multinomial(MODELS[0], 200, True, generator=torch.Generator().manual_seed(0)))
    seen = []
    for sampler in (ArchiveSampler(), TwinArchive(lambda text: text)):
        pool, state = sampler.pool(proposals, Policy()), LadderState.start(1, 50.0)
        aimed = TargetCost(0.5).aim(LadderState.start(1, None), pool)
        seen.append((AdaptiveLadder(0.5, 200).next_tau(state, pool), aimed.tau_max, aimed.tau_max_error))
    assert 0 < seen[0][0] < 50
    assert seen[1] == pytest.approx(seen[0], rel=1e-6)


def test_the_error_of_t_is_the_spread_of_its_estimates():
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(1000):
        proposals = drawn(0, MODELS[0], torch.multinomial(MODELS[0], 200, True, generator=generator))
        pool = TwinArchive(TWINS.__getitem__).pool(proposals, Policy())
        state = TargetCost(0.5).aim(LadderState.start(1, None), pool)
        found.append((state.tau_max, state.tau_max_error))
    estimates, errors = torch.tensor(found).T
    assert errors.square().mean().sqrt().item() == pytest.approx(estimates.std().item(), rel=0.08)


def test_a_twin_of_a_twin_that_is_another_text_is_an_error():
    sampler = TwinArchive({"a": "b", "b": "c", "c": "c"}.__getitem__)
    with pytest.raises(ValueError, match="the twin of 'a' is 'b', but the twin of that is 'c'"):
        sampler.pool(drawn(0, MODELS[0], torch.tensor([0])), Policy())


def swapped(text):
    return text.translate(str.maketrans("bc", "cb"))


@pytest.mark.slow
@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_a_run(peft, config, tokenizer):
    """Every column is log q̄ of the model that drew that rung, and twins are whole texts with b and c exchanged."""
    model, prior = tiny_gpt2(), tiny_gpt2()
    settings = config(num_generations=512, tau_max=1.5, tau_step=0.5)
    trainer = ALDRIFTTrainer(
        model,
        count_a,
        settings,
        processing_class=tokenizer,
        peft_config=lora_config(model) if peft else None,
        sampler=TwinArchive(swapped),
    )
    trainer.train()
    entries, ids = trainer.sampler.archive.entries, trainer.inputs.prompts.token_ids[0]
    assert len(entries) == 3
    rows = mixture(entries).completions.tokens()
    b, c = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in "bc")
    whole = 0
    for drawn, twin in zip(rows[::2], rows[1::2], strict=True):
        exchanged = [{b: c, c: b}.get(token, token) for token in drawn]
        assert twin == (exchanged if drawn[-1] == EOS and tokenizer.unk_token_id not in drawn else drawn)
        whole += twin != drawn
    assert 50 < whole < len(rows) / 2
    for number, model_of in enumerate(entries):
        for entry in entries:
            drawn, own = entry.proposals, entry.proposals.completions
            with snapshots.loaded(trainer.model, model_of.snapshot):
                log_q = log_probs(prior if number == 0 else base_model(trainer.model), ids, own)
            either = (log_q.view(-1, 2).exp().mean(-1).log()).repeat_interleave(2)
            assert entry.log_q[number][0] == pytest.approx(either, abs=1e-4)
            assert drawn.log_prior[0] == pytest.approx(log_probs(prior, ids, own), abs=1e-4)
    (draws,) = trainer.sampler.draws()
    weight = by_draw(draws.log_weight(1.5), 2).exp()
    trainer.sample(16, correction="archive")
    ess = trainer.record.metrics.get("sample_ess", trainer.state.log_history[-1].get("sample_ess"))
    assert ess == pytest.approx((weight.sum() ** 2 / weight.square().sum() / weight.numel()).item(), rel=1e-6)
    log_weight = mixture(entries).log_weight(1.5)
    assert trainer.record.log_z[0] == pytest.approx(diagnostics.log_z(log_weight).item())
    assert trainer.record.rungs[-1]["archive_draws"] == 3 * settings.num_generations


def test_a_draw_is_scored_once(monkeypatch):
    """What is known of the rung's own draws is not computed again: its model scores their twins, and earlier pairs."""
    asked, policy = [], Policy()
    monkeypatch.setattr(
        policy, "log_prob", lambda snapshot, draws: asked.append(len(draws)) or Policy.log_prob(policy, snapshot, draws)
    )
    sampler = TwinArchive(TWINS.__getitem__)
    for model in range(2):
        policy.present = model
        sampler.pool(replace(every(model, MODELS[model]), texts=None), policy)
    assert asked == [16, 16, 16, 32]
