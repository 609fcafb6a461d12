"""The optimizer and its schedule, tried on a single parameter before a model is loaded for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, get_scheduler

from .config import ALDRIFTConfig

DECAY_SHARE = 0.3
"""Default share of all updates, at the end, over which `warmup_stable_decay` lowers the learning rate to 0."""
TRIAL_UPDATES = 10
"""Length of the schedule that is tried."""

_OPTIONS = (
    *("optim", "optim_args", "lr_scheduler_type", "lr_scheduler_kwargs", "learning_rate", "warmup_steps"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
)


def schedule_kwargs(args: ALDRIFTConfig, num_updates: int) -> dict[str, Any]:
    """The scheduler's keyword arguments: `lr_scheduler_kwargs`, or what its schedule needs in their place.

    Args:
        args: the settings; they are not changed.
        num_updates: number of updates of the whole run.
    """
    if args.lr_scheduler_type == "warmup_stable_decay" and not args.lr_scheduler_kwargs:
        return {"num_decay_steps": round(DECAY_SHARE * num_updates), "decay_type": "linear"}
    return dict(args.lr_scheduler_kwargs or {})


def check_optimizer(args: ALDRIFTConfig) -> None:
    """Create the optimizer and its schedule for one parameter, and make two updates.

    Raises:
        ValueError: if they cannot be created, if the parameter becomes NaN or infinite, or if `weight_decay` is
            negative; with the settings that they are made from.
    """
    weight = nn.Parameter(torch.ones(1, device=args.device))
    try:
        if args.weight_decay < 0:  # which torch accepts for a group of parameters, and which makes weights grow
            raise ValueError("weight_decay must be at least 0")
        make, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, nn.ParameterList([weight]))
        if not isinstance(make, type) or {"params", "model", "optimizer_dict"} & kwargs.keys():
            return  # made from the model's own layers, so it cannot be tried without the model
        optimizer = make([{"params": [weight], "weight_decay": args.weight_decay}], **kwargs)
        warmup = args.get_warmup_steps(TRIAL_UPDATES)
        schedule = get_scheduler(
            args.lr_scheduler_type, optimizer, warmup, TRIAL_UPDATES, schedule_kwargs(args, TRIAL_UPDATES)
        )
        for gradient in (0.0, 1.0):  # 0 first: so are the first gradients of an adapter
            weight.grad = torch.full_like(weight, gradient)
            optimizer.step()
            if isinstance(schedule, LambdaLR):
                schedule.step()
        if not weight.isfinite().all():
            raise ValueError(f"two updates turn a weight of 1 into {weight.item()}")
    except Exception as error:  # of any type: the package may be missing, or not support the device
        given = ", ".join(f"{name}={getattr(args, name)!s}" for name in _OPTIONS)
        raise ValueError(f"no working optimizer and schedule can be made from {given}: {error}") from error
