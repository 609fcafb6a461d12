"""The trainer's chains against p_τ on a space where every sequence is enumerated."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import (
    EOS,
    ALDRIFTTrainer,
    count_a,
    every_completion,
    log_probs,
    lora,
    lora_config,
    perturb,
    tiny_gpt2,
    tiny_llama,
)

from aldrift_hf.algorithm import diagnostics
from aldrift_hf.algorithm.ladders import LadderState
from aldrift_hf.algorithm.samplers import Selection, SuffixChains
from aldrift_hf.models.prior import base_model
from aldrift_hf.selftest.exact import chi_square_p

pytestmark = pytest.mark.slow

PROMPTS = ["", "b", "a c b c"]
TAU = 0.8
STEPS = 24


def kind_of_prior(kind: str):
    """(model, peft_config, a reference copy of the prior) for each kind of model that can be passed in."""
    make = tiny_llama if kind.startswith("llama") else tiny_gpt2
    if kind.endswith("adapter-off"):
        return make(), lora_config(make()), make()
    if kind.endswith("peft-model"):
        return lora(make(), seed=5), None, lora(make(), seed=5)
    return make(), None, make()


KINDS = [f"{family}-{kind}" for family in ("gpt2", "llama") for kind in ("adapter-off", "peft-model", "full")]


def fixed_model(kind, config, tokenizer, prompts=None, seed=0, **changes):
    """A trainer whose policy was moved away from its prior, and the exact prior and cost of every completion."""
    model, peft_config, reference = kind_of_prior(kind)
    trainer = ALDRIFTTrainer(
        model,
        count_a,
        config(tau_max=TAU, seed=seed, per_device_generation_batch_size=4096, **changes),
        train_dataset=prompts,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    completions = every_completion()
    cost = torch.tensor(count_a([], trainer.rollout.decode(completions)), dtype=torch.float64)
    priors = [log_probs(reference, ids, completions) for ids in trainer.inputs.prompts.token_ids]
    move_within_reach(trainer, completions, cost, priors)
    return trainer, completions, cost, priors


def move_within_reach(trainer, completions, cost, priors):
    """Move the policy away from the prior, but so that chains of `STEPS` come within 1e-2 of their target.

    After M steps an independence chain is within (1 - 1/w)^M of it in total variation, where w = max p/q.
    """
    for scale in (0.15, 0.1, 0.07, 0.05, 0.03, 0.01, 0.003):
        perturb(trainer.model, seed=11, scale=scale)
        ratios = [
            (log_prior - TAU * cost).log_softmax(0) - log_probs(base_model(trainer.model), ids, completions)
            for ids, log_prior in zip(trainer.inputs.prompts.token_ids, priors)
        ]
        if (1 - (-torch.stack(ratios).max()).exp()) ** (STEPS - 1) < 1e-2:
            return
        perturb(trainer.model, seed=11, scale=-scale)
    raise AssertionError("no perturbation is small enough")


def text_target(trainer, completions, log_p):
    """The distribution over decoded texts: what a sample's row shows of its token sequence."""
    texts = trainer.rollout.decode(completions)
    names = sorted(set(texts))
    probability = torch.zeros(len(names), dtype=torch.float64)
    for text, value in zip(texts, log_p.exp()):
        probability[names.index(text)] += value
    return names, probability


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_corrected_draws_are_from_the_target(kind, side, config, tokenizer):
    """With and without prompts, whatever side the tokenizer pads on, at several seeds."""
    if side is not None:
        tokenizer.padding_side = side
    for seed in range(3):
        prompts = None if side is None else PROMPTS
        trainer, completions, cost, priors = fixed_model(kind, config, tokenizer, prompts, seed)
        drawn = trainer.sample(1500 if side is None else 400, chain_length=STEPS)
        per_prompt = len(drawn) // len(priors)
        for number, log_prior in enumerate(priors):
            names, target = text_target(trainer, completions, (log_prior - TAU * cost).log_softmax(0))
            rows = drawn["completion"][number * per_prompt : (number + 1) * per_prompt]
            counts = torch.tensor([names.index(text) for text in rows]).bincount(minlength=len(names))
            # 54 comparisons or more are made: each may fail once in 100,000.
            assert chi_square_p(counts, target) > 1e-5
            _, uncorrected = text_target(
                trainer,
                completions,
                log_probs(base_model(trainer.model), trainer.inputs.prompts.token_ids[number], completions),
            )
            assert chi_square_p(counts, uncorrected) < 1e-5, "the model is the target: the test shows nothing"


