"""NaN and infinity, caught where they arise: errors say what overflowed or diverged, and what to change."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_OVERFLOW = (
    "Before training, the cause is damaged weights or an overflow, most often in float16, whose range is too small for "
    "models made in bfloat16: load the model with model_init_kwargs={'dtype': 'bfloat16'} or 'float32', and without "
    "fp16=True. During training, learning has diverged: lower learning_rate."
)

OUTSIDE = (
    "The model writes texts that the prior never writes: something masks the prior's logits but not the model's. Mask "
    "both or neither. An adapter, instead of full fine-tuning, shares the prior's mask."
)


def check_logits(logits: Tensor) -> None:
    """Refuse logits that do not define a distribution; `-inf` is allowed, and means that a token is never drawn.

    Raises:
        FloatingPointError: for NaN, `+inf`, and rows that are all `-inf`.
    """
    most = logits.float().amax(-1)  # NaN where any is
    if not bool(most.isfinite().all()):
        raise FloatingPointError(
            f"the largest of the model's logits is {most[~most.isfinite()][0].item()}, so no token can be drawn. "
            f"{_OVERFLOW}"
        )


def check_scores(log_model: Tensor, log_prior: Tensor) -> None:
    """Refuse impossible log-probabilities of draws; `-inf` under the prior is allowed: the target excludes that draw.

    Args:
        log_model: under the model that drew them, nats, any shape.
        log_prior: under the prior.

    Raises:
        FloatingPointError: for NaN and `+inf`, and for `-inf` under the model that drew.
    """
    wrong = {
        "the model": log_model[~log_model.isfinite()],
        "the prior": log_prior[log_prior.isnan() | (log_prior == math.inf)],
    }
    for name, values in wrong.items():
        if len(values):
            raise FloatingPointError(
                f"{len(values):,} of {log_model.numel():,} proposals have log-probability {values[0].item()} under "
                f"{name}, so they cannot be weighted. {_OVERFLOW}"
            )


def check_support(log_prior: Tensor) -> None:
    """Refuse draws where the prior excludes all draws of a prompt: no weight would be left.

    Args:
        log_prior: `[P, n]`, nats.

    Raises:
        FloatingPointError: with the number of such prompts.
    """
    lost = (log_prior == -math.inf).all(-1)
    if bool(lost.any()):
        raise FloatingPointError(
            f"{int(lost.sum()):,} of {len(lost):,} prompts have no proposal that the prior can write: all have "
            f"log-probability -inf under it. {OUTSIDE}"
        )


def check_loss(loss: float, learning_rate: float) -> None:
    """Stop before a NaN or infinite loss reaches the parameters.

    Raises:
        FloatingPointError: for NaN and infinities.
    """
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}. {_diverged(learning_rate)}")


def check_gradients(parameters: Iterable[nn.Parameter], learning_rate: float) -> float:
    """Stop before NaN or infinite gradients reach the parameters.

    Args:
        parameters: those without gradients are skipped; of sharded ones, this process checks its own part.
        learning_rate: for the message.

    Returns:
        The size of the largest entry on this process.

    Raises:
        FloatingPointError: for NaN and infinities.
    """
    here = [parameter.grad for parameter in parameters if parameter.grad is not None]
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in here]
    largest = torch.nn.utils.get_total_norm(local, math.inf)  # a sum of squares could overflow by itself
    if not bool(largest.isfinite()):
        raise FloatingPointError(f"the loss is finite, but its gradient is not. {_diverged(learning_rate)}")
    return float(largest)


def check_update(was_skipped: bool, learning_rate: float) -> None:
    """Stop where DeepSpeed, which checks gradients by itself, has left an update out.

    Raises:
        FloatingPointError: if it has.
    """
    if was_skipped:
        raise FloatingPointError(
            f"the gradient is not finite, and DeepSpeed has left the update out. {_diverged(learning_rate)}"
        )


def _diverged(learning_rate: float) -> str:
    return (
        f"Learning has diverged, or overflowed in half precision. Lower learning_rate (it is {learning_rate:g}), warm "
        "it up (warmup_steps), clip gradients (max_grad_norm=1.0), or train with bf16 instead of fp16. The model is as "
        "it was before this update, and a new run in this output_dir evaluates no completion again."
    )
