"""What an engine draws and reports: unfaithful ones are refused; weights are exact whatever an engine's rounding."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import EOS, every_completion, log_probs, perturb, tiny_gpt2
from own_parts import draws_of
from test_exactness import TAU, fixed_model

from aldrift_hf import Engine, TransformersEngine
from aldrift_hf.algorithm import diagnostics
from aldrift_hf.algorithm.archive import Archive, mixture
from aldrift_hf.models import generation
from aldrift_hf.models.engines import EngineGuard, EngineSettings, guard
from aldrift_hf.models.prior import base_model
from aldrift_hf.models.scoring import inference
from aldrift_hf.streams import uniforms
from aldrift_hf.types import Draws

pytestmark = pytest.mark.slow

SETTINGS = EngineSettings(3, (EOS,), EOS)
DRAW = generation._draw


class OldWeights(TransformersEngine):
    """Draws from the model as it was when it was first asked."""

    def sync(self, policy):
        if self._model is None:
            super().sync(copy.deepcopy(policy))


class AnotherModel(TransformersEngine):
    def sync(self, policy):
        super().sync(tiny_gpt2(seed=7))


def hot(scores, numbers):
    """Draws at temperature 1/2, and reports the log-probabilities before it."""
    tokens, _ = DRAW(2 * scores, numbers)
    return tokens, scores.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def truncated(scores, numbers):
    """Draws the likeliest three tokens alone, and reports the log-probabilities before that."""
    kept = scores >= scores.topk(3, dim=-1).values[:, -1:]
    tokens, _ = DRAW(scores.masked_fill(~kept, -math.inf), numbers)
    return tokens, scores.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def renormalised(scores, numbers):
    """The same, but reports the law that the tokens come from."""
    kept = scores >= scores.topk(3, dim=-1).values[:, -1:]
    return DRAW(scores.masked_fill(~kept, -math.inf), numbers)


def moved_trainer(config, tokenizer, **changes):
    trainer, *_ = fixed_model("gpt2-adapter-off", config, tokenizer, **changes)
    trainer.rollout.args.per_device_generation_batch_size = 20
    trainer.rollout.batches.size = 20
    return trainer


def use(trainer, engine):
    trainer.rollout.engine = trainer.rollout.guard.engine = engine


@pytest.mark.parametrize("kind", [OldWeights, AnotherModel])
def test_an_engine_with_other_weights_is_refused(config, tokenizer, kind):
    trainer = moved_trainer(config, tokenizer)
    use(trainer, kind(SETTINGS))
    prompts = trainer.inputs.prompts
    if kind is OldWeights:  # faithful as long as the model stays as it is
        trainer.rollout.propose(prompts, 100, (1,))
        perturb(trainer.model, seed=3, scale=0.3)
    with pytest.raises(RuntimeError, match=rf"{kind.__name__} does not draw from the model: .* by [\d.]+ nats "):
        trainer.rollout.propose(prompts, 100, (2,))


@pytest.mark.parametrize("fault", [hot, truncated, renormalised])
def test_an_engine_that_changes_probabilities_is_refused(config, tokenizer, monkeypatch, fault):
    """Also where the log-probabilities that it reports are the model's own."""
    trainer = moved_trainer(config, tokenizer)
    monkeypatch.setattr(generation, "_draw", fault)
    seen = "nats from the model's own" if fault is renormalised else "likelier than the law that it reports"
    with pytest.raises(RuntimeError, match=seen):
        trainer.rollout.propose(trainer.inputs.prompts, 3000, (1,))


def test_a_faithful_engine_passes(config, tokenizer):
    trainer = moved_trainer(config, tokenizer)
    drawn = trainer.rollout.propose(trainer.inputs.prompts, 3000, (1,))
    assert drawn.as_scored
    figures = trainer.rollout.guard.figures
    assert abs(figures["engine/logprob_gap_mean"]) < 1e-5
    assert figures["engine/logprob_gap_std"] < 1e-5
    total, variance, tokens = trainer.rollout.guard._surprise.tolist()
    assert tokens > 1000
    assert abs(total) < 4 * math.sqrt(variance)


