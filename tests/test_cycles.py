"""The learning rate falls to 0 over each rung's updates, and the last rung has more of them."""

import math
from itertools import chain

import pytest
import torch
from conftest import ALDRIFTTrainer, count_a, lora_config, tiny_gpt2

from aldrift_hf import RunCallback
from aldrift_hf.trainer import cycles, setup
from aldrift_hf.trainer.cycles import updates_for, updates_per_rung
from aldrift_hf.types import Completions, Proposals

RATE = 2e-2
OPEN = {
    **{"sampler": "archive", "updates_per_rung": None, "num_generations": 64, "per_device_train_batch_size": 16},
    **{"num_rungs": 3, "learning_rate": RATE, "lr_scheduler_type": "cosine_with_restarts"},
}


class Watch(RunCallback):
    """Of each rung, the learning rate of each update, and the parameters after it."""

    def __init__(self):
        self.rates, self.parameters = [], []

    def on_rung_begin(self, args, state, control, **kwargs):
        self.rates.append([])
        self.parameters.append([])

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates[-1].append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.parameters[-1].append(torch.cat([each.detach().flatten() for each in model.parameters()]))


class Layout(RunCallback):
    """Of each rung, the mean of -log q over its proposals, and the training rows that are laid out."""

    def __init__(self):
        self.nats, self.rows = [], []

    def on_rung_drawn(self, args, state, control, proposals=None, **kwargs):
        self.nats.append(-float(proposals.log_model.mean()))
        self.rows.append(len(self.run.samples.samples.order))


@pytest.fixture
def make(config, tokenizer, monkeypatch):
    monkeypatch.setattr(setup, "updates_per_rung", lambda draws, rows: 4)
    monkeypatch.setattr(setup, "LAST_RUNG", 2)

    def build(**changes):
        model = tiny_gpt2()
        settings = config(**OPEN | changes)
        trainer = ALDRIFTTrainer(model, count_a, settings, processing_class=tokenizer, peft_config=lora_config(model))
        trainer.add_callback(watch := Watch())
        watch.trainer = trainer
        return trainer, watch

    return build


def course(updates):
    return [RATE * (1 + math.cos(math.pi * update / updates)) / 2 for update in range(updates)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ends", "ended_by"),
    [
        ({}, "All of num_rungs=3"),
        ({"num_rungs": None, "max_rungs": 3, "target_ess": 0.999}, "as many as max_rungs allows"),
        (
            {"num_rungs": None, "max_objective_calls": 18, "num_generations": 12, "target_ess": 0.999},
            "The budget is spent",
        ),
    ],
)
def test_each_rung_is_a_cycle_and_the_last_a_longer_one(ends, ended_by, make):
    trainer, watch = make(**ends)
    trainer.train()
    assert ended_by in trainer.record.ended_by
    updates = [rung["updates"] for rung in trainer.record.rungs]
    assert updates == [4] * (len(updates) - 1) + [8]
    assert len(updates) >= 2
    for made, rates, parameters, rung in zip(updates, watch.rates, watch.parameters, trainer.record.rungs, strict=True):
        assert rates[:made] == pytest.approx(course(made))
        assert not torch.equal(parameters[0], parameters[made - 1])
        assert all(torch.equal(each, parameters[made - 1]) for each in parameters[made:]), "the rest is skipped"
        assert rung["learning_rate"] == pytest.approx(RATE)
        assert rung["loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "updates"),
    [
        ({"updates_per_rung": 3}, 3),
        ({"sampler": "metropolis_hastings"}, math.ceil(64 / 4 / 16)),
        ({"loss_type": "nll", "num_generations": 128}, math.ceil(128 / 4 / 16)),
    ],
)
def test_numbers_that_are_set_and_single_passes_are_the_same_on_all_rungs(settings, updates, make):
    trainer, watch = make(**settings)
    trainer.train()
    assert [rung["updates"] for rung in trainer.record.rungs] == [updates] * 3
    assert watch.rates == [pytest.approx(course(updates))] * 3


