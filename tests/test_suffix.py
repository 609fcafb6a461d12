"""`sampler="suffix"`: chains of a rung that redraw the ends of their texts, in a run of the trainer.

Their law, exactly: tests/test_exactness.py.
"""

import pytest
import torch
from conftest import EOS, ALDRIFTTrainer, count_a, every_completion, log_probs, lora_config, tiny_gpt2

from aldrift_hf.models.prior import base_model
from aldrift_hf.streams import generator


def trainer_of(settings, tokenizer, objective=count_a, **changes):
    model = tiny_gpt2()
    return ALDRIFTTrainer(
        model, objective, settings, processing_class=tokenizer, peft_config=lora_config(model), **changes
    )


@pytest.mark.parametrize("ladder", [{}, {"ladder": "adaptive", "tau_step": None}])
def test_a_run_learns_the_target(ladder, config, tokenizer):
    """The exact KL(p_T‖q) falls, and log Z is that of the target."""
    completions = every_completion()
    cost = torch.tensor(count_a([], tokenizer.batch_decode(completions.tokens(), skip_special_tokens=True)))
    log_weight = log_probs(tiny_gpt2(), [EOS], completions) - 1.5 * cost
    log_p = log_weight.log_softmax(0)
    trainer = trainer_of(
        config(sampler="suffix", num_generations=512, updates_per_rung=20, per_device_train_batch_size=32, **ladder),
        tokenizer,
    )

    def distance():
        return (log_p.exp() * (log_p - log_probs(base_model(trainer.model), [EOS], completions))).sum().item()

    before = distance()
    trainer.train()
    assert distance() < 0.35 * before
    assert trainer.record.log_z[0] == pytest.approx(log_weight.logsumexp(0).item(), abs=0.15)
    assert trainer.record.settings["sampler"] == "suffix"


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
