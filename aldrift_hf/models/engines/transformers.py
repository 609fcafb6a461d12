"""The built-in engine: `generate` of transformers, on the very module that is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...streams import uniforms
from ...types import Draws
from ..generation import assert_neutral, generate, neutral_generation_config
from ..prior import base_model
from ..scoring import sequence_logprobs
from .base import Engine, EngineSettings

TOLERANCE = 1e-3
"""Most nats by which generation's `log q` may differ from the scorer's to be used in its place: 0.1 % of a weight."""
NUM_CHECKED_ROWS = 8
"""Draws of every batch on which the two are compared."""
MAX_LOGPROB_GAP, MAX_LOGPROB_GAP_IN_HALF = 0.02, 0.5
"""Nats, times the square root of a completion's tokens, above which the gap is not rounding: in fp32, and in bf16."""


class TransformersEngine(Engine):
    """Draws with `model.generate`, token by token from the uniform numbers of each row.

    Args:
        settings: the run's.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.generation_config = neutral_generation_config(
            max_completion_length=settings.max_completion_length,
            eos_token_ids=settings.eos_token_ids,
            pad_token_id=settings.pad_token_id,
        )
        self._model: PreTrainedModel | None = None
        self._checked = False

    @classmethod
    def from_settings(cls, settings: EngineSettings) -> TransformersEngine:
        return cls(settings)

    def sync(self, policy: nn.Module) -> None:
        self._model = base_model(policy)  # the module itself: its weights are always the present ones

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        address: Sequence[int],
        rows: range,
        limits: Sequence[int] | None = None,
    ) -> Draws:
        """See [`Engine.generate`].

        Raises:
            RuntimeError: where `generate` changes the model's distribution, or has other probabilities than its forward
                pass.
            FloatingPointError: for logits that are NaN or infinite.
        """
        if self._model is None:
            raise RuntimeError("call sync(policy) before generate()")
        if not self._checked:
            assert_neutral(self._model, prompts[0], self.generation_config)
            self._checked = True
        numbers = uniforms(address, rows, self.settings.max_completion_length)
        draws = generate(self._model, prompts, self.generation_config, numbers, limits)
        return draws._replace(log_probs=self._log_q(self._model, prompts, draws))

    def _log_q(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], draws: Draws) -> Tensor:
        """`log q`: generation's own where, on a few rows, it is the scorer's; otherwise the scorer's."""
        checked_rows = torch.linspace(0, len(prompts) - 1, min(NUM_CHECKED_ROWS, len(prompts))).long()
        few = Draws(draws.completions.select(checked_rows), draws.log_probs[checked_rows])
        scored = self._scored(model, [prompts[row] for row in checked_rows.tolist()], few)
        if (scored - few.log_probs).abs().max() <= TOLERANCE:
            return draws.log_probs
        scored = self._scored(model, prompts, draws)
        in_full = model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
        gap = (scored - draws.log_probs).abs()
        if (gap / draws.completions.length.sqrt()).max() > (MAX_LOGPROB_GAP if in_full else MAX_LOGPROB_GAP_IN_HALF):
            raise RuntimeError(
                f"generate() of {type(model).__name__} has other probabilities than its forward pass: for one "
                f"completion they differ by {gap.max():.3g} nats, so its draws would get wrong weights. The usual "
                "reason is a model that ignores the attention mask of prompts padded on the left: use prompts of equal "
                "length (in tokens), or per_device_generation_batch_size=1."
            )
        return scored

    def _scored(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], draws: Draws) -> Tensor:
        return sequence_logprobs(
            model,
            prompts,
            draws.completions,
            pad_token_id=self.settings.pad_token_id,
            batch_size=len(prompts),
            batch_tokens=self.settings.scoring_batch_tokens,
        )
