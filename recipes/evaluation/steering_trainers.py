"""Steering tasks by trainers: ALDRIFT's, and TRL's with `beta = 1/T`, where RLOO's optimum is p_T as well."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from problems.steering import SteeringTask
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from aldrift_hf import ALDRIFTConfig, ALDRIFTTrainer
from aldrift_hf.models.adapters import cast_trained
from aldrift_hf.reporting.record import replace_file
from evaluation.baselines import TRL
from evaluation.steering_setting import Setting

RUNG = 512
"""Calls per rung of ALDRIFT."""
SAVE_STEPS = 8
"""Updates between two checkpoints of TRL's trainers."""
GENERATIONS = 8
"""Completions per prompt in an update, at least, of methods that compare those of one prompt."""


@dataclass
class Job:
    """A run at work.

    Attributes:
        setting: what it is.
        task: the task.
        model: the prior, without an adapter.
        tokenizer: its tokenizer.
        folder: for checkpoints.
    """

    setting: Setting
    task: SteeringTask
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path

    @property
    def lora(self) -> LoraConfig:
        """The adapter that every method trains: α and the rank of TRL's command line, then what `--lora` sets."""
        settings = {
            "task_type": "CAUSAL_LM",
            "r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "target_modules": "all-linear",
            "fan_in_fan_out": self.model.config.model_type == "gpt2",
        }
        return LoraConfig(**settings | self.setting.lora)

    @property
    def training(self) -> dict[str, Any]:
        """Settings of `TrainingArguments` that the trainers share."""
        return {
            **self.surroundings,
            "learning_rate": self.setting.learning_rate,
            "lr_scheduler_type": "constant",
            "gradient_accumulation_steps": 1,
            "max_grad_norm": 1.0,
        }

    @property
    def surroundings(self) -> dict[str, Any]:
        """Those of them that are not about learning."""
        setting = self.setting
        return {
            "output_dir": str(self.folder),
            "per_device_train_batch_size": setting.batch_size,
            "max_completion_length": self.task.max_completion_length,
            "gradient_checkpointing": setting.gradient_checkpointing,
            "seed": setting.seed,
            "bf16": setting.autocast,
            "report_to": "none",
            "disable_tqdm": True,
            "logging_strategy": "no",
            "use_cpu": not torch.accelerator.is_available(),
        }


def generations(job: Job) -> int:
    """Completions per prompt in an update."""
    size = job.setting.batch_size
    return max(size // len(job.task.rows), min(size, GENERATIONS))


def set_precision(model: PeftModel, setting: Setting) -> PeftModel:
    """The model, its adapter in the setting's precision."""
    if setting.precision == "bf16_lora":
        cast_trained(model, torch.bfloat16)
    return model


# ---- ALDRIFT ---------------------------------------------------------------------------------------------------------


def aldrift_config(job: Job) -> ALDRIFTConfig:
    """ALDRIFT's settings: equal steps to T, which the last rung reaches, and an update per batch of calls.

    The method `defaults` leaves all of this open. Settings of `--aldrift` come last; the number of proposals and
    updates follows from them where they are not among them.
    """
    setting, prompts = job.setting, len(job.task.rows)
    fixed = {
        "tau_max": job.task.tau_max,
        "objective_range": job.task.worst_cost,
        "max_objective_calls": setting.calls,  # the final model is not measured on more
        "save_strategy": "epoch",
        "save_total_limit": 1,
    }
    if setting.method == "defaults":
        return ALDRIFTConfig(**job.surroundings | fixed)
    rungs = int(setting.aldrift.get("num_rungs", max(2, setting.calls // RUNG)))
    per_prompt = int(setting.aldrift.get("num_generations", setting.calls // (rungs * prompts)))
    settings = {
        **job.training,
        **fixed,
        "tau_step": job.task.tau_max / rungs,
        "num_rungs": rungs,
        "num_generations": per_prompt,
        "chain_length": 1,
        "updates_per_rung": max(1, per_prompt * prompts // setting.batch_size),
    }
    return ALDRIFTConfig(**settings | setting.aldrift)


def aldrift_trainer(job: Job) -> ALDRIFTTrainer:
    """The trainer, before its first rung."""
    rows = Dataset.from_list(list(job.task.rows))
    return ALDRIFTTrainer(
        job.model,
        job.task.cost,
        aldrift_config(job),
        train_dataset=rows,
        processing_class=job.tokenizer,
        peft_config=job.lora,
        callbacks=[TimeSpent(job.folder)],
    )


def aldrift(job: Job) -> tuple[PeftModel, int]:
    """Train with ALDRIFT, or go on from the last checkpoint; the model and its number of calls."""
    trainer = aldrift_trainer(job)
    set_precision(cast(PeftModel, trainer.model), job.setting)
    trainer.train(resume_from_checkpoint=any(job.folder.glob("checkpoint-*")))
    return cast(PeftModel, trainer.model), int(trainer.record.rungs[-1]["proposals"])


class TimeSpent(TrainerCallback):
    """Keeps the CPU time of a run at each checkpoint, for the time of an interrupted run is that of its parts."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "spent.json"
        self.began, self.before = time.process_time(), cpu_seconds_before(folder)

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        replace_file(self.path, [json.dumps(self.before + time.process_time() - self.began)])


def cpu_seconds_before(folder: Path) -> float:
    """CPU time of a run up to the checkpoint that it goes on from."""
    path = folder / "spent.json"
    return float(json.loads(path.read_text())) if path.exists() else 0.0


# ---- TRL -------------------------------------------------------------------------------------------------------------


def policy_gradient(job: Job) -> tuple[PeftModel, int]:
    """Train with one of TRL's trainers, or go on from the last checkpoint; the model and its number of calls.

    One update follows each batch of completions.
    """
    trainer_class, config_class, own_settings = TRL[job.setting.method]
    updates = job.setting.calls // job.setting.batch_size
    args = config_class(
        **job.training,
        beta=1 / job.task.tau_max,
        num_generations=generations(job),
        max_steps=updates,
        disable_dropout=True,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        **own_settings,
    )
    tokenizer = job.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    set_seed(job.setting.seed)  # TRL 1.0 makes the adapter before it sets the seed
    trainer = trainer_class(
        job.model,
        reward_of(job.task.cost),
        args=args,
        train_dataset=Dataset.from_list(list(job.task.rows)),
        processing_class=tokenizer,
        peft_config=job.lora,
        callbacks=[TimeSpent(job.folder)],
    )
    set_precision(trainer.model, job.setting)
    trainer.train(resume_from_checkpoint=any(job.folder.glob("checkpoint-*")))
    return trainer.accelerator.unwrap_model(trainer.model), updates * job.setting.batch_size


def reward_of(cost: Callable[..., list[float]]) -> Callable[..., list[float]]:
    """TRL's reward function `-d`. TRL passes a chat's answers as messages, and more columns than the cost takes."""
    names = [name for name in inspect.signature(cost).parameters if name not in ("prompts", "completions")]

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        texts = [answer if isinstance(answer, str) else answer[0]["content"] for answer in completions]
        return [-value for value in cost(prompts, texts, **{name: columns[name] for name in names})]

    return reward
