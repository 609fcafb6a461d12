"""The learning rate that is found by what the first updates change."""

import itertools

import pytest
import torch
from conftest import ALDRIFTTrainer, count_a, lora_config, tiny_gpt2, tiny_llama

from aldrift_hf import RunCallback
from aldrift_hf.trainer import setup
from aldrift_hf.trainer.step_size import UPDATE_NATS, scale_learning_rate

pytestmark = pytest.mark.slow

SEEKS = {"learning_rate": None, "num_generations": 256, "updates_per_rung": 8, "per_device_train_batch_size": 16}


class Changes(RunCallback):
    """The standard deviation of the change of `log q` by each update, over the rung's proposals, and its rate."""

    def __init__(self):
        self.changes, self.rates = [], []
        self.drawn = None  # where a run is resumed in the middle of a rung

    def _log_probs(self):
        return self.trainer.run.on_prompts.log_prob(None, self.drawn)

    def on_rung_drawn(self, args, state, control, *, record, metrics, proposals, prompts, **kwargs):
        self.drawn = proposals

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.before = self._log_probs() if self.drawn else None
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, **kwargs):
        if self.drawn:
            self.changes.append((self._log_probs() - self.before).std().item())


@pytest.fixture
def make(config, tokenizer):
    def build(model=None, lora=True, optimizers=(None, None), **settings):
        model = tiny_gpt2() if model is None else model
        trainer = ALDRIFTTrainer(
            model,
            count_a,
            config(**{**SEEKS, **settings}),
            processing_class=tokenizer,
            peft_config=lora_config(model) if lora else None,
            optimizers=optimizers,
        )
        trainer.add_callback(watch := Changes())
        watch.trainer = trainer
        return trainer, watch

    return build


@pytest.mark.parametrize("kind", ["gpt2", "llama", "full", "sgd", "warm-up"])
def test_an_update_changes_log_probabilities_by_so_many_nats(kind, make):
    """Whatever the model, what is trained of it, and the optimizer; from a rate at which almost nothing happens."""
    settings = {
        "sgd": {"optim": "sgd"},
        "warm-up": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
    }.get(kind, {})
    trainer, watch = make(tiny_llama() if kind == "llama" else None, lora=kind != "full", **settings)
    trainer.train()
    assert watch.changes[0] < UPDATE_NATS / 10
    assert UPDATE_NATS / 3 < max(watch.changes[1:6]) < 3 * UPDATE_NATS
    state = trainer.run.state
    assert not state.seeks_rate
    assert state.learning_rate == pytest.approx(watch.rates[-1])
    assert len(set(watch.rates[6:])) == 1, "it is constant from then on"
    assert trainer.record.rungs[-1]["learning_rate"] == state.learning_rate


def test_a_long_warm_up_leads_to_the_same_rate(make):
    """The rate is sought while it is a small share of what it will be."""
    rates = {}
    for warmup in (0, 60):
        trainer, _ = make(lr_scheduler_type="constant_with_warmup", warmup_steps=warmup)
        trainer.train()
        assert not trainer.run.state.seeks_rate
        rates[warmup] = trainer.lr_scheduler.base_lrs[0]
    assert rates[60] == pytest.approx(rates[0], rel=1.0)


def watched(trainer, monkeypatch):
    """A list to which each scoring of a rung's samples adds the rung and what was found."""
    scored, score = [], trainer.run.sample_log_probs

    def score_and_note():
        scored.append((trainer.run.state.rung, score()))
        return scored[-1][1]

    monkeypatch.setattr(trainer.run, "sample_log_probs", score_and_note)
    return scored


def test_rungs_of_one_update_compare_each_rungs_own_samples(make, monkeypatch):
    """The rest of an epoch is skipped, and nothing is scored there."""
    monkeypatch.setattr(setup, "updates_per_rung", lambda draws, rows: 1)
    monkeypatch.setattr(setup, "LAST_RUNG", 4)
    trainer, watch = make(updates_per_rung=None, sampler="archive", num_rungs=4, lr_scheduler_type="constant")
    scored = watched(trainer, monkeypatch)
    trainer.train()
    made = trainer.run.state.rate_trials
    pairs = [*zip(scored[::2], scored[1::2], strict=True)]
    assert len(pairs) == min(made, 4) >= 2, "before and after an update, and at no other time"
    assert all(before[0] == after[0] for before, after in pairs)
    changes = [(after[1] - before[1]).std().item() for before, after in pairs]
    assert changes[0] < UPDATE_NATS / 10
    assert UPDATE_NATS / 3 < max(changes) < 3 * UPDATE_NATS
    assert len(watch.rates) == 4 * 4, "of an epoch that has rows for a longer last rung"


