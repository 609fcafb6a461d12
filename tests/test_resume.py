"""A run that is interrupted anywhere and resumed gives the numbers of a run left alone, bit for bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import count_a, lora, lora_config, tiny_gpt2
from safetensors.torch import load_file

from aldrift_hf import ALDRIFTTrainer, checkpoint
from aldrift_hf.proposals import stream_seed

# Dropout, so that the Trainer's random state matters; 4 updates a rung and 3 rungs make 12 updates.
KINDS = {
    "adapter-off": lambda: (tiny_gpt2(dropout=0.1), lora_config(tiny_gpt2(), dropout=0.1)),
    "peft-model": lambda: (lora(tiny_gpt2(dropout=0.1), dropout=0.1, seed=3), None),
    "full": lambda: (tiny_gpt2(dropout=0.1), None),
}


def trainer_of(kind, settings, tokenizer):
    model, peft_config = KINDS[kind]()
    return ALDRIFTTrainer(
        model, count_a, settings, train_dataset=["", "a b"], processing_class=tokenizer, peft_config=peft_config
    )


def outcome(trainer):
    """Everything that must not differ: parameters, records without their seconds, log, counters."""
    records = [
        {key: value for key, value in record.items() if not key.startswith("seconds")}
        for record in map(json.loads, Path(trainer.args.output_dir, "rungs.jsonl").read_text().splitlines())
    ]
    logs = [
        {key: value for key, value in log.items() if not key.startswith("seconds")}
        for log in trainer.state.log_history
        if "rung" in log
    ]
    state = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    progress = trainer.progress
    return state, (records, logs, progress.log_z, progress.proposals, trainer.objective.cache)


def assert_same(resumed, alone):
    assert resumed[1] == alone[1]
    assert resumed[0].keys() == alone[0].keys()
    for name, tensor in alone[0].items():
        assert torch.equal(resumed[0][name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_from_any_checkpoint_the_run_is_the_same(kind, config, tokenizer, tmp_path):
    """Checkpoints in mid-rung (1, 3, 6, 11) and of a rung's last update (4, 8, 12), in the first rung and later."""
    save = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    whole = trainer_of(kind, config(output_dir=str(tmp_path / "whole"), **save), tokenizer)
    whole.train()
    alone = outcome(whole)
    for step in (1, 3, 4, 6, 8, 11, 12):
        resumed = trainer_of(kind, config(output_dir=str(tmp_path / f"from-{step}"), **save), tokenizer)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(outcome(resumed), alone)


