"""A warning where bf16, which saves time on other devices, costs time on this one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

INSTRUCTIONS = ("avx512_bf16", "amx_bf16")
"""Names of the instructions of x86 processors for products in bf16."""


def warn_of_slow_bf16(policy: nn.Module, autocast: bool, device: torch.device) -> None:
    """Say so where a processor without instructions for bf16 would compute in it. `from_pretrained` leaves many a
    model in bf16, for so its weights are stored.

    Args:
        policy: the model.
        autocast: whether products of fp32 weights are computed in bf16.
        device: where.
    """
    in_bf16 = autocast or any(parameter.dtype == torch.bfloat16 for parameter in policy.parameters())
    if device.type == "cpu" and in_bf16 and has_bf16_instructions() is False:
        logger.warning(
            f"this processor has no instructions for bf16 ({', '.join(INSTRUCTIONS)}), so products in it take several "
            "times as long as in fp32: load the model with dtype='float32' (--dtype float32), and leave bf16=True out."
        )


def has_bf16_instructions() -> bool | None:
    """Whether the processor has any; `None` where that is not known: it is not x86's, or PyTorch is too old to tell."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    known = [bool(capabilities[name]) for name in INSTRUCTIONS if name in capabilities]
    return any(known) if known else None
