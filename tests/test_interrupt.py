"""Ctrl-C: a checkpoint at the next safe point; a second one ends a run at once. SIGTERM: a checkpoint, too."""

import dataclasses
import json
import os
import signal
import threading
import time

import pytest
import torch
from conftest import ALDRIFTTrainer, count_a, lora_config, tiny_gpt2
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import CheckpointManager

pytestmark = pytest.mark.versions


class PressAt(TrainerCallback):
    """Presses Ctrl-C before an update, once or several times."""

    def __init__(self, step, times=1):
        self.step, self.times = step, times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def make(config, tokenizer):
    def build(objective=count_a, callbacks=None, **settings):
        model, args = tiny_gpt2(dropout=0.1), config(**{"save_strategy": "epoch", **settings})
        return ALDRIFTTrainer(
            model, objective, args, processing_class=tokenizer, peft_config=lora_config(model, 0.1), callbacks=callbacks
        )

    return build


def same(one, other):
    ours, theirs = (trainer.model.state_dict() for trainer in (one, other))
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_the_first_stops_after_the_update_with_a_checkpoint(make, tmp_path, caplog):
    alone = make(output_dir=str(tmp_path / "alone"))
    alone.train()
    trainer = make(callbacks=[PressAt(5)])
    with pytest.raises(KeyboardInterrupt, match="stopped after update 6; go on with resume_from_checkpoint=True"):
        trainer.train()
    assert "stopping at the next safe point, to go on from there" in caplog.text
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    assert same(resumed, alone)


def test_before_the_first_update_nothing_is_resumed(make):
    """There is no checkpoint yet; draws and costs are kept."""
    trainer = make(per_device_generation_batch_size=8)
    stop_if_asked, rounds = trainer.run.rollout.runtime.stop_if_asked, []

    def in_the_second_round():
        rounds.append(1)
        if len(rounds) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        stop_if_asked()

    trainer.run.rollout.runtime = dataclasses.replace(trainer.run.rollout.runtime, stop_if_asked=in_the_second_round)
    with pytest.raises(KeyboardInterrupt, match="before the first update; start again: draws and costs so far are"):
        trainer.train()


@pytest.mark.slow
def test_between_rounds_of_proposals_too(make, tmp_path):
    """The checkpoint is that of the last update."""
    settings = {"save_strategy": "no", "per_device_generation_batch_size": 8, "num_generations": 256}
    alone = make(output_dir=str(tmp_path / "alone"), **settings)
    alone.train()
    trainer = make(**settings)
    rollout, rounds = trainer.run.rollout, []
    stop_if_asked = rollout.runtime.stop_if_asked

    def in_the_second_rung():
        rounds.append(trainer.state.global_step)
        if rounds.count(4) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        stop_if_asked()

    rollout.runtime = dataclasses.replace(rollout.runtime, stop_if_asked=in_the_second_rung)
    with pytest.raises(KeyboardInterrupt, match="stopped after update 4"):
        trainer.train()
    resumed = make(**settings)
    resumed.train(resume_from_checkpoint=True)
    assert same(resumed, alone)


def test_the_second_stops_at_once(make, tmp_path):
    trainer = make(callbacks=[PressAt(5, times=2)])
    with pytest.raises(KeyboardInterrupt) as stop:
        trainer.train()
    assert not str(stop.value)
    assert not (tmp_path / "out" / "checkpoint-6").exists()


@pytest.mark.slow
def test_outside_of_training_ctrl_c_is_as_ever(make):
    trainer, before = make(), signal.getsignal(signal.SIGINT)
    trainer.train()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def no_grace(monkeypatch):
    """The Trainer's timer notes SIGTERM at once."""
    init = CheckpointManager.__init__
    monkeypatch.setattr(CheckpointManager, "__init__", lambda self, trainer: init(self, trainer, kill_wait=0))


class TerminateAt(TrainerCallback):
    """Sends SIGTERM before an update, and waits until the Trainer's timer has noted it."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "complete"), [(5, 1), (7, 2)], ids=["mid-rung", "last update of a rung"])
def test_sigterm_leaves_a_checkpoint_of_ours(make, tmp_path, no_grace, caplog, step, complete):
    before = signal.getsignal(signal.SIGTERM)
    alone = make(output_dir=str(tmp_path / "alone"))
    alone.train()
    trainer = make(callbacks=[TerminateAt(step)], enable_jit_checkpoint=True)
    trainer.train()
    assert signal.getsignal(signal.SIGTERM) is before
    assert trainer.state.global_step == step + 1
    assert not trainer.record.finished
    assert trainer.record.metrics == {}
    assert [rung["rung"] for rung in trainer.record.rungs] == list(range(complete))
    assert f"terminated after update {step + 1}, with a checkpoint" in caplog.text
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    assert same(resumed, alone)
    assert resumed.record.finished
    assert untimed(resumed) == untimed(alone)


@pytest.mark.slow
def test_sigterm_in_the_middle_of_an_update(make, tmp_path, no_grace):
    """The update is finished first: its loss and dropout's random numbers belong together."""
    alone = make(output_dir=str(tmp_path / "alone"), save_strategy="no")
    alone.train()
    trainer = make(enable_jit_checkpoint=True, save_strategy="no")
    step = trainer.training_step

    def terminated(*args, **kwargs):
        loss = step(*args, **kwargs)
        if trainer.state.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return loss

    trainer.training_step = terminated
    trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-6"]
    resumed = make(save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert same(resumed, alone)
    assert untimed(resumed) == untimed(alone)


@pytest.mark.slow
def test_sigterm_while_the_first_proposals_are_drawn(make, no_grace, caplog):
    trainer = make(enable_jit_checkpoint=True, per_device_generation_batch_size=8)
    runtime = trainer.run.rollout.runtime

    def terminated():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        runtime.stop_if_asked()

    trainer.run.rollout.runtime = dataclasses.replace(runtime, stop_if_asked=terminated)
    trainer.sample(1)  # not stopped, but the run is, as soon as it begins
    trainer.train()
    trainer.run.rollout.runtime = runtime
    assert len(trainer.sample(2)["completion"]) == 2, "the signal is dealt with"
    assert not trainer.state.global_step
    assert "terminated before the first update; start again: draws and costs so far are kept" in caplog.text


@pytest.mark.slow
def test_sigterm_stops_a_run_in_another_thread(make, no_grace, tmp_path):
    """Its handler was set where the trainer was made."""
    before = signal.getsignal(signal.SIGTERM)
    trainer = make(callbacks=[TerminateAt(5)], enable_jit_checkpoint=True, save_strategy="no")
    thread = threading.Thread(target=trainer.train)
    try:
        thread.start()
        thread.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert trainer.state.global_step == 6
    assert (tmp_path / "out" / "checkpoint-6").is_dir()


def untimed(trainer):
    """The rungs' figures without durations, as text: `NaN` is then equal to itself."""
    return [
        json.dumps({name: value for name, value in rung.items() if not name.startswith("seconds_")})
        for rung in trainer.record.rungs
    ]