def test_resumed_from_an_epochs_checkpoint(config, tokenizer, tmp_path):
    save = {"save_strategy": "epoch", "save_total_limit": None, "lr_scheduler_type": "linear"}
    whole = trainer_of("adapter-off", config(output_dir=str(tmp_path / "whole"), **save), tokenizer)
    whole.train()
    resumed = trainer_of("adapter-off", config(output_dir=str(tmp_path / "resumed"), **save), tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same(outcome(resumed), outcome(whole))


@pytest.mark.parametrize("kind", ["adapter-off", "full"])
def test_resumed_with_the_archive(kind, config, tokenizer, tmp_path):
    """In mid-rung, and from a rung's last update; the window has forgotten a rung by then."""
    save = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    save |= {"sampler": "archive", "archive_window": 2}
    whole = trainer_of(kind, config(output_dir=str(tmp_path / "whole"), **save), tokenizer)
    whole.train()
    for step in (3, 4, 6, 8, 11):
        resumed = trainer_of(kind, config(output_dir=str(tmp_path / f"from-{step}"), **save), tokenizer)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(outcome(resumed), outcome(whole))


def test_resumed_with_gradient_accumulation(config, tokenizer, tmp_path):
    save = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": None, "gradient_accumulation_steps": 2}
    whole = trainer_of("adapter-off", config(output_dir=str(tmp_path / "whole"), **save), tokenizer)
    whole.train()
    resumed = trainer_of("adapter-off", config(output_dir=str(tmp_path / "resumed"), **save), tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert_same(outcome(resumed), outcome(whole))


def test_a_budget_spent_before_the_interruption_stays_spent(config, tokenizer, tmp_path):
    save = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None, "max_objective_calls": 5}
    whole = trainer_of("adapter-off", config(output_dir=str(tmp_path / "whole"), **save), tokenizer)
    whole.train()
    assert whole.state.global_step == 4
    for step in (2, 4):
        resumed = trainer_of("adapter-off", config(output_dir=str(tmp_path / f"from-{step}"), **save), tokenizer)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.state.global_step == 4
        assert_same(outcome(resumed), outcome(whole))


def test_a_checkpoint_holds_everything(config, tokenizer, tmp_path):
    trainer = trainer_of("adapter-off", config(save_strategy="epoch"), tokenizer)
    trainer.train()
    folder = Path(trainer.args.output_dir, "checkpoint-12")
    assert {checkpoint.STATE_FILE, checkpoint.SAMPLES_FILE, checkpoint.OBJECTIVE_FILE} <= set(os.listdir(folder))


def test_a_checkpoint_of_another_run_is_refused(config, tokenizer, tmp_path):
    trainer = trainer_of("adapter-off", config(save_strategy="epoch"), tokenizer)
    trainer.train()
    folder = os.path.join(trainer.args.output_dir, "checkpoint-12")
    other = trainer_of("adapter-off", config(updates_per_rung=5), tokenizer)
    with pytest.raises(ValueError, match="2 prompts and 16 training rows a rung; this run has 2 and 20"):
        other.train(resume_from_checkpoint=folder)
    os.remove(os.path.join(folder, checkpoint.STATE_FILE))
    with pytest.raises(ValueError, match=r"is not a checkpoint of ALDRIFTTrainer: it has no aldrift_state\.json"):
        trainer.train(resume_from_checkpoint=folder)


def test_the_accept_variates_of_a_rung_depend_on_its_address_alone(config, tokenizer):
    trainer = trainer_of("adapter-off", config(seed=5), tokenizer)
    first = torch.rand(3, generator=trainer._generator(1, 7))
    torch.manual_seed(99)
    assert torch.equal(torch.rand(3, generator=trainer._generator(1, 7)), first)
    assert trainer._generator(1, 7).initial_seed() == stream_seed(5, 1, 7)


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from conftest import count_a, lora_config, tiny_gpt2
from transformers import TrainerCallback
from aldrift_hf import ALDRIFTConfig, ALDRIFTTrainer
from aldrift_hf.problems.priors import word_tokenizer

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

model = tiny_gpt2(dropout=0.1)
config = ALDRIFTConfig(
    output_dir=sys.argv[1], tau_max=1.5, objective_range=3.0, tau_step=0.5, num_chains=16, chain_length=4,
    max_completion_length=3, generation_batch_size=32, per_device_train_batch_size=4, updates_per_rung=4,
    learning_rate=1e-2, disable_tqdm=True, use_cpu=True, save_strategy="steps", save_steps=5,
)
trainer = ALDRIFTTrainer(
    model, count_a, config, processing_class=word_tokenizer(["a", "b", "c"], " "),
    peft_config=lora_config(model, dropout=0.1), callbacks=[Kill()],
)
trainer.train(resume_from_checkpoint=sys.argv[3] == "resume")
trainer.save_model()
"""


def test_killed_in_mid_rung_and_resumed(tmp_path):
    """SIGKILL after update 7 of 12, three into the second rung; the last checkpoint is update 5's."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))

    def run(name, kill_at, how):
        arguments = [sys.executable, str(script), str(tmp_path / name), str(kill_at), how]
        return subprocess.run(arguments, capture_output=True, text=True, timeout=300)

    killed = run("interrupted", 7, "start")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(path.name for path in (tmp_path / "interrupted").glob("checkpoint-*")) == ["checkpoint-5"]
    resumed = run("interrupted", -1, "resume")
    assert resumed.returncode == 0, resumed.stderr
    alone = run("alone", -1, "start")
    assert alone.returncode == 0, alone.stderr
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("interrupted", "alone"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name

    def records(name):
        lines = map(json.loads, (tmp_path / name / "rungs.jsonl").read_text().splitlines())
        return [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in lines]

    assert records("interrupted") == records("alone")