def test_the_gap_may_not_grow(config, tokenizer):
    """A gap that would do in bf16, when the run began with a fifth of it."""
    trainer = moved_trainer(config, tokenizer)
    seen, half = trainer.rollout.guard, torch.ones(8)
    rows = [torch.stack([sign * half, 4 * half, 0 * half, half, half], dim=-1) for sign in (0.1, 0.2, -0.5)]
    for measured in rows[:2]:
        seen.begin()
        seen.check(measured)
    seen.begin()
    with pytest.raises(RuntimeError, match=r"by 0\.25 nats .* and by 0\.05 when the run began"):
        seen.check(rows[2])


class RoundedEngine(Engine):
    """Draws whole completions from a law that is the model's up to a fixed error of each completion.

    Args:
        spread: standard deviation of the errors, nats.
    """

    def __init__(self, spread):
        self.completions = every_completion()
        noise = torch.randn(len(self.completions.length), generator=torch.Generator().manual_seed(1))
        self.error = spread * noise.double()

    def sync(self, policy):
        self.log_r = (log_probs(base_model(policy), [EOS], self.completions) + self.error).log_softmax(0)

    def generate(self, prompts, address, rows):
        numbers = uniforms(address, rows, 1)[:, 0].contiguous()
        events = torch.searchsorted(self.log_r.exp().cumsum(0), numbers).clamp(max=len(self.log_r) - 1)
        return draws_of(self.completions.select(events), self.log_r[events])


def events_of(drawn):
    place = {tuple(tokens): row for row, tokens in enumerate(every_completion().tokens())}
    return torch.tensor([place[tuple(tokens)] for tokens in drawn.completions.tokens()])


@pytest.fixture
def rounded(config, tokenizer, monkeypatch):
    """A trainer whose engine's log q is off the scorer's by half a nat (standard deviation), and the exact target."""
    monkeypatch.setattr(guard, "MAX_LOGPROB_GAP", 2.0)
    monkeypatch.setattr(guard, "MAX_SURPRISE", 1e6)
    trainer, _, cost, (log_prior,) = fixed_model("gpt2-adapter-off", config, tokenizer)
    use(trainer, RoundedEngine(0.5))
    trainer.exact_log_z = (log_prior - TAU * cost).logsumexp(0).item()
    return trainer, (log_prior - TAU * cost).log_softmax(0)


def distance(drawn, log_weight, log_p):
    """Total variation between the weighted draws and the target."""
    found = torch.zeros(len(log_p)).double().index_add_(0, events_of(drawn), log_weight.flatten().softmax(0))
    return (found - log_p.exp()).abs().sum().item() / 2


def test_weights_with_an_engines_own_law_are_exact(rounded):
    """And would not be, had its log q been replaced by the scorer's."""
    trainer, log_p = rounded
    drawn = trainer.rollout.propose(trainer.inputs.prompts, 40_000, (1,))
    assert not drawn.as_scored
    assert 0.3 < trainer.rollout.guard.figures["engine/logprob_gap_std"] < 0.7
    assert distance(drawn, drawn.log_weight(TAU), log_p) < 0.03
    scored = trainer.rollout.score(trainer.inputs.prompts, drawn)
    assert distance(drawn, drawn.log_target(TAU) - scored, log_p) > 0.1


def test_the_archive_is_exact_with_an_engines_own_law(rounded):
    """Each draw's weight is the mixture's of the scorer, times q/r of the law that it came from."""
    trainer, log_p = rounded
    archive, policy = Archive(window=4), trainer.run.on_prompts
    policy.is_prior = False
    for rung, size in enumerate((15_000, 25_000)):
        drawn = trainer.rollout.propose(trainer.inputs.prompts, size, (rung,))
        archive.extend(drawn, policy.snapshot(), policy.log_prob)
        perturb(trainer.model, seed=rung, scale=0.1)
    pool = mixture(archive.entries)
    assert distance(pool, pool.log_weight(TAU), log_p) < 0.03
    assert diagnostics.log_z(pool.log_weight(TAU)).item() == pytest.approx(trainer.exact_log_z, abs=0.03)
    for log_q in (  # the scorer's everywhere, and the engine's for its own draws alone
        [entry.log_q for entry in archive.entries],
        [own_law(entry, age) for age, entry in enumerate(archive.entries)],
    ):
        log_share = torch.tensor([15 / 40, 25 / 40]).double().log()[:, None, None]
        log_mixture = torch.cat([(log_share + densities).logsumexp(0) for densities in log_q], dim=1)
        assert distance(pool, pool.log_target(TAU) - log_mixture, log_p) > 0.06


def own_law(entry, age):
    densities = entry.log_q.clone()
    densities[age] = entry.proposals.log_model
    return densities


