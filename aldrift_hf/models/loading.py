"""What comes with a model, given by name or as an object: its weights, its tokenizer, its limits."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel, PeftModelForCausalLM, load_peft_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from . import adapters, gguf_files, kinds, quiet
from .configs import numbers, text_config
from .prior import base_model

InitKwargs = Mapping[str, Any] | str | None
"""`model_init_kwargs` of the settings: keyword arguments of `from_pretrained`. Text has become a mapping by then."""

NO_FOREIGN_CODE = {"trust_remote_code": False}
"""Said explicitly: where it is left open, transformers asks whoever sits at the terminal."""

_PLACE = ("token", "cache_dir", "local_files_only", "revision", "subfolder")
_PLACE_OF_ADAPTER = ("revision", "subfolder")
"""Of these, what holds for an adapter and not for its base model."""


def own_device() -> dict[str, int] | None:
    """The device map of a quantized model, which cannot be moved after loading: each process's own accelerator."""
    return {"": PartialState().local_process_index} if torch.accelerator.is_available() else None


def load_model(model_id: str, init_kwargs: InitKwargs, adapter: bool) -> PreTrainedModel | PeftModel:
    """The model of an id or path (also of a GGUF file); an `adapter` is loaded on its base model, to be trained on.

    Raises:
        OSError: if there is none.
        ValueError: if it cannot be loaded with `model_init_kwargs`, or if a part of it would not be loaded, but made at
            random.
    """
    asked = {"dtype" if name == "torch_dtype" else name: value for name, value in mapping_of(init_kwargs).items()}
    kwargs = {"dtype": "float32", **NO_FOREIGN_CODE, **asked}  # transformers would prefer our dtype to a torch_dtype
    if "quantization_config" in kwargs:
        kwargs.setdefault("device_map", own_device())
    try:
        return _load_adapter(model_id, kwargs) if adapter else _load_whole(model_id, kwargs)
    except (TypeError, AttributeError, KeyError) as error:
        if not init_kwargs:
            raise
        names = ", ".join(mapping_of(init_kwargs))
        raise ValueError(f"{model_id} cannot be loaded with model_init_kwargs ({names}): {error}") from error


def _load_whole(model_id: str, kwargs: dict[str, Any]) -> PreTrainedModel:
    """A model all of whose parameters come from its checkpoint."""
    gguf_files.check_kwargs(model_id, kwargs)
    place, file = gguf_files.source(model_id)
    with gguf_files.read(model_id), quiet.late_bars():
        model, report = AutoModelForCausalLM.from_pretrained(
            place, output_loading_info=True, **kwargs | file | gguf_files.unpacked(model_id)
        )
    gguf_files.name_after(model, model_id)
    unknown = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    made_up = [name for name, _ in model.named_parameters() if name in unknown]  # tied weights are listed once
    if made_up:
        raise ValueError(
            f"the checkpoint of {model_id} has no weights for {', '.join(made_up[:3])}"
            f"{f' and {len(made_up) - 3} more' if len(made_up) > 3 else ''}, which were made at random, and so would "
            "be the prior. Pass a checkpoint of a causal language model."
        )
    return cast(PreTrainedModel, model)


def _load_adapter(model_id: str, kwargs: dict[str, Any]) -> PeftModel:
    """An adapter all of whose parameters come from its checkpoint, on its base model."""
    place = {name: value for name, value in kwargs.items() if name in _PLACE}
    config = PeftConfig.from_pretrained(model_id, **place)
    config.inference_mode = False
    for_base = {name: value for name, value in kwargs.items() if name not in _PLACE_OF_ADAPTER}
    base = _load_whole(str(config.base_model_name_or_path), for_base | _revision_of_base(config))
    renamed = getattr(base, "_checkpoint_conversion_mapping", None) or None
    _resize(base, config, load_peft_weights(model_id, device="cpu", key_mapping=renamed, **place))
    with quiet.new_adapter():
        model = PeftModelForCausalLM(base, config)
    try:
        result = cast(Any, model.load_adapter(model_id, "default", is_trainable=True, key_mapping=renamed, **place))
    except RuntimeError as error:  # a size mismatch
        reason = " ".join(str(error).split())
        raise ValueError(f"the adapter {model_id} does not fit its base model: {reason}") from error
    missing = [name for name in result.missing_keys if "vblora_vector_bank" not in name]  # saved once, for all layers
    if missing or result.unexpected_keys:
        wrong, what = (missing, "lacks") if missing else (result.unexpected_keys, "has other parameters:")
        raise ValueError(
            f"the adapter {model_id} does not fit its base model {config.base_model_name_or_path}: it {what} "
            f"{', '.join(wrong[:3])} ({len(wrong)} in all), so the prior would not be what was saved. Load the model "
            "that it was trained on, and pass a PeftModel."
        )
    return model


def _resize(base: PreTrainedModel, config: PeftConfig, weights: Mapping[str, torch.Tensor]) -> None:
    """Give the base model as many tokens as it had when the adapter was saved with embeddings of its own."""
    embeddings = base.get_input_embeddings()
    name = next(name for name, module in base.named_modules() if module is embeddings)
    saved = [
        weights[key] for part in ("", "base_layer.") if (key := f"base_model.model.{name}.{part}weight") in weights
    ]
    trained = getattr(config, "trainable_token_indices", None) or []
    indices = [index for each in trained.values() for index in each] if isinstance(trained, dict) else trained
    size = len(saved[0]) if saved else max([len(embeddings.weight), *(index + 1 for index in indices)])
    if size != len(embeddings.weight):
        base.resize_token_embeddings(size)