@pytest.mark.slow
def test_warm_up_comes_before_the_first_cycle(make):
    _, watch = make(warmup_steps=2, num_rungs=2)
    watch.trainer.train()
    first, second = watch.rates
    assert first[:4] == pytest.approx([warm * rate for warm, rate in zip((0, 0.5, 1, 1), course(4), strict=True)])
    assert second == pytest.approx(course(8))


@pytest.mark.slow
def test_other_schedules_are_those_of_transformers(make):
    _, constant = make(lr_scheduler_type="constant", updates_per_rung=3)
    constant.trainer.train()
    assert constant.rates == [[RATE] * 3] * 3
    _, cosines = make(lr_scheduler_kwargs={"num_cycles": 1}, updates_per_rung=3)
    cosines.trainer.train()
    assert [*chain(*cosines.rates)] == pytest.approx(course(9))


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4, 6, 8, 16, 18, 22])
def test_it_is_resumed_bit_for_bit(step, make):
    """In a cycle, where one has ended, among updates that are skipped, and on the last rung."""
    save = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    whole, rates = make(**save)
    whole.train()
    resumed, again = make(**save)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
    assert [*chain(*again.rates)] == [*chain(*rates.rates)][step:]
    assert resumed.record.rungs[-1]["learning_rate"] == whole.record.rungs[-1]["learning_rate"]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters()):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_a_longer_budget_goes_on_where_the_last_rung_ended(make):
    save = {"save_strategy": "epoch", "save_total_limit": None}
    short, _ = make(**save, num_rungs=2)
    short.train()
    longer, watch = make(**save, num_rungs=3)
    longer.train(resume_from_checkpoint=True)
    assert [rung["updates"] for rung in longer.record.rungs] == [4, 8, 8]
    assert watch.rates[-1] == pytest.approx(course(8))


def proposals_of(nats, draws=102):
    columns = torch.zeros(1, draws, dtype=torch.float64)
    completions = Completions.of([[1]] * draws, 0)
    return Proposals(torch.zeros(draws, dtype=torch.long), completions, columns, columns, columns - nats)


@pytest.mark.parametrize(
    ("nats", "draws", "updates"),
    [
        (3, 102, 40),
        (12, 102, 40),
        (24, 102, 10),
        (48, 20, 2),
        (48, 102, 4),
        (1200, 102, 4),
        (1200, 20, 1),
        (1200, 9999, 40),
    ],
)
def test_texts_that_cannot_be_covered_are_learned_from_less_often(nats, draws, updates):
    assert updates_for(proposals_of(nats, draws), 40, 32) == updates


@pytest.mark.slow
def test_each_rung_has_the_updates_that_its_own_texts_are_worth(make, monkeypatch):
    monkeypatch.setattr(cycles, "SHORT_TEXT", 2.0)  # the tiny model's texts have more
    monkeypatch.setattr(cycles, "FEWER", 4.0)
    save = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    whole, watch = make(**save, num_generations=16)
    whole.add_callback(see := Layout())
    see.run = whole.run
    whole.train()
    made = [rung["updates"] for rung in whole.record.rungs]
    worth = [max(1, round(4 * (2 / nats) ** 4)) for nats in see.nats]
    assert made == [*worth[:-1], 2 * worth[-1]]
    assert len({*worth}) > 1
    assert max(worth) < 4
    assert see.rows == [16 * updates for updates in worth], "one pass over the samples is whole"
    for rung, rates in zip(made, watch.rates, strict=True):
        assert rates[:rung] == pytest.approx(course(rung))
    for step in (1, 9, 17):
        resumed, _ = make(**save, num_generations=16)
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
        for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("draws", "updates"), [(10, 30), (128, 30), (512, 120), (864, 202), (10_000, 240)])
def test_a_rungs_updates_grow_with_its_draws(draws, updates):
    assert updates_per_rung(draws, 128) == updates


def test_a_rungs_loss_is_the_mean_over_the_updates_that_it_made(make):
    """And not over those that its epoch has rows for: on the last rung it would seem to double."""
    run = make()[0].run
    run.start()
    with run.objective.open():
        run.begin_rung()
    assert run.state.planned == 4 < run.updates_per_rung
    run.state.loss_sum, run.state.updates = 6.0, run.updates_per_rung
    run.end_rung()
    assert run.state.rungs[-1]["loss"] == 1.5
