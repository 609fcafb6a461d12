"""bf16: one autocast for generation, scoring and training; what its rounding does to the draws, and no more."""

import pytest
import torch
from conftest import EOS, every_completion, log_probs, tiny_gpt2
from own_parts import draws_of
from test_exactness import STEPS, TAU, fixed_model

from aldrift_hf.models import generation
from aldrift_hf.models.batching import Batches
from aldrift_hf.models.engines import guard
from aldrift_hf.models.engines import transformers as engine
from aldrift_hf.models.prior import base_model
from aldrift_hf.models.scoring import inference, sequence_logprobs, sequence_sums
from aldrift_hf.models.shared_prompts.cache import CACHE
from aldrift_hf.selftest.exact import chi_square_p
from aldrift_hf.trainer import rollout


def cached_log_probs(model, prompt, completions):
    """`log q` as generation has it: one token after the other, from cached keys and values."""
    ids = torch.tensor([prompt + row for row in completions.ids.tolist()])
    total, cache = torch.zeros(len(ids), dtype=torch.float64), None
    steps = torch.arange(completions.ids.shape[1]) < completions.length[:, None]
    tokens = ids[:, : len(prompt)]
    for step in range(completions.ids.shape[1]):
        output = model(input_ids=tokens, use_cache=True, **{CACHE: cache})
        cache, tokens = output[CACHE], ids[:, len(prompt) + step, None]
        total += torch.where(
            steps[:, step], output.logits[:, -1].float().log_softmax(-1).gather(1, tokens)[:, 0].double(), 0.0
        )
    return total


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2-adapter-off", "llama-adapter-off", "gpt2-peft-model", "gpt2-full"])
def test_corrected_draws_are_from_the_target(kind, config, tokenizer):
    """Generation rounds otherwise than the scorer, by δ: chains that weighed by the scorer's log q would settle at
    p·e^δ. They weigh by the law that the tokens came from."""
    for seed in range(3):
        trainer, completions, cost, _ = fixed_model(kind, config, tokenizer, ["", "b"], seed, bf16=True)
        drawn = trainer.sample(1000, chain_length=STEPS)
        texts = trainer.rollout.decode(completions)
        names = sorted(set(texts))
        place = torch.tensor([names.index(text) for text in texts])
        for number, prompt in enumerate(trainer.inputs.prompts.token_ids):
            with inference(trainer.model), trainer.accelerator.autocast():
                log_q = log_probs(base_model(trainer.model), prompt, completions)
                delta = cached_log_probs(base_model(trainer.model), prompt, completions) - log_q
                with trainer.rollout.prior.active(trainer.model) as prior_model:
                    log_prior = log_probs(prior_model, prompt, completions)
            target = torch.zeros(len(names), dtype=torch.float64)
            target.index_add_(0, place, (log_prior - TAU * cost).softmax(0))
            assert delta.abs().max() > 1e-3, "both round alike: the test shows nothing"
            rows = drawn["completion"][1000 * number : 1000 * (number + 1)]
            counts = torch.tensor([names.index(text) for text in rows]).bincount(minlength=len(names))
            assert chi_square_p(counts, target) > 1e-4
            model = torch.zeros(len(names), dtype=torch.float64).index_add_(0, place, log_q.exp())
            assert chi_square_p(counts, model) < 1e-4, "the model is the target: the test shows nothing"


@pytest.mark.parametrize(("off_by", "as_scored"), [(0.0, True), (5e-4, True), (2e-3, False)])
def test_log_q_is_generations_own(config, tokenizer, monkeypatch, off_by, as_scored):
    """Whether the scorer has it too, to a thousandth of a nat, is seen on a few rows of every batch."""
    trainer, completions, *_ = fixed_model("gpt2-adapter-off", config, tokenizer)
    trainer.rollout.batches = Batches(100, fixed=True)
    scored, checked = [], []

    def off(*args):
        drawn = generation.generate(*args)
        return draws_of(drawn.completions, drawn.log_probs + off_by)

    def counted(model, prompts, *args, **kwargs):
        scored.append(len(prompts))
        return sequence_logprobs(model, prompts, *args, **kwargs)

    def counted_few(model, prompts, *args, **kwargs):
        checked.append(len(prompts))
        return sequence_sums(model, prompts, *args, **kwargs)

    monkeypatch.setattr(engine, "generate", off)
    monkeypatch.setattr(rollout, "sequence_logprobs", counted)
    monkeypatch.setattr(guard, "sequence_sums", counted_few)
    drawn = trainer.rollout.propose(trainer.inputs.prompts, 400, (1,))
    assert (scored, checked) == ([100] * 4, [8] * 4), "the prior's, and a few of the policy's"
    assert drawn.as_scored is as_scored
    log_q = log_probs(base_model(trainer.model), [EOS], completions)
    place = {tuple(tokens): row for row, tokens in enumerate(completions.tokens())}
    known = torch.stack([log_q[place[tuple(tokens)]] for tokens in drawn.completions.tokens()])
    assert torch.allclose(drawn.log_model[0], known + off_by, atol=1e-5)


def test_generation_that_does_not_draw_what_is_scored_is_an_error(config, tokenizer, monkeypatch):
    """As with a model that ignores the attention mask, and prompts padded on the left."""
    trainer, *_ = fixed_model("gpt2-adapter-off", config, tokenizer)

    def wrong(*args):
        drawn = generation.generate(*args)
        return draws_of(drawn.completions, drawn.log_probs - 0.5)

    monkeypatch.setattr(engine, "generate", wrong)
    with pytest.raises(RuntimeError, match=r"differs by 0\.5 nats .* ignores the attention mask"):
        trainer.rollout.propose(trainer.inputs.prompts, 40, (1,))


def test_scores_under_autocast_are_normalised_and_are_not_those_of_fp32():
    model, completions = tiny_gpt2(), every_completion()
    full = log_probs(model, [2], completions)
    with torch.autocast("cpu", torch.bfloat16):
        half = log_probs(model, [2], completions)
    assert half.exp().sum().item() == pytest.approx(1.0, abs=0.02)
    assert 1e-3 < (half - full).abs().max() < 0.2
