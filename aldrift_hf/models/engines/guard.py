"""Whether an engine draws what it says, and from the model that is trained: seen on a few rows of every batch.

Whatever an engine's rounding, weights are exact with its own `log q`, if that is the law its tokens come from. Two
figures show whether it is. The *gap* is the engine's `log q` of a draw less the scorer's: nearly 0 in fp32, some tenths
of a nat in bf16, and nats for an engine with old weights or another model. Its mean estimates KL(engine‖scorer), and
its variance σ² is the price of being exact: the effective sample size shrinks by about `exp(-σ²)`. The *surprise* sees
what an engine does not report (a temperature, top-k): by its own law, the log-probabilities of the drawn tokens are on
average what the scorer expects, `Σ_v p(v)·log p(v)` at each position. Their differences are a martingale, whose sum
stays within Freedman's inequality (1975) of 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...types import Draws
from ..scoring import sequence_sums
from .base import Engine

TOLERANCE = 1e-3
"""Most nats by which an engine's `log q` may differ from the scorer's to be taken for it: 0.1 % of a weight."""
NUM_CHECKED_ROWS = 8
"""Draws of every batch on which the two are compared."""
MAX_LOGPROB_GAP, MAX_LOGPROB_GAP_IN_HALF = 0.02, 0.5
"""Nats, times the square root of a completion's tokens, above which a gap is not rounding: in fp32, and in bf16."""
MAX_GROWTH = 3.0
"""By so much the root mean square of gaps, per square root of tokens, may exceed that of the run's first draws."""
LEAST_LOGPROB = -10.0
"""Rarer tokens count as this rare in the surprise, so that its steps are bounded."""
MAX_SURPRISE = 25.0
"""Largest exponent of Freedman's inequality: a faithful engine exceeds it with probability 3e-11."""
SURPRISE_OF_ROUNDING, SURPRISE_OF_ROUNDING_IN_HALF = 1e-3, 0.02
"""Nats per token by which rounding may shift the surprise: in fp32, and in bf16."""
_SPLIT = 2**22
"""Most logits of which moments are computed at once."""


class EngineGuard:
    """What was seen of a run's engine so far.

    Args:
        engine: draws the completions.
        pad_token_id: fills rows.
        batch_tokens: most tokens in one forward pass of the scorer.

    Attributes:
        gaps: of the proposals since [`begin`], nats.
    """

    def __init__(self, engine: Engine, pad_token_id: int, batch_tokens: int) -> None:
        self.engine, self.pad_token_id, self.batch_tokens = engine, pad_token_id, batch_tokens
        self._first: float | None = None
        self._surprise = torch.zeros(3, dtype=torch.float64)
        self.begin()

    def begin(self) -> None:
        """New proposals are drawn, from a model that may be another one."""
        self.gaps, self._per_token = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)

    @property
    def as_scored(self) -> bool:
        """Whether the `log q` of these proposals is the scorer's, too."""
        return bool((self.gaps.abs() <= TOLERANCE).all())

    @property
    def figures(self) -> dict[str, float]:
        """Mean and standard deviation of the gaps, nats per completion."""
        return {
            "engine/logprob_gap_mean": self.gaps.mean().item(),
            "engine/logprob_gap_std": self.gaps.std(correction=0).item(),
        }

    def measure(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], draws: Draws) -> Tensor:
        """A few rows of a batch as the scorer sees them.

        Args:
            model: the model that is trained, as it is scored.
            prompts: token ids of the batch's prompts.
            draws: what the engine drew for them.

        Returns:
            `[k, 5]`: gap, number of tokens, surprise, its variance, and whether the scorer computes in half precision.
        """
        chosen = torch.linspace(0, len(prompts) - 1, min(NUM_CHECKED_ROWS, len(prompts))).long()
        completions = draws.completions.select(chosen)
        log_prob, surprise, variance = sequence_sums(
            model,
            [prompts[row] for row in chosen.tolist()],
            completions,
            _moments,
            pad_token_id=self.pad_token_id,
            batch_size=len(chosen),
            batch_tokens=self.batch_tokens,
        ).unbind(-1)
        in_half = model.dtype != torch.float32 or torch.is_autocast_enabled(model.device.type)
        columns = (draws.log_probs[chosen] - log_prob, completions.length, surprise, variance)
        return torch.stack([*columns, torch.full((len(chosen),), float(in_half))], dim=-1)

    @property
    def nothing_measured(self) -> Tensor:
        """What [`measure`] gives where the engine had nothing to draw."""
        return torch.zeros(0, 5, dtype=torch.float64)

    def check(self, measured: Tensor) -> None:
        """Take in what [`measure`] gave for further batches of these proposals, of all processes.

        Raises:
            RuntimeError: for an engine whose draws are not the model's, with the remedy.
        """
        if not len(measured):
            return
        gap, length, in_half = measured[:, 0], measured[:, 1], bool(measured[0, 4])
        self.gaps = torch.cat([self.gaps, gap])
        self._per_token = torch.cat([self._per_token, gap / length.sqrt()])
        if not self.engine.follows_model:
            return
        most = MAX_LOGPROB_GAP_IN_HALF if in_half else MAX_LOGPROB_GAP
        if not bool((self._per_token.abs() <= most).all()):
            worst = self.gaps.abs().max().item()
            self._refuse(f"for one completion its log-probability differs by {worst:.3g} nats from the model's own")
        spread = self._per_token.square().mean().sqrt().item()
        self._first = spread if self._first is None else self._first
        if spread > MAX_GROWTH * max(self._first, MAX_LOGPROB_GAP / MAX_GROWTH):
            self._refuse(
                f"its log-probabilities differ from the model's own by {spread:.2g} nats times the square root of a "
                f"completion's tokens, and by {self._first:.2g} when the run began"
            )
        self._check_surprise(measured, SURPRISE_OF_ROUNDING_IN_HALF if in_half else SURPRISE_OF_ROUNDING)

    def _check_surprise(self, measured: Tensor, rounding: float) -> None:
        self._surprise += torch.stack([measured[:, 2].sum(), measured[:, 3].sum(), measured[:, 1].sum()])
        total, variance, tokens = self._surprise.tolist()
        excess = max(abs(total) - rounding * tokens, 0.0)
        if excess and excess**2 > 2 * MAX_SURPRISE * (variance - LEAST_LOGPROB * excess / 3):
            self._refuse(
                f"its tokens are {'likelier' if total > 0 else 'rarer'} than the law that it reports, by "
                f"{abs(total) / tokens:.2g} nats per token over {tokens:,.0f} tokens"
            )

    def _refuse(self, what: str) -> None:
        raise RuntimeError(f"{type(self.engine).__name__} does not draw from the model: {what}. {self.engine.remedy}")


def _moments(logits: Tensor, targets: Tensor) -> Tensor:
    """`[N, 3]`: log-probabilities of the targets; what they exceed their expectation by, no rarer than
    `LEAST_LOGPROB`; and the variance of that."""
    size = max(1, _SPLIT // logits.shape[-1])
    parts = []
    for chunk, wanted in zip(torch.split(logits, size), torch.split(targets, size), strict=True):
        log_p = chunk.float().log_softmax(-1)
        bounded = log_p.clamp(min=LEAST_LOGPROB)
        mean = (log_p.exp() * bounded).sum(-1)
        variance = (log_p.exp() * (bounded - mean[:, None]).square()).sum(-1)
        drawn, shown = (values.gather(-1, wanted[:, None])[:, 0] for values in (log_p, bounded))
        parts.append(torch.stack([drawn, shown - mean, variance], dim=-1))
    return torch.cat(parts)
