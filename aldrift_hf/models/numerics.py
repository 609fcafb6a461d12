"""Numbers that are none, caught where they arise: what overflowed or diverged, and what to change."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_OVERFLOW = (
    "Before training, that is an overflow: in float16 most often, which models made in bfloat16 do not fit (load it "
    "with model_init_kwargs={'dtype': 'bfloat16'} or 'float32', and without fp16=True), or damaged weights. In "
    "training, it has diverged: lower learning_rate."
)

OUTSIDE = (
    "The model writes what the prior never does: something masks the prior's logits, and not the model's. Mask both, "
    "or neither; an adapter, in place of full fine-tuning, has the prior's mask by itself."
)


def check_logits(logits: Tensor) -> None:
    """Refuse logits of which no distribution can be made; `-inf` is a token that is never said.

    Raises:
        FloatingPointError: for NaN, `+inf`, and rows of `-inf` alone.
    """
    most = logits.float().amax(-1)  # NaN where any is
    if not bool(most.isfinite().all()):
        raise FloatingPointError(
            f"the model's logits have {most[~most.isfinite()][0].item()} for their maximum: no token can be drawn from "
            f"them. {_OVERFLOW}"
        )


def check_scores(log_model: Tensor, log_prior: Tensor) -> None:
    """Refuse log-probabilities of draws that cannot be; `-inf` under the prior is a draw that the target excludes.

    Args:
        log_model: of the model that drew them, nats, any shape.
        log_prior: of the prior.

    Raises:
        FloatingPointError: for NaN and `+inf`, and for `-inf` of what was drawn.
    """
    wrong = {
        "the model": log_model[~log_model.isfinite()],
        "the prior": log_prior[log_prior.isnan() | (log_prior == math.inf)],
    }
    for name, values in wrong.items():
        if len(values):
            raise FloatingPointError(
                f"{len(values):,} of {log_model.numel():,} proposals have log-probability {values[0].item()} under "
                f"{name}: they cannot be weighted. {_OVERFLOW}"
            )


def check_support(log_prior: Tensor) -> None:
    """Refuse draws of which the prior excludes all that a prompt has, for then no weight is left.

    Args:
        log_prior: `[P, n]`, nats.

    Raises:
        FloatingPointError: saying for how many prompts.
    """
    lost = (log_prior == -math.inf).all(-1)
    if bool(lost.any()):
        raise FloatingPointError(
            f"{int(lost.sum()):,} of {len(lost):,} prompts have no proposal that the prior can write: all have "
            f"log-probability -inf under it. {OUTSIDE}"
        )


def check_loss(loss: float, learning_rate: float) -> None:
    """Stop before a loss that is no number reaches the parameters.

    Raises:
        FloatingPointError: for NaN and infinities.
    """
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}. {_diverged(learning_rate)}")


def check_gradients(parameters: Iterable[nn.Parameter], learning_rate: float) -> None:
    """Stop before gradients that are no numbers reach the parameters.

    Args:
        parameters: with gradients or without; sharded ones are looked at as far as they lie here.
        learning_rate: for the message.

    Raises:
        FloatingPointError: for NaN and infinities.
    """
    here = [parameter.grad for parameter in parameters if parameter.grad is not None]
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in here]
    largest = torch.nn.utils.get_total_norm(local, math.inf)  # of squares the sum could overflow by itself
    if not bool(largest.isfinite()):
        raise FloatingPointError(f"the loss is finite, but its gradient is not. {_diverged(learning_rate)}")


def _diverged(learning_rate: float) -> str:
    return (
        f"Learning has diverged, or overflowed in half precision. Lower learning_rate (it is {learning_rate:g}), warm "
        "it up (warmup_steps), clip gradients (max_grad_norm=1.0), or train with bf16 instead of fp16. The model is as "
        "it was before this update, and a new run in this output_dir pays for no completion twice."
    )
