"""The settings of a run as plain values, for its record, its report and its model card."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import version
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from ..algorithm.ladders import LADDERS, Ladder
from ..algorithm.losses import LOSSES, Loss
from ..algorithm.samplers import SAMPLERS, Sampler
from ..models.engines import ENGINES, Engine
from ..models.loading import mapping_of
from ..models.prior import FrozenAdapter, Prior, base_model
from ..types import Prompts
from .config import ALDRIFTConfig
from .validation import name_of, own_fields

_OF_THE_TRAINER = (
    *("learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("weight_decay", "bf16", "fp16", "seed"),
)
"""Settings of `TrainingArguments` that are recorded."""
_NOT_RECORDED = ("model_init_kwargs", "engine_kwargs", "log_completions", "overlap_objective")
"""ALDRIFT's own settings that do not affect the result, or that may hold a token."""
_PACKAGES = ("aldrift_hf", "transformers", "peft", "accelerate", "torch")


def settings_of(
    args: ALDRIFTConfig,
    model: nn.Module,
    prior: Prior,
    objective_names: list[str],
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sampler: Sampler,
    ladder: Ladder,
    loss: Loss,
    engine: Engine,
) -> dict[str, Any]:
    """The settings of a run as they were asked for, without tokens or paths other than the model's.

    What a run finds out by itself (the objective's range, the number of rungs) is not here but in its record.

    Args:
        args: the trainer's settings.
        model: the policy, unwrapped.
        prior: what the policy is turned into the prior by.
        objective_names: names of the cost functions.
        prompts: the training prompts.
        tokenizer: the tokenizer, whose vocabulary is recorded as a hash.
        sampler, ladder, loss, engine: the run's parts. The built-in ones are recorded by their names in the settings,
            the user's own by the names of their classes.

    Returns:
        Values that JSON can hold: those of `args`, with the parts' names in place of the names asked for, and what the
        model is (`base_model`, `architecture`, `loaded` (its revision and precision, as options of the command line),
        `tuning`, `adapter_name` (`None` for full fine-tuning), `prior`, `prior_adapter` (the name of the frozen adapter
        that it has, if any)). `loss` is the loss that is minimised where `loss_type` is `None`, and `corrects` says
        whether the sampler aims at `p_T`.
    """
    prior_adapter = prior.name if isinstance(prior, FrozenAdapter) else None
    asked = {field.name: getattr(args, field.name) for field in own_fields(ALDRIFTConfig)}
    return {
        "base_model": base_model(model).config._name_or_path or None,
        "architecture": type(base_model(model)).__name__,
        "loaded": _loaded(args, model),
        "tuning": _tuning(model),
        "adapter_name": model.active_adapter if isinstance(model, PeftModel) else None,
        "prior": "the base model" if prior_adapter is None else f"the base model with the adapter {prior_adapter!r}",
        "prior_adapter": prior_adapter,
        "objective": objective_names,
        "vocabulary": _fingerprint(sorted((id, token) for token, id in tokenizer.get_vocab().items())),
        "prompts": len(prompts),
        "prompts_fingerprint": _fingerprint(prompts.keys),
        **{name: asked[name] for name in sorted(asked) if name not in _NOT_RECORDED},
        "chain_length": args.steps_per_chain,
        "sampler": name_of(sampler, SAMPLERS),
        "corrects": sampler.corrects,
        "ladder": name_of(ladder, LADDERS),
        "loss": name_of(loss, LOSSES),
        "engine": name_of(engine, ENGINES),
        **{name: getattr(args, name) for name in _OF_THE_TRAINER},
        "processes": args.world_size,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    }


def _fingerprint(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _loaded(args: ALDRIFTConfig, model: nn.Module) -> dict[str, Any]:
    base = base_model(model)
    revision = mapping_of(args.model_init_kwargs).get("revision")
    if isinstance(model, PeftModel):  # of a prior with an adapter, the other one is the adapter's
        revision = model.peft_config[model.active_adapter].revision
    loaded = {"model_revision": revision or "main", "dtype": str(base.dtype).removeprefix("torch.")}
    bits = getattr(base.config, "quantization_config", None)
    if not isinstance(bits, BitsAndBytesConfig):
        return loaded
    if bits.load_in_8bit:
        return loaded | {"load_in_8bit": True}
    kind, nested = bits.bnb_4bit_quant_type, bits.bnb_4bit_use_double_quant
    return loaded | {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "use_bnb_nested_quant": nested}


def _tuning(model: nn.Module) -> str:
    widths = (bits for bits in (4, 8) if getattr(base_model(model), f"is_loaded_in_{bits}bit", False))
    bits = next((f" on a base model in {width} bits" for width in widths), "")
    if not isinstance(model, PeftModel):
        return "all parameters"
    config = model.peft_config[model.active_adapter]
    rank = f" of rank {config.r}" if hasattr(config, "r") else ""
    return f"{config.peft_type.value} adapter{rank}{bits}"
