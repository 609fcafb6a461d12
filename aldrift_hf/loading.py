"""What a model brings along when it is passed in, by name or as an object: its weights, its tokenizer, its limits."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from . import sharding
from .config import ALDRIFTConfig
from .prior import base_model


def check_writable(output_dir: str) -> None:
    """Make the output directory and try it.

    Raises:
        OSError: naming it and the remedy.
    """
    try:
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise OSError(
            f"output_dir {output_dir!r} cannot be written: {error}. Choose another one, or change its permissions."
        ) from error


def own_device() -> dict[str, int] | None:
    """Where a quantized model is loaded to, for it cannot be moved there later: each process's own accelerator."""
    return {"": PartialState().local_process_index} if torch.accelerator.is_available() else None


NO_FOREIGN_CODE = {"trust_remote_code": False}
"""Said outright: where it is left open, transformers asks whoever sits at the terminal."""


def load_model(model_id: str, args: ALDRIFTConfig) -> PreTrainedModel | PeftModel:
    """The model of an id or path; an adapter's is loaded on its base model, ready to be trained on."""
    kwargs = {"dtype": "float32", **NO_FOREIGN_CODE, **cast(dict[str, Any], args.model_init_kwargs or {})}
    if "quantization_config" in kwargs:
        kwargs.setdefault("device_map", own_device())
    if find_adapter_config_file(model_id, revision=kwargs.get("revision")) is not None:
        return cast(PeftModel, AutoPeftModelForCausalLM.from_pretrained(model_id, is_trainable=True, **kwargs))
    return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(model_id, **kwargs))


def load_trained(policy: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Put the weights that a run saved in `folder` into a policy made as that run's was.

    Raises:
        ValueError, OSError, RuntimeError: if they are not there, or do not fit.
    """
    if isinstance(policy, PeftModel):
        name = policy.active_adapter
        policy.load_adapter(str(folder if name == "default" else folder / name), name, is_trainable=True)
    else:  # by transformers, which knows of shards and tied weights
        policy.load_state_dict(type(policy).from_pretrained(folder, dtype=policy.dtype).state_dict())


def check_trainable(model: PreTrainedModel, adapter: bool) -> None:
    """Refuse a model that could not be fine-tuned towards `p_T`.

    Args:
        model: the transformers model, without adapter.
        adapter: whether an adapter is trained, and not the model itself.

    Raises:
        ValueError: with what to change.
    """
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise ValueError(
            "the model's config asks for the router's auxiliary loss (output_router_logits=True). It balances the "
            "experts' load and pulls the model away from p_T, so it is no part of what is learnt here: set "
            "model.config.output_router_logits=False."
        )
    if not adapter and getattr(model, "is_quantized", False):
        raise ValueError(
            "a quantized model cannot be fine-tuned in full. Pass a peft_config: its adapter is trained, and the "
            "quantized model is the prior."
        )


def tokenizer_of(model: str | PreTrainedModel | PeftModel, args: ALDRIFTConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model.

    Raises:
        ValueError: where there is none to be found.
    """
    name = model if isinstance(model, str) else base_model(model).config._name_or_path
    given = cast(dict[str, Any], args.model_init_kwargs or {})
    kwargs = NO_FOREIGN_CODE | {
        key: given[key] for key in ("revision", "trust_remote_code", "token", "cache_dir") if key in given
    }
    if not name:
        raise ValueError("the model does not say which tokenizer it belongs to; pass it as processing_class.")
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(name, **kwargs))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer could be loaded for {name!r}; pass it as processing_class. ({error})"
        ) from error


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Any of the generation config's end-of-text tokens ends a completion, and the tokenizer's own."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = {int(cast(int, tokenizer.eos_token_id)), *([own] if isinstance(own, int) else own or [])}
    # A configuration class can carry its family's default id into a model with a smaller vocabulary.
    vocabulary = sharding.vocabulary_size(model)
    return sorted(token for token in ids if token < vocabulary)


def context_length(model: PreTrainedModel) -> int | None:
    """Most positions that the model can attend to, where its config says so."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if length is None else int(length)
