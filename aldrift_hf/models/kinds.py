"""Whether what a user passes as the model is a causal language model: told before it is loaded or run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, PeftMixedModel, PeftModel, TaskType
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .prior import base_model, check_apart

_OTHER_TASKS = re.compile(r"Classification|QuestionAnswering|MultipleChoice|Reward|NextSentence|ValueHead|Regression")
"""In the name of a class whose head gives scores and no tokens."""

_CAUSAL_WITHOUT_IS_DECODER = ("gpt_neox", "gpt_neox_japanese")
"""Families whose config has `is_decoder`, and which are causal whatever it says."""


def check_model(model: Any) -> None:
    """Refuse an object that is neither an id nor a causal language model.

    Raises:
        TypeError: for an object of another type.
        ValueError: for a model without a language-modelling head, or that reads what comes after a token; for one that
            transformers has marked as quantized because it was read from a GGUF file.
    """
    if isinstance(model, str):
        return
    if not isinstance(model, (PreTrainedModel, PeftModel)) or not isinstance(base_model(model), PreTrainedModel):
        raise TypeError(
            "model must be an id or path, a transformers.PreTrainedModel or a peft.PeftModel, got "
            f"{_described(model)}{_remedy(model)}"
        )
    model = base_model(model)
    if getattr(model, "quantization_method", None) == "gguf":
        raise ValueError(
            "transformers reads a model from a GGUF file as a quantized one, which its Trainer does not take. Pass the "
            "file's path as the model, 'FOLDER/FILE.gguf': its weights are then unpacked, and its tokenizer is found."
        )
    check_config(model.config, {})
    if not type(model).can_generate() or model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no language-modelling head, so it does not define a distribution over texts. "
            "Pass a causal language model, as AutoModelForCausalLM loads it."
        )


def check_config(config: PreTrainedConfig, init_kwargs: Mapping[str, Any]) -> None:
    """Refuse a config whose model is not causal.

    Args:
        config: the model's, without adapter.
        init_kwargs: what the model is loaded with, which may change its config.

    Raises:
        ValueError: for an encoder-decoder, or an encoder.
    """
    if config.is_encoder_decoder:
        raise ValueError(
            f"the model is an encoder-decoder ({config.model_type}), which reads its prompt in another way than its "
            "completion. Pass a causal language model (decoder only)."
        )
    is_decoder = init_kwargs.get("is_decoder", getattr(config, "is_decoder", None))
    if is_decoder is False and config.model_type not in _CAUSAL_WITHOUT_IS_DECODER:
        raise ValueError(
            f"the model is an encoder ({config.model_type}, is_decoder=False): each token sees those after it, so its "
            "outputs are not the probabilities of a text. Pass a causal language model, or set is_decoder=True (in "
            "its config, or in model_init_kwargs) if it was trained as one."
        )


def check_loadable(config: PreTrainedConfig, init_kwargs: Mapping[str, Any]) -> None:
    """Refuse an id whose checkpoint holds another kind of model, as its config says.

    Raises:
        ValueError: for a checkpoint of a classifier or the like, or a kind that `AutoModelForCausalLM` does not load.
    """
    check_config(config, init_kwargs)
    architectures = [str(name) for name in getattr(config, "architectures", None) or ()]
    if architectures and all(map(_OTHER_TASKS.search, architectures)):
        raise ValueError(
            f"the checkpoint is of a {architectures[0]}, whose head gives scores and no tokens. Pass a causal language "
            "model; a reward model belongs in the objective."
        )
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or ())
    own_code = own_code and bool(init_kwargs.get("trust_remote_code"))
    if type(config) not in AutoModelForCausalLM._model_mapping and not own_code:
        raise ValueError(
            f"AutoModelForCausalLM cannot load a model of type {config.model_type!r}. If it writes text, as vision-"
            "language models do, load it with its own class and pass the object, with its tokenizer as "
            "processing_class."
        )


def check_adapter(config: PeftConfig) -> None:
    """Refuse a saved adapter that cannot be trained on as one of a causal language model.

    Raises:
        ValueError: for one of another task, one that [`check_apart`] refuses, or that does not say which model it
            belongs to.
    """
    if config.task_type not in (None, TaskType.CAUSAL_LM):
        raise ValueError(f"the adapter was made for the task {str(config.task_type)!r}. Pass one for CAUSAL_LM.")
    check_apart(config)
    if not config.base_model_name_or_path:
        raise ValueError(
            "the adapter does not say which model it belongs to (base_model_name_or_path). Load that model, and pass "
            "PeftModel.from_pretrained(model, adapter, is_trainable=True)."
        )


def _described(model: Any) -> str:
    if isinstance(model, type):
        return f"the class {model.__name__}"
    if isinstance(model, PeftModel):
        return f"a PeftModel around {type(base_model(model)).__name__}"
    return type(model).__name__


def _remedy(model: Any) -> str:
    """What to pass in place of an object that has a model inside."""
    if isinstance(model, type):
        return f". Pass an instance: {model.__name__}.from_pretrained(…)."
    if isinstance(model, os.PathLike):
        return ". Pass the path as text: str(path)."
    if isinstance(model, PeftMixedModel):
        return ", whose adapters cannot be separated. Pass a PeftModel with the one to train."
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        return ", a compiled model. Pass the model before torch.compile, and set torch_compile=True in args."
    if isinstance(model, nn.Module) and isinstance(getattr(model, "module", None), nn.Module):
        return ", which wraps a model. Pass the model inside, model.module: it is wrapped again when training begins."
    for name in ("pretrained_model", "model"):  # TRL's models with a value head; pipelines, engines and the like
        if isinstance(getattr(model, name, None), (PreTrainedModel, PeftModel)):
            return f". Pass the model inside, its attribute {name}."
    return "."