def test_isir_draws_are_from_the_target(config, tokenizer):
    """One step among many proposals: its start, a draw of the model, is 1 among 400."""
    trainer, completions, cost, priors = fixed_model("gpt2-adapter-off", config, tokenizer, None, 0)
    names, target = text_target(trainer, completions, (priors[0] - TAU * cost).log_softmax(0))
    for length, meets in ((400, True), (2, False)):
        rows = trainer.sample(1000, chain_length=length, correction="isir")["completion"]
        counts = torch.tensor([names.index(text) for text in rows]).bincount(minlength=len(names))
        assert (chi_square_p(counts, target) > 1e-4) == meets


@pytest.mark.parametrize("kind", KINDS)
def test_the_columns_of_a_draw_are_exact(kind, config, tokenizer):
    """log_prior is the passed-in model's, log_model the policy's: on tokens, in a batch with the others."""
    trainer, completions, cost, priors = fixed_model(kind, config, tokenizer, PROMPTS)
    drawn = trainer.sample(200, chain_length=2)
    texts = trainer.rollout.decode(completions)
    for number, log_prior in enumerate(priors):
        log_model = log_probs(base_model(trainer.model), trainer.inputs.prompts.token_ids[number], completions)
        for row in drawn.select(range(200 * number, 200 * number + 200)):
            same_text = [index for index, text in enumerate(texts) if text == row["completion"]]
            assert any(
                math.isclose(row["log_prior"], log_prior[index].item(), abs_tol=1e-4)
                and math.isclose(row["log_model"], log_model[index].item(), abs_tol=1e-4)
                for index in same_text
            )
            assert row["objective"] == cost[same_text[0]]
            assert row["prompt"] == PROMPTS[number]


def test_log_z_meets_the_exact_sum(config, tokenizer):
    trainer, _, cost, priors = fixed_model("gpt2-adapter-off", config, tokenizer, PROMPTS)
    proposals = trainer.rollout.propose(trainer.inputs.prompts, 8000, (99,))
    log_weight = proposals.log_weight(TAU)
    exact = torch.stack([(log_prior - TAU * cost).logsumexp(0) for log_prior in priors])
    w = log_weight.exp()
    error = w.std(-1) / w.mean(-1) / math.sqrt(w.shape[-1])
    assert ((diagnostics.log_z(log_weight) - exact).abs() < 4 * error).all()


def test_evaluation_meets_the_exact_divergences(config, tokenizer):
    trainer, completions, cost, (log_prior,) = fixed_model(
        "gpt2-adapter-off", config, tokenizer, num_generations=20000, chain_length=4
    )
    log_p = (log_prior - TAU * cost).log_softmax(0)
    log_q = log_probs(base_model(trainer.model), [EOS], completions)
    metrics = trainer.evaluate()
    assert metrics["eval_objective"] == pytest.approx((log_q.exp() * cost).sum().item(), abs=0.03)
    assert metrics["eval_log_z"] == pytest.approx((log_prior - TAU * cost).logsumexp(0).item(), abs=0.03)
    assert metrics["eval_kl"] == pytest.approx((log_q.exp() * (log_q - log_p)).sum().item(), abs=0.03)
    assert metrics["eval_kl_forward"] == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item(), abs=0.03)
    texts = trainer.rollout.decode(completions)
    success = sum(value.item() for value, text in zip(log_q.exp(), texts) if count_a([], [text]) == [0.0])
    assert metrics["eval_success"] == pytest.approx(success, abs=0.02)


@pytest.mark.parametrize(("sampler", "meets"), [("metropolis_hastings", True), ("reweight", False), ("top", False)])
def test_only_the_correction_meets_the_target(sampler, meets, config, tokenizer):
    """The same problem, proposals and step: Metropolis-Hastings lands on p_τ, `reweight` and `top` beside it."""
    for seed in range(3):
        trainer, completions, cost, (log_prior,) = fixed_model(
            "gpt2-adapter-off",
            config,
            tokenizer,
            None,
            seed,
            sampler=sampler,
            num_generations=2000 * STEPS,
            chain_length=STEPS,
        )
        trainer.run.state.ladder = replace(trainer.run.state.ladder, taus=(0.5,))
        trainer.run.begin_rung()
        assert trainer.run.state.ladder.tau == TAU
        index = {tuple(tokens): row for row, tokens in enumerate(completions.tokens())}
        drawn = [index[tuple(tokens)] for tokens in trainer.run.samples.samples.completions.tokens()]
        counts = torch.tensor(drawn).bincount(minlength=len(cost))
        p_value = chi_square_p(counts, (log_prior - TAU * cost).softmax(0))
        assert p_value > 1e-4 if meets else p_value < 1e-8


