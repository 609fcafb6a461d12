"""What a run was asked for, as plain values: for its record, its report and its model card."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import fields
from importlib.metadata import version
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from ..models.prior import PRIOR_ADAPTER, base_model
from ..types import Prompts
from .config import ALDRIFTConfig

_OF_THE_TRAINER = (
    "learning_rate",
    "lr_scheduler_type",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "bf16",
    "fp16",
    "seed",
)
_NOT_OF_THE_RUN = ("model_init_kwargs", "log_completions", "overlap_objective")
"""Our settings that change nothing about the result, or may hold what is nobody's business (a token)."""
_PACKAGES = ("aldrift_hf", "transformers", "peft", "accelerate", "torch")


def settings_of(
    args: ALDRIFTConfig,
    model: nn.Module,
    objective: list[str],
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Settings of a run: no path but a model's, no token, nothing of the machine.

    Args:
        args: the trainer's.
        model: the policy, unwrapped.
        objective: names of the cost functions.
        prompts: what it draws for.
        tokenizer: whose vocabulary is meant.
    """
    own = {field.name for field in fields(ALDRIFTConfig)} - {field.name for field in fields(TrainingArguments)}
    asked = {name: getattr(args, name) for name in sorted(own - set(_NOT_OF_THE_RUN))}
    learning = {name: getattr(args, name) for name in _OF_THE_TRAINER}
    return {
        "base_model": base_model(model).config._name_or_path or None,
        "architecture": type(base_model(model)).__name__,
        "tuning": _tuning(model),
        "prior": _prior(model),
        "objective": objective,
        "vocabulary": _fingerprint(sorted((id, token) for token, id in tokenizer.get_vocab().items())),
        "prompts": len(prompts),
        "prompts_fingerprint": _fingerprint(prompts.keys),
        **asked,
        "chain_length": args.steps_per_chain,
        **learning,
        "processes": args.world_size,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    }


def _fingerprint(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _prior(model: nn.Module) -> str:
    if PRIOR_ADAPTER in getattr(model, "peft_config", {}):
        return f"the base model with the adapter {PRIOR_ADAPTER!r}"
    return "the base model"


def _tuning(model: nn.Module) -> str:
    bits = " on a base model in 4 bits" if getattr(base_model(model), "is_loaded_in_4bit", False) else ""
    if not isinstance(model, PeftModel):
        return "all parameters"
    config = model.peft_config[model.active_adapter]
    rank = f" of rank {config.r}" if hasattr(config, "r") else ""
    return f"{config.peft_type.value} adapter{rank}{bits}"