def test_a_rate_that_is_set_is_kept(make):
    for settings in ({"learning_rate": 2e-3}, {"optimizers": True}):
        if "optimizers" in settings:
            model = tiny_gpt2()
            optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
            trainer, watch = make(model, lora=False, optimizers=(optimizer, None))
        else:
            trainer, watch = make(**settings)
        trainer.train()
        assert watch.rates == [2e-3] * len(watch.rates)
        assert not trainer.run.state.seeks_rate


def test_costs_that_are_all_equal_leave_it_to_later_updates(config, tokenizer):
    """Their first gradients are 0: there is nothing to measure, and nothing breaks."""
    model = tiny_gpt2()
    trainer = ALDRIFTTrainer(
        model,
        lambda prompts, completions: [1.0] * len(completions),
        config(**SEEKS),
        processing_class=tokenizer,
        peft_config=lora_config(model),
    )
    trainer.train()
    assert trainer.record.finished


def test_it_is_resumed_in_the_middle_of_the_search(make):
    """Bit for bit as a run left alone, with the rate that the search has reached."""
    save = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "num_rungs": 1}
    whole, rates = make(**save)
    whole.train()
    resumed, again = make(**save)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-1")
    assert again.rates == rates.rates[1:]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters()):
        assert torch.equal(ours, theirs)


def test_a_schedule_is_scaled_as_a_whole():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    schedule.step()
    scale_learning_rate(4.0, optimizer, schedule)
    rates = [optimizer.param_groups[0]["lr"]]
    schedule.step()
    assert [*rates, optimizer.param_groups[0]["lr"]] == pytest.approx([4 / 2, 4 / 3])


@pytest.mark.parametrize("updates", [2, 3, 4, 5])
def test_a_short_cycle_leads_to_the_same_rate(make, updates):
    """The updates that are measured are made at a falling share of the rate."""
    rates = {}
    for schedule in ("constant", "cosine_with_restarts"):
        trainer, _ = make(sampler="archive", lr_scheduler_type=schedule, updates_per_rung=updates, num_rungs=4)
        trainer.train()
        assert not trainer.run.state.seeks_rate
        rates[schedule] = trainer.lr_scheduler.base_lrs[0]
    assert rates["cosine_with_restarts"] == pytest.approx(rates["constant"], rel=0.5)


def test_a_single_sample_is_enough_to_find_a_rate(make):
    trainer, _ = make(sampler="metropolis_hastings", num_generations=8, chain_length=8, updates_per_rung=4)
    trainer.train()
    assert not trainer.run.state.seeks_rate
    assert trainer.lr_scheduler.base_lrs[0] > 1e-3


def test_the_search_ends_where_no_rate_is_close_enough(make, monkeypatch):
    monkeypatch.setattr("aldrift_hf.trainer.step_size.CLOSE_ENOUGH", 1.0)
    trainer, watch = make(num_rungs=1)
    trainer.train()
    assert not trainer.run.state.seeks_rate
    assert trainer.run.state.rate_trials == 4
    assert len({*watch.rates[:5]}) == 5
    assert len({*watch.rates[4:]}) == 1


@pytest.mark.parametrize("updates", [1, 2])
def test_rungs_shorter_than_the_search_compare_each_rungs_own_samples(make, monkeypatch, updates):
    trainer, _ = make(updates_per_rung=updates, num_rungs=4, tau_step=None, sampler="archive")
    trainer.remove_callback(Changes)
    scored = watched(trainer, monkeypatch)
    trainer.train()
    begun = [rung for number, (rung, _) in enumerate(scored) if number == 0 or rung != scored[number - 1][0]]
    assert len(begun) >= 2
    made = trainer.run.state.rate_trials
    assert len(scored) == made + len(begun), "once before a rung's first update, and after each"


@pytest.mark.parametrize("change", [0.05, 5.0])
def test_the_last_trial_may_lower_the_rate_but_not_raise_it(make, change):
    """Updates that undo each other change as little at any rate: a rate that goes on rising would never be seen."""
    trainer, watch = make(num_rungs=1)
    there = torch.tensor([change, -change] * 8)
    states = itertools.cycle([torch.zeros(16), there])
    trainer.run.sample_log_probs = lambda: next(states)
    trainer.train()
    factor = 0.3 / there.std().item()
    expected = [watch.rates[0] * factor**trials for trials in (0, 1, 2, 3, 3 if change < 0.3 else 4)]
    assert watch.rates[:5] == pytest.approx(expected)
