"""What the self-test is made on: the options of its command line, and what they mean to whoever loads a model."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig

from ..trainer.config import ALDRIFTConfig

BATCH = 4096
"""Rows drawn or scored at once, of the few tokens that they are here."""


def devices() -> list[str]:
    """Types of the devices that are here, the quickest first."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu"] if accelerator is None else [accelerator.type, "cpu"]


@dataclass
class Options:
    """The command line's options.

    Attributes:
        folder: for whatever is written.
    """

    _argument_group_name = "options"
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A causal language model, or an adapter on one: checked as it is, as far as that goes without all "
            "completions, and as a tiny model of its family. None: tiny models of GPT-2's and Llama's."
        },
    )
    device: str = field(default_factory=lambda: devices()[0], metadata={"help": "The accelerator's type, or cpu."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Of the weights."})
    mixed_precision: Literal["no", "bf16", "fp16"] = field(
        default="no", metadata={"help": "Autocast, as with the Trainer's --bf16 or --fp16."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "NF4, as for QLoRA."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, …; None: the model's own."})
    seed: int = field(default=0, metadata={"help": "Of random weights and of draws."})
    folder: str = field(default="", init=False)

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: with the option to change.
        """
        if self.device not in devices():
            raise ValueError(f"--device {self.device}: there is none here; take {' or '.join(devices())}")
        if self.load_in_4bit and find_spec("bitsandbytes") is None:
            raise ValueError("--load_in_4bit needs bitsandbytes: pip install 'aldrift_hf[quantization]'")
        if self.mixed_precision == "fp16" and self.device == "cpu":
            raise ValueError("--mixed_precision fp16 is for GPUs: on a CPU take bf16, or --dtype float16")
        if self.mixed_precision == "bf16" and self.device == "cuda" and not torch.cuda.is_bf16_supported():
            raise ValueError("--mixed_precision bf16: this GPU has no bf16; take fp16")

    @property
    def computes_in(self) -> str:
        """The dtype of matrix products."""
        return {"bf16": "bfloat16", "fp16": "float16"}.get(self.mixed_precision, self.dtype)

    def training(self, **settings: Any) -> ALDRIFTConfig:
        """Settings of a quiet run in a folder of its own, with those by which its model is loaded."""
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
            generation_batch_size=BATCH,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        args._n_gpu = min(args.n_gpu, 1)  # one device is tested, however many there are
        return args
