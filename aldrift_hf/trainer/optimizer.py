"""The optimizer and its schedule, tried on a single parameter before a model is loaded for them."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, get_scheduler

from .config import ALDRIFTConfig
from .deepspeed import makes_optimizer

logger = logging.getLogger(__name__)

DECAY_SHARE = 0.3
"""Default share of all updates, at the end, over which `warmup_stable_decay` lowers the learning rate to 0."""
TRIAL_UPDATES = 10
"""Length of the schedule that is tried."""

FIRST_RATE = 1e-5
"""Learning rate of the first update, where a rate is to be found: too small to do harm."""

_OPTIONS = (
    *("optim", "optim_args", "lr_scheduler_type", "lr_scheduler_kwargs", "learning_rate", "warmup_steps"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
)


def seeks_rate(args: ALDRIFTConfig, optimizer: Optimizer | None) -> bool:
    """Whether the learning rate is to be found: none is set, and the optimizer is made by the Trainer.

    Args:
        args: the settings.
        optimizer: as passed to the trainer; `None` where the Trainer makes it.
    """
    return args.learning_rate is None and optimizer is None


def initial_rate(args: ALDRIFTConfig) -> float:
    """The learning rate that the optimizer is made with."""
    return FIRST_RATE if args.learning_rate is None else args.learning_rate


def schedule_kwargs(args: ALDRIFTConfig, num_updates: int) -> dict[str, Any]:
    """The scheduler's keyword arguments: `lr_scheduler_kwargs`, or what its schedule needs in their place.

    Args:
        args: the settings; they are not changed.
        num_updates: number of updates of the whole run.
    """
    if args.lr_scheduler_type == "warmup_stable_decay" and not args.lr_scheduler_kwargs:
        return {"num_decay_steps": round(DECAY_SHARE * num_updates), "decay_type": "linear"}
    return dict(args.lr_scheduler_kwargs or {})


def check_given_optimizer(optimizer: Optimizer | None, schedule: Any, policy: nn.Module) -> None:
    """Check that an optimizer of the user's own updates what is trained, and that his schedule belongs to it.

    Args:
        optimizer, schedule: as passed to the trainer; `None` where the Trainer makes them.
        policy: with its trainable parameters, before it is wrapped.

    Raises:
        ValueError: if nothing would be trained, or if the schedule is that of another optimizer.
    """
    if schedule is not None and schedule.optimizer not in (optimizer, getattr(optimizer, "optimizer", None)):
        raise ValueError(
            "the schedule in optimizers belongs to another optimizer than the one that trains, so it would change no "
            "learning rate. Pass both, (optimizer, schedule), with the schedule made from this optimizer."
        )
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
    missing = [name for name, parameter in trained if id(parameter) not in held]
    if len(missing) == len(trained):
        raise ValueError(
            f"the optimizer holds none of the {len(trained)} trainable parameters, so nothing would be trained. With "
            "peft_config the adapter is made in the trainer, after the optimizer: pass "
            "get_peft_model(model, peft_config) and an optimizer over its trainable parameters, or leave optimizers "
            "out and set optim and learning_rate."
        )
    if missing:
        logger.warning(
            f"the optimizer does not hold {len(missing)} of the {len(trained)} trainable parameters, such as "
            f"{missing[0]}: they will not be trained."
        )


def check_optimizer(args: ALDRIFTConfig) -> None:
    """Create the optimizer and its schedule for one parameter, and make two updates.

    Raises:
        ValueError: if they cannot be created, if the parameter becomes NaN or infinite, if `weight_decay` is negative,
            or if the schedule ends at a rate and begins with one that is to be found, or is DeepSpeed's own; with the
            settings that they are made from.
    """
    if makes_optimizer(args):
        return
    ends = [name for name in ("min_lr", "lr_end") if name in (args.lr_scheduler_kwargs or {})]
    if ends and args.learning_rate is None:  # the schedule would take it for a share of the first rate
        raise ValueError(
            f"{ends[0]} in lr_scheduler_kwargs is a rate, and the one that the schedule begins with is not known yet. "
            "Set learning_rate, or for a share of it min_lr_rate (lr_scheduler_type='cosine_with_min_lr')."
        )
    weight = nn.Parameter(torch.ones(1, device=args.device))
    args = copy.copy(args)
    args.learning_rate = initial_rate(args)
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
