"""The target's cost and distance from the prior on each rung, beside those of an enumeration."""

from __future__ import annotations

import pytest
from conftest import EOS, ALDRIFTTrainer, count_a, every_completion, log_probs, lora_config, tiny_gpt2


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["archive", "metropolis_hastings"])
def test_they_are_those_of_the_exact_target(config, tokenizer, sampler):
    model, completions = tiny_gpt2(), every_completion()
    log_prior = log_probs(model, [EOS], completions).double()
    texts = tokenizer.batch_decode(completions.tokens(), skip_special_tokens=True)
    cost = log_prior.new_tensor(count_a([""] * len(texts), texts))
    args = config(sampler=sampler, num_generations=1024)
    trainer = ALDRIFTTrainer(model, count_a, args, processing_class=tokenizer, peft_config=lora_config(model))
    trainer.train()
    assert len(trainer.record.rungs) == 3
    for rung in trainer.record.rungs:
        log_target = (log_prior - rung["tau"] * cost).log_softmax(0)
        mean = (log_target.exp() * cost).sum().item()
        nats = (log_target.exp() * (log_target - log_prior)).sum().item()
        assert rung["target_objective_mean"] == pytest.approx(mean, abs=0.08)
        assert rung["target_kl_to_prior"] == pytest.approx(nats, abs=0.08)
    assert nats > 0.1, "far enough from the prior that it matters"
    assert trainer.record.metrics["kl_to_prior"] == pytest.approx(nats, rel=0.7)
