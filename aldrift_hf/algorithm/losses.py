"""Step 3 of ALDRIFT, *learn*: what the Trainer minimises on a rung's samples."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

REFERENCE_SHARE = 0.5
"""Share of the draws for [`generalized_kl`] that comes from all proposals as they are, not resampled for the target."""


def maximum_likelihood(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int) -> Tensor:
    """Total negative log-likelihood over the total tokens of the accumulated batch: `E_p[-log q]`, the paper's pass.

    A mean over each sequence's own length would weigh the tokens of short sequences more, and its optimum would not be
    the distribution that the samples come from.
    """
    return -_log_probs(outputs.logits, labels).sum() / num_items_in_batch


def generalized_kl(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int, log_target: Tensor, log_reference: Tensor
) -> Tensor:
    """Generalised Kullback-Leibler divergence of target and model, on draws whose target density is known.

    For normalised `p` and `q`, `KL(p‖q) = Σ_s φ(s)` with `φ = p·log(p/q) - p + q`, whose every term is positive unless
    `q(s) = p(s)`. Draws `s ~ r` estimate it as the mean of `φ/r`. Its gradient, `-(p - q)/r · ∇log q`, has the
    expectation of maximum likelihood's, for `E_q[∇log q] = 0`; but where maximum likelihood goes on to raise a sample's
    probability for as long as it is shown, here a sample whose probability is right is left alone, and one whose
    probability is too high is lowered. That is what keeps a rung from memorising the few samples it has.

    Where `q` has grown far beyond `r`, one draw would outweigh all others. So `φ` is divided by `max(r, (p + q)/2)`,
    which bounds the factor of `∇log q` by 2 and moves no minimum: all of them are still at `q = p`.

    Args:
        outputs: of the model, with `logits` `[n, width, vocabulary]`.
        labels: `[n, width]`, token ids of the completions, -100 elsewhere.
        num_items_in_batch: tokens of the accumulated batch, so that the loss is in nats a token, as maximum
            likelihood's is.
        log_target: `[n]`, `log p(s)` with its normaliser, nats.
        log_reference: `[n]`, `log r(s)`, see [`log_reference`].
    """
    log_model = _log_probs(outputs.logits, labels).sum(-1)
    scale = torch.maximum(log_reference, torch.logaddexp(log_target, log_model.detach()) - math.log(2))
    target, model = (log_target - scale).exp(), (log_model - scale).exp()  # both at most 2
    # A draw that the prior excludes (log p = -inf) has no part in the first term.
    cross = torch.where(target > 0, target * (log_target - log_model), 0.0)
    return (cross - target + model).sum() / num_items_in_batch


def log_reference(log_target: Tensor, log_model: Tensor) -> Tensor:
    """`log r` of draws that come half from the target, by resampling, and half from all proposals as they are.

    Args:
        log_target: `log p`, normalised, nats.
        log_model: `log` density of the proposals (of the archive: of the mixture), nats.
    """
    return torch.logaddexp(log_target + math.log(1 - REFERENCE_SHARE), log_model + math.log(REFERENCE_SHARE))


def without_dropout(model: nn.Module) -> None:
    """Switch every dropout of a model off, for good: `log q` in training is then the number that was scored."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):  # Llama's, which is no module
            setattr(module, "attention_dropout", 0.0)  # noqa: B010


def _log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """`[n, width - 1]` log-probabilities of the labels, in fp32; 0 where there is none."""
    shifted = logits[:, :-1].float()
    nll = nn.functional.cross_entropy(
        shifted.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    return -nll.view(labels[:, 1:].shape)
