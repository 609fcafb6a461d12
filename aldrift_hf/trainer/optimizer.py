"""The optimizer and its schedule, tried on one number before a model is loaded for them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, get_scheduler

from .config import ALDRIFTConfig

DECAY_SHARE = 0.3
"""Of all updates, the last in which `warmup_stable_decay` takes the learning rate to 0, unless told otherwise."""
UPDATES = 10


def schedule_kwargs(args: ALDRIFTConfig, updates: int) -> dict[str, Any] | None:
    """What the scheduler is made with, beside the number of updates."""
    if args.lr_scheduler_type == "warmup_stable_decay" and not args.lr_scheduler_kwargs:
        return {"num_decay_steps": round(DECAY_SHARE * updates), "decay_type": "linear"}
    return cast(dict[str, Any] | None, args.lr_scheduler_kwargs)


def rehearse(args: ALDRIFTConfig) -> None:
    """Make the optimizer and its schedule, and take a few updates.

    Raises:
        ValueError: if they cannot be made, or lose the number, with the options that they are made of.
    """
    weight = nn.Parameter(torch.ones(1, device=args.device))
    try:
        make, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, nn.ParameterList([weight]))
        if not isinstance(make, type) or {"params", "model", "optimizer_dict"} & kwargs.keys():
            return  # it is made of the model's own layers
        optimizer = make([weight], **kwargs)
        warmup = args.get_warmup_steps(UPDATES)
        schedule = get_scheduler(args.lr_scheduler_type, optimizer, warmup, UPDATES, schedule_kwargs(args, UPDATES))
        for gradient in (0.0, 1.0):  # an adapter's first gradients are 0
            weight.grad = torch.full_like(weight, gradient)
            optimizer.step()
            if isinstance(schedule, LambdaLR):
                schedule.step()
        if not weight.isfinite().all():
            raise ValueError("it makes NaN of a number")
    except Exception as error:  # whatever a package that is missing, or does not know the device, may raise
        options = ("optim", "optim_args", "lr_scheduler_type", "lr_scheduler_kwargs", "learning_rate", "warmup_steps")
        given = ", ".join(f"{name}={getattr(args, name)!s}" for name in options)
        raise ValueError(f"no optimizer with a schedule can be made of {given}: {error}") from error
