"""A rung's updates end where they have moved the model as far as its log-weights were spread."""

import math

import pytest
import torch
from conftest import ALDRIFTTrainer, count_a, lora_config, tiny_gpt2

from aldrift_hf import RunCallback
from aldrift_hf.trainer.enough import MOST_UPDATES

ENOUGH = {
    **{"sampler": "archive", "updates_per_rung": None, "num_generations": 256, "per_device_train_batch_size": 32},
    **{"num_rungs": 2, "learning_rate": 2e-2},
}


class Watch(RunCallback):
    """Of each rung, how far each update had moved its samples, and the parameters after it."""

    def __init__(self):
        self.moved, self.parameters = [], []

    def on_rung_begin(self, args, state, control, **kwargs):
        self.moved.append([])
        self.parameters.append([])

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.moved[-1]:
            self.before = self.trainer.run.sample_log_probs()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.moved[-1].append((self.trainer.run.sample_log_probs() - self.before).std().item())
        self.parameters[-1].append(torch.cat([each.detach().flatten() for each in model.parameters()]))


@pytest.fixture
def make(config, tokenizer):
    def build(**changes):
        model = tiny_gpt2()
        settings = config(**ENOUGH | changes)
        trainer = ALDRIFTTrainer(model, count_a, settings, processing_class=tokenizer, peft_config=lora_config(model))
        trainer.add_callback(watch := Watch())
        watch.trainer = trainer
        return trainer, watch

    return build


def test_they_end_at_the_spread_of_the_log_weights(make):
    trainer, watch = make()
    trainer.train()
    for rung, moved, parameters in zip(trainer.record.rungs, watch.moved, watch.parameters, strict=True):
        made = rung["updates"]
        assert 1 <= made < MOST_UPDATES == len(moved)
        assert all(torch.equal(each, parameters[made - 1]) for each in parameters[made:]), "the rest is skipped"
        assert made == 1 or not torch.equal(parameters[0], parameters[made - 1])
        assert rung["loss"] > 0
    spread = trainer.run.state.spread
    assert watch.moved[-1][made - 1] >= spread
    before = [
        moved for update, moved in enumerate(watch.moved[-1], 1) if update in (1, 2, 3, 4, 6, 9, 14) and update < made
    ]
    assert all(moved < spread for moved in before), "they end at the first measurement beyond it"


def test_the_spread_is_that_of_the_rungs_log_weights(make):
    trainer, _ = make(num_rungs=1)
    trainer.train()
    weights = torch.tensor([draw["objective"] for draw in trainer.record.draws]) * -0.5  # other draws of the same prior
    assert trainer.run.state.spread == pytest.approx(weights.std().item(), rel=0.3)


def test_small_updates_are_all_made(make):
    trainer, _ = make(learning_rate=1e-6, num_rungs=1)
    trainer.train()
    assert trainer.record.rungs[0]["updates"] == MOST_UPDATES


@pytest.mark.parametrize(
    ("settings", "updates"),
    [
        ({"updates_per_rung": 7}, 7),
        ({"sampler": "metropolis_hastings"}, math.ceil(256 / 4 / 32)),
        ({"loss_type": "nll"}, math.ceil(256 / 4 / 32)),
    ],
)
def test_a_number_that_is_set_and_one_pass_are_made_in_full(settings, updates, make):
    trainer, watch = make(**settings, learning_rate=0.5)
    trainer.train()
    assert [rung["updates"] for rung in trainer.record.rungs] == [updates] * 2
    assert [len(moved) for moved in watch.moved] == [updates] * 2


@pytest.mark.parametrize("step", [1, 30, MOST_UPDATES, MOST_UPDATES + 2])
def test_it_is_resumed_bit_for_bit(step, make):
    """Before the rung is settled, when it is, and on the next one."""
    save = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    whole, _ = make(**save)
    whole.train()
    model = tiny_gpt2()
    resumed = ALDRIFTTrainer(
        model, count_a, whole.args, processing_class=whole.processing_class, peft_config=lora_config(model)
    )
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
    assert [rung["updates"] for rung in resumed.record.rungs] == [rung["updates"] for rung in whole.record.rungs]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters()):
        assert torch.equal(ours, theirs)