def flat(scores, numbers):
    """Draws at temperature 2, and reports the log-probabilities before it."""
    tokens, _ = DRAW(scores / 2, numbers)
    return tokens, scores.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def test_an_engine_that_is_too_warm_is_refused(config, tokenizer, monkeypatch):
    trainer = moved_trainer(config, tokenizer)
    monkeypatch.setattr(generation, "_draw", flat)
    with pytest.raises(RuntimeError, match="rarer than the law that it reports"):
        trainer.rollout.propose(trainer.inputs.prompts, 3000, (1,))


def seen_by(*rows, follows=True, in_half=0.0):
    """A guard that has measured rows of a gap, a length, a surprise and its variance."""
    engine = SimpleNamespace(follows_model=follows, remedy="Look at it.")
    seen = EngineGuard(engine, EOS, 16384)
    seen.check(torch.tensor([[*row, in_half] for row in rows], dtype=torch.float64))
    return seen


@pytest.mark.parametrize("sign", [1, -1])
def test_freedmans_bound(sign):
    """Rare tokens of a sure model (no variance to speak of) may come up now and then; and rounding may shift each."""
    rare = (0.0, 1.0, -9.5 * sign, 0.01)
    seen_by(*[rare] * 17)
    with pytest.raises(RuntimeError, match=r"(likelier|rarer) than the law that it reports"):
        seen_by(*[rare] * 18)
    seen_by((0.0, 1e6, sign * 0.9e3, 1.0))
    with pytest.raises(RuntimeError, match="than the law that it reports"):
        seen_by((0.0, 1e6, sign * 2e3, 1.0))


@pytest.mark.parametrize("gap", [0.05, -0.05])
def test_one_draw_too_far_off_is_enough(gap):
    fine = (0.01, 4.0, 0.0, 1.0)
    seen_by(*[fine] * 7)
    with pytest.raises(RuntimeError, match=r"for one completion its log-probability differs by 0\.05 nats"):
        seen_by(*[fine] * 7, (gap, 4.0, 0.0, 1.0))
    seen_by(*[fine] * 7, (gap, 4.0, 0.0, 1.0), in_half=1.0)
    assert seen_by(*[fine] * 7, (100.0, 4.0, 0.0, 1.0), follows=False).gaps.max() == 100


@pytest.mark.parametrize(("gap", "as_scored"), [(9e-4, True), (-9e-4, True), (2e-3, False), (-2e-3, False)])
def test_a_tenth_of_a_percent_is_as_scored(gap, as_scored):
    assert seen_by((0.0, 4.0, 0.0, 1.0), (gap, 4.0, 0.0, 1.0)).as_scored == as_scored


def test_moments_by_hand():
    """Of a fair coin, of a token that is next to impossible, and beside one that is."""
    logits = torch.tensor([[0.0, 0.0], [0.0, -50.0], [0.0, -math.inf]])
    found = guard._moments(logits, torch.tensor([1, 1, 0]))
    assert found[0].tolist() == pytest.approx([-math.log(2), 0.0, 0.0], abs=1e-6)
    assert found[1].tolist() == pytest.approx([-50.0, guard.LEAST_LOGPROB, 0.0], abs=1e-6)
    assert found[2].tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize(("dtype", "autocast"), [("float32", False), ("bfloat16", False), ("float32", True)])
def test_half_precision_is_the_models_or_the_autocasts(dtype, autocast):
    model = tiny_gpt2().to(getattr(torch, dtype))
    seen = EngineGuard(SimpleNamespace(follows_model=True, remedy=""), EOS, 16384)
    completions = every_completion()
    draws = Draws(completions, torch.zeros(completions.ids.shape))
    with inference(model), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        measured = seen.measure(model, [[EOS]] * len(completions.length), draws)
    assert measured[:, 4].unique().tolist() == [float(dtype != "float32" or autocast)]


def test_the_mean_gap_is_the_divergence_of_the_engines_law(rounded):
    trainer, _ = rounded
    trainer.rollout.propose(trainer.inputs.prompts, 20_000, (1,))
    log_r = trainer.rollout.engine.log_r
    log_q = log_probs(base_model(trainer.model), [EOS], every_completion())
    kl = (log_r.exp() * (log_r - log_q)).sum().item()
    assert kl > 0.05
    assert trainer.rollout.guard.figures["engine/logprob_gap_mean"] == pytest.approx(kl, abs=kl / 4)