def at_revision(config: PeftConfig | None, init_kwargs: InitKwargs) -> PeftConfig | None:
    """The settings of an adapter with the revision of its base model, at which PEFT loads that again.

    Args:
        config: the settings, which are not changed.
        init_kwargs: what the base model was loaded with.
    """
    revision = mapping_of(init_kwargs).get("revision")
    if config is not None and revision is not None:
        config = copy.deepcopy(config)
        config.revision = revision
    return config


def _revision_of_base(config: PeftConfig) -> dict[str, str]:
    return {} if config.revision is None else {"revision": config.revision}


def load_trained(policy: PreTrainedModel | PeftModel, folder: Path, adapter_name: str | None) -> None:
    """Put the weights that a run saved in `folder` into a policy made like that run's.

    Args:
        policy: takes the weights.
        folder: the run's output directory.
        adapter_name: the name that the trained adapter had in the run; `None` for full fine-tuning.

    Raises:
        ValueError, OSError, RuntimeError: if they are not there, or do not fit.
    """
    if isinstance(policy, PeftModel):
        adapters.load_active(policy, folder, adapter_name)
    else:  # through transformers, which handles shards and tied weights
        with quiet.late_bars():
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
    settings = {**text_config(config).to_dict(), **mapping_of(init_kwargs)}
    if settings.get("output_router_logits"):
        raise ValueError(
            "the model's config asks for the router's auxiliary loss (output_router_logits=True). It balances the "
            "load of the experts and pulls the model away from p_T, so it is not part of the loss here: set "
            "output_router_logits=False, in model.config or in model_init_kwargs."
        )
    quantized = settings.get("quantization_config") or getattr(config, "quantization_config", None)
    how: dict[str, Any] = cast(Any, quantized).to_dict() if hasattr(quantized, "to_dict") else quantized or {}
    if (how.get("load_in_8bit") or how.get("_load_in_8bit")) and how.get("llm_int8_threshold", 6.0):
        raise ValueError(
            "LLM.int8 chooses outlier columns by the whole batch, so that log-probabilities depend on other texts and "
            "on later tokens. Load the model in 4 bits (load_in_4bit), or pass BitsAndBytesConfig(load_in_8bit=True, "
            "llm_int8_threshold=0.0)."
        )
    if not adapter and quantized:
        raise ValueError(
            "a quantized model cannot be fine-tuned in full. Pass a peft_config: its adapter is trained, and the "
            "quantized model is the prior."
        )


def check_source(model: str, init_kwargs: InitKwargs) -> None:
    """Refuse a GGUF file that cannot be read, or not with these `model_init_kwargs`.

    Raises:
        ValueError: with what to change.
    """
    gguf_files.check_kwargs(model, mapping_of(init_kwargs))
    gguf_files.source(model)


def is_adapter(model: str | PreTrainedModel | PeftModel, init_kwargs: InitKwargs) -> bool:
    """Whether a model comes with an adapter on it.

    Raises:
        ValueError: where there is no such model.
    """
    if not isinstance(model, str):
        return isinstance(model, PeftModel)
    check_source(model, init_kwargs)
    if gguf_files.is_gguf(model):
        return False
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
    place, file = gguf_files.source(name)
    try:
        with gguf_files.read(name):
            return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(place, **file, **kwargs))
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
            saved = PeftConfig.from_pretrained(model, **place)
            kinds.check_adapter(saved)
            name = str(saved.base_model_name_or_path)
            place = {key: value for key, value in place.items() if key not in _PLACE_OF_ADAPTER}
            place |= _revision_of_base(saved)
        folder, file = gguf_files.source(name)
        with gguf_files.read(name):
            return AutoConfig.from_pretrained(folder, **file, **place, **_some(init_kwargs, "trust_remote_code"))


def context_length(config: PreTrainedConfig) -> int | None:
    """Most positions that a model can attend to, where its config says so."""
    return min(numbers(text_config(config), "max_position_embeddings"), default=None)


def vocabulary_size(config: PreTrainedConfig, init_kwargs: InitKwargs) -> int | None:
    """Number of tokens that a model will have once it is loaded, where its config says so."""
    asked = mapping_of(init_kwargs).get("vocab_size")
    return asked if isinstance(asked, int) else max(numbers(text_config(config), "vocab_size"), default=None)


@contextlib.contextmanager
def _found(model: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        if gguf_files.is_gguf(model):
            raise
        raise ValueError(f"model {model!r} cannot be loaded, from a local folder or from the Hub: {error}") from error


def mapping_of(init_kwargs: InitKwargs) -> dict[str, Any]:
    """`model_init_kwargs`, or other settings of their kind, as keyword arguments."""
    return dict(cast(Mapping[str, Any], init_kwargs or {}))


def _some(init_kwargs: InitKwargs, *names: str) -> dict[str, Any]:
    """Some of the keyword arguments: those that say where the model is, and whether to trust its code."""
    kwargs = NO_FOREIGN_CODE | mapping_of(init_kwargs)
    return {name: kwargs[name] for name in names if name in kwargs}
