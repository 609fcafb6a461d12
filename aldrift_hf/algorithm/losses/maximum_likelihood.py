"""Maximum likelihood, the paper's supervised pass."""

from __future__ import annotations

from torch import Tensor

from .base import Loss


class MaximumLikelihood(Loss):
    """Total negative log-likelihood over the total tokens of the accumulated batch: `E_p[-log q]`.

    A mean over each sequence's own length would weight the tokens of short sequences more, and its optimum would not be
    the distribution that the samples come from.
    """

    def __call__(self, log_probs: Tensor, num_tokens: Tensor | int, **columns: Tensor) -> Tensor:
        return -log_probs.sum() / num_tokens
