"""`aldrift env`."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from ..models.slow_precision import has_bf16_instructions

PACKAGES = (
    *("aldrift_hf", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "deepspeed"),
    *("huggingface_hub", "numpy", "safetensors"),
)


USAGE = "usage: aldrift env\n\nPrints versions and devices, as a list in Markdown for a bug report."


def main(argv: Sequence[str]) -> int:
    """Print versions and devices."""
    if argv:
        print(USAGE)
        return 0 if argv[0] in ("--help", "-h") else 2
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count()
    names = [torch.cuda.get_device_name(i) for i in range(count)] if torch.cuda.is_available() else []
    devices = "none" if accelerator is None else f"{count} × {accelerator.type} {', '.join(sorted(set(names)))}"
    lines = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "accelerators": devices,
        "bf16 on accelerators": str(torch.cuda.is_bf16_supported()) if names else "-",
        "bf16 instructions of the processor": str(has_bf16_instructions() or "none known"),
        "threads": str(torch.get_num_threads()),
    }
    for name, value in lines.items():
        print(f"- {name}: {value}")
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
