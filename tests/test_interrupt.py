"""Ctrl-C: a checkpoint at the next safe point; a second one ends a run at once."""

import os
import signal

import pytest
import torch
from conftest import count_a, lora_config, tiny_gpt2
from transformers import TrainerCallback

from aldrift_hf import ALDRIFTTrainer


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


def test_the_first_stops_after_the_update_with_a_checkpoint(make, tmp_path, caplog):
    alone = make(output_dir=str(tmp_path / "alone"))
    alone.train()
    trainer = make(callbacks=[PressAt(5)])
    with pytest.raises(KeyboardInterrupt, match="stopped after update 6; go on with resume_from_checkpoint=True"):
        trainer.train()
    assert "stopping at the next safe point, with a checkpoint" in caplog.text
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    assert same(resumed, alone)


def test_between_rounds_of_proposals_too(make, tmp_path):
    """The checkpoint is that of the last update."""
    settings = {"save_strategy": "no", "per_device_generation_batch_size": 8, "num_generations": 256}
    alone = make(output_dir=str(tmp_path / "alone"), **settings)
    alone.train()
    trainer = make(**settings)
    stop_if_asked, rounds = trainer.proposer.between_rounds, []

    def in_the_second_rung():
        rounds.append(trainer.state.global_step)
        if rounds.count(4) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        stop_if_asked()

    trainer.proposer.between_rounds = in_the_second_rung
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


def test_outside_of_training_ctrl_c_is_as_ever(make):
    trainer, before = make(), signal.getsignal(signal.SIGINT)
    trainer.train()
    assert signal.getsignal(signal.SIGINT) is before
