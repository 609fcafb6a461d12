"""The options of the self-test, and the settings of the runs that they ask for."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig

from ..trainer.config import ALDRIFTConfig

COARSENESS = ("float32", "float16", "bfloat16")
"""Precisions, the finest first."""
BATCH = 4096
"""Rows drawn or scored at once; they are of a few tokens here."""


def devices() -> list[str]:
    """Types of this machine's devices, the fastest first."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu"] if accelerator is None else [accelerator.type, "cpu"]


@dataclass
class Options:
    """The model to test, and how it is run.

    Attributes:
        folder: the folder for whatever is written.
    """

    _argument_group_name = "model and device"
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A causal language model, or an adapter on one. It is checked as it is, as far as possible without "
            "enumerating its completions, and as a tiny model of its family. None: a tiny GPT-2 and a tiny Llama."
        },
    )
    device: str = field(default_factory=lambda: devices()[0], metadata={"help": "Type of the accelerator, or cpu."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Weights' precision."}
    )
    adapter_dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "The adapter's precision. None: PEFT's choice, float32 where it makes one."}
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = field(
        default="no", metadata={"help": "Autocast, as the Trainer's --bf16 and --fp16."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize to NF4, as QLoRA does."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, … None: the model's own."})
    seed: int = field(default=0, metadata={"help": "Random seed of weights and draws."})
    folder: str = field(default="", init=False)

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: naming the option to change.
        """
        if self.device not in devices():
            raise ValueError(f"--device {self.device}: this machine has none; use {' or '.join(devices())}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be from 0 to {2**32 - 1:,}")
        if self.load_in_4bit and find_spec("bitsandbytes") is None:
            raise ValueError("--load_in_4bit needs bitsandbytes: pip install 'aldrift_hf[quantization]'")
        if self.mixed_precision == "fp16" and self.adapter_dtype == "float16":
            raise ValueError("--mixed_precision fp16 scales gradients, which needs --adapter_dtype float32")
        if self.mixed_precision == "fp16" and self.device == "cpu":
            raise ValueError("--mixed_precision fp16 needs a GPU: on a CPU use bf16, or --dtype float16")
        if self.mixed_precision == "bf16" and self.device == "cuda" and not torch.cuda.is_bf16_supported():
            raise ValueError("--mixed_precision bf16: this GPU does not support bf16; use fp16")

    @property
    def computes_in(self) -> str:
        """Precision of matrix products: of the coarsest ones, where the adapter's differ from the model's."""
        of_model = {"bf16": "bfloat16", "fp16": "float16"}.get(self.mixed_precision, self.dtype)
        return max((of_model, self.adapter_dtype or of_model), key=COARSENESS.index)

    def training(self, **settings: Any) -> ALDRIFTConfig:
        """Settings of a run without output, in a folder of its own. They also say how its model is loaded."""
        kwargs: dict[str, Any] = {"dtype": self.dtype}
        if self.attn_implementation is not None:
            kwargs["attn_implementation"] = self.attn_implementation
        if self.load_in_4bit:
            nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": self.computes_in}
            kwargs["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **nf4)
            kwargs["device_map"] = {"": "cpu" if self.device == "cpu" else 0}
        args = ALDRIFTConfig(
            output_dir=tempfile.mkdtemp(dir=self.folder),
            model_init_kwargs=kwargs,
            use_cpu=self.device == "cpu",
            bf16=self.mixed_precision == "bf16",
            fp16=self.mixed_precision == "fp16",
            seed=self.seed,
            per_device_generation_batch_size=BATCH,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        args._n_gpu = min(args.n_gpu, 1)  # only one device is tested
        return args
