"""The loss's seam: what the updates of a rung (step 3 of ALDRIFT, *learn*) minimise on its samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from ...types import Proposals


class Loss(ABC):
    """A loss on the token log-probabilities of a rung's samples.

    Attributes:
        reference_share: share of a rung's rows that are taken from the whole pool with equal probability, and not from
            the sampler's selection.
        exact_logprobs: whether `log q` in training must be the number that was scored, so that dropout is turned off.
        needs_weighted_draws: whether the selection must be draws of `p_τ` by weight, of known density.
    """

    reference_share: ClassVar[float] = 0.0
    exact_logprobs: ClassVar[bool] = False
    needs_weighted_draws: ClassVar[bool] = False

    def columns(self, pool: Proposals, tau: float, log_z: Tensor) -> dict[str, Tensor]:
        """What a row needs beside its tokens, by name: a value for each draw of the pool, each `[P, N]`.

        Args:
            pool: `N` draws per prompt, with the density that they were drawn from.
            tau: the rung's inverse temperature.
            log_z: `[P]`, `log Z_τ`, nats.
        """
        return {}

    @abstractmethod
    def __call__(self, log_probs: Tensor, num_tokens: Tensor | int, **columns: Tensor) -> Tensor:
        """The loss of a micro-batch, a scalar.

        Args:
            log_probs: `[n, width]`, `log q` of each completion token, nats, with gradients; 0 elsewhere.
            num_tokens: completion tokens of the whole accumulated batch. Divide a sum over rows by it, so that the loss
                is in nats per token and accumulation does not change it.
            columns: of [`columns`], each `[n]`, fp32.
        """