def test_two_token_sequences_of_one_text_keep_their_own_weights(config, tokenizer):
    """The unknown token decodes to nothing, so many sequences share a text. Weights are the sequences' own."""
    trainer, *_ = fixed_model("gpt2-adapter-off", config, tokenizer)
    proposals = trainer.rollout.propose(trainer.inputs.prompts, 2000, (1,))
    by_text: dict[str, set[float]] = {}
    for text, value in zip(proposals.texts, proposals.log_prior.flatten().tolist()):
        by_text.setdefault(text, set()).add(round(value, 6))
    assert max(len(values) for values in by_text.values()) > 2
    for text, tokens in zip(proposals.texts[:200], proposals.completions.tokens()):
        again = tokenizer(text)["input_ids"]
        if 1 in tokens:
            assert [*again, EOS][: len(tokens)] != tokens, "nothing was lost in decoding: the test shows nothing"


def test_a_collapsed_model_is_found_out(config, tokenizer, caplog):
    """A policy that all but stopped drawing most sequences: its own ESS is perfect, the missing mass is not."""
    trainer, completions, cost, (log_prior,) = fixed_model(
        "gpt2-full", config, tokenizer, num_generations=2000, chain_length=4
    )
    head = trainer.model.get_output_embeddings()
    with torch.no_grad():  # the last layer's outputs are replaced by a constant: only the word `a` is left
        trainer.model.transformer.ln_f.weight.zero_()
        trainer.model.transformer.ln_f.bias.copy_(30 * head.weight[2] / head.weight[2].norm() ** 2)
    log_z = (log_prior - TAU * cost).logsumexp(0)
    trainer.run.state.ladder = LadderState.start(1, TAU).reached(torch.arange(1), TAU, log_z[None], torch.zeros(1))
    metrics = trainer.evaluate()
    log_q = log_probs(trainer.model, [EOS], completions)
    kept = log_q > math.log(1e-4)
    exact = -(log_prior - TAU * cost).log_softmax(0)[kept].logsumexp(0).item()
    assert metrics["eval_missing_mass"] == pytest.approx(exact, abs=0.05)
    assert metrics["eval_ess"] > 0.9
    assert exact > diagnostics.MISSING_MASS_WARNING
    assert "has lost" in caplog.text


def test_suffix_chains_end_at_the_target(config, tokenizer):
    """Also of two prompts of unequal length; without steps they are the model's draws, which are not."""
    for prompts in (None, PROMPTS):
        trainer, completions, cost, priors = fixed_model("gpt2-adapter-off", config, tokenizer, prompts, 0)
        drawn = {steps: trainer.sample(1000, chain_length=steps, correction="suffix") for steps in (25, 1)}
        for number, log_prior in enumerate(priors):
            names, target = text_target(trainer, completions, (log_prior - TAU * cost).log_softmax(0))
            for steps, rows in drawn.items():
                texts = rows["completion"][number * 1000 : (number + 1) * 1000]
                counts = torch.tensor([names.index(text) for text in texts]).bincount(minlength=len(names))
                assert (chi_square_p(counts, target) > 1e-4) == (steps > 1)


class FromTheModel(SuffixChains):
    """Without chains over whole texts before: the suffixes alone must lead to the target."""

    def select(self, pool, tau_before, tau, size, generator):
        chains = pool.objective.shape[-1] // self.chain_length
        return Selection(torch.arange(chains).expand(len(pool.objective), -1))


def learned_from(trainer, completions):
    """How often each completion is among a rung's samples, for each prompt."""
    samples = trainer.run.samples.samples
    index = {tuple(tokens): row for row, tokens in enumerate(completions.tokens())}
    drawn = torch.tensor([index[tuple(tokens)] for tokens in samples.completions.tokens()])
    return [drawn[samples.rows == row].bincount(minlength=len(index)) for row in range(len(PROMPTS))]


@pytest.mark.parametrize("kind", [SuffixChains, FromTheModel])
def test_samples_are_from_the_target(kind, config, tokenizer):
    """For several prompts, on a later rung; the model's own draws are not."""
    chains = 500
    trainer, completions, cost, priors = fixed_model(
        "gpt2-adapter-off",
        config,
        tokenizer,
        PROMPTS,
        sampler="suffix",
        num_generations=chains * STEPS,
        chain_length=STEPS,
    )
    trainer.run.sampler = kind(STEPS)
    trainer.run.state.ladder = replace(trainer.run.state.ladder, taus=(0.5,))
    trainer.run.begin_rung()
    assert trainer.run.state.ladder.tau == TAU
    for ids, counts, log_prior in zip(
        trainer.inputs.prompts.token_ids, learned_from(trainer, completions), priors, strict=True
    ):
        assert counts.sum() == chains
        assert chi_square_p(counts, (log_prior - TAU * cost).softmax(0)) > 1e-4
        assert chi_square_p(counts, log_probs(base_model(trainer.model), ids, completions).exp()) < 1e-6
