"""What users of TRL's trainers are used to do: notebooks with several configs, subclasses, callbacks, cards."""

import functools

import pytest
from conftest import ALDRIFTTrainer, count_a, lora_config, tiny_gpt2
from huggingface_hub import ModelCard
from transformers import TrainerCallback

from aldrift_hf import from_reward
from aldrift_hf.objective.calling import ObjectiveError


@pytest.fixture
def make(config, tokenizer):
    """Makes trainers of a run of two rungs; keyword arguments change the settings."""

    def build(objective=count_a, callbacks=None, kind=ALDRIFTTrainer, prompts=None, **settings):
        model, args = tiny_gpt2(), config(**{"num_rungs": 2, **settings})
        parts = {"processing_class": tokenizer, "peft_config": lora_config(model), "callbacks": callbacks}
        return kind(model, objective, args, prompts, **parts)

    return build


# ---- Several configs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["sample", "evaluate", "train"])
def test_a_config_that_is_made_beside_a_trainer_leaves_both_usable(make, config, tokenizer, use):
    """As where the cell of a notebook that makes the settings is run again, with another precision."""
    first = make()
    model, args = tiny_gpt2(), config(num_rungs=1, bf16=True)
    {"sample": functools.partial(first.sample, 2), "evaluate": first.evaluate, "train": first.train}[use]()
    second = ALDRIFTTrainer(model, count_a, args, processing_class=tokenizer, peft_config=lora_config(model))
    assert second.accelerator.mixed_precision == "bf16"
    second.train()
    first.sample(2)


# ---- Subclasses and callbacks ----------------------------------------------------------------------------------------


def test_a_loss_with_a_term_of_ones_own_finds_its_inputs(make):
    class WithTerm(ALDRIFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            before = set(inputs)
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            assert set(inputs) == before
            return loss + 0.0 * inputs["attention_mask"].sum()

    trainer, plain = make(kind=WithTerm), make()
    trainer.train()
    plain.train()
    assert [rung["loss"] for rung in trainer.record.rungs] == [rung["loss"] for rung in plain.record.rungs]


class StopsTheEpoch(TrainerCallback):
    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step == self.after


def test_a_rung_that_a_callback_ends_early_is_refused(make):
    with pytest.raises(RuntimeError, match=r"should_epoch_stop after 3 of rung 0's 4 updates.*should_training_stop"):
        make(callbacks=[StopsTheEpoch(3)]).train()
    make(callbacks=[StopsTheEpoch(4)]).train()


def test_logs_by_epoch_have_the_gradients_norm(make):
    trainer = make(logging_strategy="epoch")
    trainer.train()
    assert sum("grad_norm" in row for row in trainer.state.log_history) == 2
    trainer = make(logging_strategy="no")
    trainer.train()
    assert not any("grad_norm" in row for row in trainer.state.log_history)


# ---- Resuming --------------------------------------------------------------------------------------------------------


def test_resumed_with_fewer_rungs_than_are_done(make):
    make(num_rungs=3, save_strategy="epoch").train()
    trainer = make(num_rungs=2, save_strategy="epoch")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.record.ended_by == "All of num_rungs=2 rungs were climbed."
    assert len(trainer.record.rungs) == 3


# ---- Rewards and cards -----------------------------------------------------------------------------------------------


def test_a_reward_above_the_best_one_says_by_how_much(make):
    reward = from_reward(lambda prompts, completions: [2.5] * len(completions))
    with pytest.raises(ValueError, match=r"returned -1\.5 .* negative.* best: by this row, 1\.5 higher"):
        make(reward).train()


def test_a_reward_that_reads_messages_is_told_apart(make, tokenizer):
    def reward(prompts, completions):
        return [float(len(completion[0]["content"])) for completion in completions]

    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    trainer = make(reward, prompts=[{"prompt": [{"role": "user", "content": "a"}]}])
    with pytest.raises(ObjectiveError, match=r"raised TypeError: .*use from_reward\(reward\)"):
        trainer.train()


@pytest.mark.parametrize("name", ["dataset_name", "dataset_tags"])
def test_a_card_links_the_data_set(make, tmp_path, name):
    trainer = make(num_rungs=1)
    trainer.train()
    trainer.create_model_card(**{name: "me/prompts"})
    assert ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()["datasets"] == "me/prompts"
    trainer.create_model_card(**{name: None})
    assert "datasets" not in ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
