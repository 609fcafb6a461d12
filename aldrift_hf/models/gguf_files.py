"""A model in a GGUF file (llama.cpp's format): its weights are unpacked, and it is then one like any other.

Wherever a model's path is asked for, that of the file will do; one on the Hub is called `NAMESPACE/NAME/FILE.gguf`.
transformers takes folder and file apart, and keeps the folder alone as the model's name, by which neither a tokenizer
nor the base model of a saved adapter would be found again.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import transformers

_MAGIC = b"GGUF"


def is_gguf(name: str) -> bool:
    """Whether a model's path or id is that of a GGUF file."""
    return name.lower().endswith(".gguf") and not os.path.isdir(name)


def source(name: str) -> tuple[str, dict[str, str]]:
    """How `from_pretrained` takes a path or id: the folder or id, and keyword arguments that name a GGUF file in it.

    Raises:
        ValueError: for a GGUF file that is not there, is none, or cannot be read without a further package.
    """
    if not is_gguf(name):
        return name, {}
    _check_package(name)
    folder, file = os.path.split(name)
    on_the_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", folder) and not os.path.isdir(folder)
    if not on_the_hub:
        _check_file(name)
    return folder or os.curdir, {"gguf_file": file}


def unpacked(name: str) -> dict[str, Any]:
    """Keyword arguments with which the weights of a GGUF file are unpacked; none for another model.

    Newer versions of transformers may leave them packed, for kernels without a backward pass.
    """
    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if is_gguf(name) and config is not None else {}


def check_kwargs(name: str, init_kwargs: Mapping[str, Any]) -> None:
    """Refuse `model_init_kwargs` that do not go with a GGUF file.

    Raises:
        ValueError: with what to pass.
    """
    if "gguf_file" in init_kwargs:
        raise ValueError(
            f"gguf_file={init_kwargs['gguf_file']!r} in model_init_kwargs: pass the file's own path as the model, "
            f"{os.path.join(name, str(init_kwargs['gguf_file']))!r}, so that its tokenizer is found too."
        )
    if is_gguf(name) and init_kwargs.get("quantization_config") is not None:
        raise ValueError(
            f"the weights of a GGUF file ({name}) are unpacked as they are loaded, and cannot be quantized on the way. "
            "Leave quantization out, or pass the original model, from the Hub or a folder."
        )


@contextlib.contextmanager
def read(name: str) -> Iterator[None]:
    """Within a `with` block whatever goes wrong with a GGUF file is told as a `ValueError` that names the file."""
    try:
        yield
    except Exception as error:  # of any type: readers trip over what they do not expect in a file
        if not is_gguf(name):
            raise
        raise ValueError(
            f"the GGUF file {name} cannot be read: {type(error).__name__}: {error}. If it was cut or damaged, download "
            f"it again. If transformers {transformers.__version__} does not know its architecture or its tokenizer, "
            "pass the original model, from the Hub or a folder."
        ) from error


def name_after(model: Any, name: str) -> None:
    """Give a model that was read from a GGUF file the name by which it can be loaded again."""
    if is_gguf(name):
        model.name_or_path = model.config._name_or_path = name
        # PEFT looks for a config.json beside the weights whenever an adapter is saved.
        warnings.filterwarnings("ignore", message=f"Could not find a config file in {re.escape(name)}")


def _check_package(name: str) -> None:
    try:
        importlib.import_module("gguf")
    except ImportError as error:
        raise ValueError(
            f"the package gguf is needed to read {name} ({error}): pip install 'aldrift_hf[gguf]'"
        ) from error


def _check_file(name: str) -> None:
    try:
        with open(name, "rb") as file:
            start = file.read(len(_MAGIC))
    except OSError as error:
        raise ValueError(
            f"the GGUF file {name} cannot be opened: {error}. One on the Hub is called NAMESPACE/NAME/FILE.gguf."
        ) from error
    if start != _MAGIC:
        raise ValueError(
            f"{name} is not a GGUF file: it begins with {start!r}. A file of 100 bytes or so that begins with "
            "b'vers' is a pointer of Git LFS: run `git lfs pull`."
        )
