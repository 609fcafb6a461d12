"""What comes with a model, given by name or as an object: its weights, its tokenizer, its limits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from . import adapters, sharding
from .prior import base_model

InitKwargs = Mapping[str, Any] | str | None
"""`model_init_kwargs` of the settings: keyword arguments of `from_pretrained`. Text has become a mapping by then."""

NO_FOREIGN_CODE = {"trust_remote_code": False}
"""Said explicitly: where it is left open, transformers asks whoever sits at the terminal."""

_PLACE = ("token", "cache_dir", "local_files_only", "revision", "subfolder")


def own_device() -> dict[str, int] | None:
    """The device map of a quantized model, which cannot be moved after loading: each process's own accelerator."""
    return {"": PartialState().local_process_index} if torch.accelerator.is_available() else None


def load_model(model_id: str, init_kwargs: InitKwargs, adapter: bool) -> PreTrainedModel | PeftModel:
    """The model of an id or path; an `adapter` is loaded on its base model, ready to be trained on.

    Raises:
        OSError: if there is none.
        ValueError: if it cannot be loaded with `model_init_kwargs`.
    """
    kwargs = {"dtype": "float32", **NO_FOREIGN_CODE, **_mapping(init_kwargs)}
    if "quantization_config" in kwargs:
        kwargs.setdefault("device_map", own_device())
    try:
        if adapter:
            return cast(PeftModel, AutoPeftModelForCausalLM.from_pretrained(model_id, is_trainable=True, **kwargs))
        return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(model_id, **kwargs))
    except (TypeError, AttributeError, KeyError) as error:
        if not init_kwargs:
            raise
        names = ", ".join(_mapping(init_kwargs))
        raise ValueError(f"{model_id} cannot be loaded with model_init_kwargs ({names}): {error}") from error


def load_trained(policy: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Put the weights that a run saved in `folder` into a policy made like that run's.

    Raises:
        ValueError, OSError, RuntimeError: if they are not there, or do not fit.
    """
    if isinstance(policy, PeftModel):
        adapters.load_active(policy, folder)
    else:  # through transformers, which handles shards and tied weights
        policy.load_state_dict(type(policy).from_pretrained(folder, dtype=policy.dtype).state_dict())


def check_trainable(config: PreTrainedConfig, init_kwargs: InitKwargs, adapter: bool) -> None:
    """Refuse a model that could not be fine-tuned towards `p_T`.

    Args:
        config: the transformers model's, without adapter.
        init_kwargs: what the model is loaded with, which may change its config.
        adapter: whether an adapter is trained, and not the model itself.

    Raises:
        ValueError: with what to change.
    """
    settings = {**config.get_text_config().to_dict(), **_mapping(init_kwargs)}
    if settings.get("output_router_logits"):
        raise ValueError(
            "the model's config asks for the router's auxiliary loss (output_router_logits=True). It balances the "
            "load of the experts and pulls the model away from p_T, so it is not part of the loss here: set "
            "output_router_logits=False, in model.config or in model_init_kwargs."
        )
    if not adapter and (settings.get("quantization_config") or getattr(config, "quantization_config", None)):
        raise ValueError(
            "a quantized model cannot be fine-tuned in full. Pass a peft_config: its adapter is trained, and the "
            "quantized model is the prior."
        )


def is_adapter(model: str | PreTrainedModel | PeftModel, init_kwargs: InitKwargs) -> bool:
    """Whether a model comes with an adapter on it.

    Raises:
        ValueError: where there is no such model.
    """
    if not isinstance(model, str):
        return isinstance(model, PeftModel)
    with _found(model):
        return find_adapter_config_file(model, **_some(init_kwargs, *_PLACE)) is not None


def tokenizer_of(model: str | PreTrainedModel | PeftModel, init_kwargs: InitKwargs) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model.

    Raises:
        ValueError: where none can be found.
    """
    name = model if isinstance(model, str) else base_model(model).config._name_or_path
    kwargs = _some(init_kwargs, "revision", "trust_remote_code", "token", "cache_dir", "local_files_only")
    if not name:
        raise ValueError("the model does not say which tokenizer it belongs to; pass it as processing_class.")
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(name, **kwargs))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer could be loaded for {name!r}; pass it as processing_class. ({error})"
        ) from error


def config_of(model: str | PreTrainedModel | PeftModel, init_kwargs: InitKwargs, adapter: bool) -> PreTrainedConfig:
    """A model's config, or that of an `adapter`'s base model, without loading weights.

    Raises:
        ValueError: where there is no such model.
    """
    if not isinstance(model, str):
        return base_model(model).config
    name, place = model, _some(init_kwargs, *_PLACE)
    with _found(model):
        if adapter:
            name = str(PeftConfig.from_pretrained(model, **place).base_model_name_or_path)
            place = {key: value for key, value in place.items() if key not in ("revision", "subfolder")}
        return AutoConfig.from_pretrained(name, **place, **_some(init_kwargs, "trust_remote_code"))


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a completion: those of the generation config, and the tokenizer's own."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = {int(cast(int, tokenizer.eos_token_id)), *([own] if isinstance(own, int) else own or [])}
    # A configuration class can carry its family's default id into a model with a smaller vocabulary.
    vocabulary = sharding.vocabulary_size(model)
    return tuple(sorted(token for token in ids if token < vocabulary))


def context_length(config: PreTrainedConfig) -> int | None:
    """Most positions that a model can attend to, where its config says so."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if length is None else int(length)


@contextlib.contextmanager
def _found(model: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"model {model!r} cannot be loaded, from a local folder or from the Hub: {error}") from error


def _mapping(init_kwargs: InitKwargs) -> dict[str, Any]:
    return dict(cast(Mapping[str, Any], init_kwargs or {}))


def _some(init_kwargs: InitKwargs, *names: str) -> dict[str, Any]:
    """Some of the keyword arguments: those that say where the model is, and whether to trust its code."""
    kwargs = NO_FOREIGN_CODE | _mapping(init_kwargs)
    return {name: kwargs[name] for name in names if name in kwargs}
