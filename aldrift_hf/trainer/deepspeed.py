"""What DeepSpeed's config asks for: it is read by the Trainer, and carried out when training begins.

By then draws may have been made and paid for, so what cannot work is refused before, and the model has DeepSpeed's
precision from the beginning.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from .config import ALDRIFTConfig

Model = TypeVar("Model", bound=nn.Module)


def makes_optimizer(args: ALDRIFTConfig) -> bool:
    """Whether DeepSpeed makes the optimizer, and not the Trainer.

    Raises:
        ValueError: if it makes it, or its schedule, with a learning rate that is still to be found.
    """
    config = {} if args.deepspeed_plugin is None else args.deepspeed_plugin.hf_ds_config.config
    own = [name for name in ("optimizer", "scheduler") if name in config]
    if own and args.learning_rate is None:
        raise ValueError(
            f"DeepSpeed's config has its own {' and '.join(own)}, made with a learning rate, and none is set. Set "
            f"learning_rate, such as 1e-4; or take {' and '.join(own)} out of the config: then a rate is found."
        )
    return "optimizer" in own


def in_precision(model: Model, args: ALDRIFTConfig) -> Model:
    """A model, with its weights in the precision that DeepSpeed gives them when training begins: 16 bits in mixed
    precision.

    Otherwise what is drawn before would come from another model, and a frozen copy would stay one. Parts that
    [`transformers`] keeps in fp32 are among them, as with DeepSpeed by default.

    Raises:
        ValueError: for weights of 16 bits without mixed precision, which DeepSpeed refuses.
    """
    if args.deepspeed_plugin is None:
        return model
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.dtype == dtype:  # 4-bit weights are kept as bytes
            continue
        if dtype == torch.float32:
            raise ValueError(
                f"DeepSpeed does not train weights in {str(parameter.dtype).removeprefix('torch.')} ({name}) without "
                "mixed precision: set bf16=True, or load the model with dtype float32."
            )
        parameter.data = parameter.data.to(dtype)
    return model
