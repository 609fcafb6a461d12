"""The built-in engine: `generate` of transformers, on the very module that is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel

from ...streams import uniforms
from ...types import Draws
from ..generation import assert_neutral, generate, neutral_generation_config
from ..prior import base_model
from .base import Engine, EngineSettings


class TransformersEngine(Engine):
    """Draws with `model.generate`, token by token from the uniform numbers of each row.

    Args:
        settings: the run's.
    """

    remedy: ClassVar[str] = (
        "The usual reason is a model that ignores the attention mask of prompts padded on the left: use prompts of "
        "equal length (in tokens), or per_device_generation_batch_size=1."
    )

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
        if settings.options:
            raise ValueError(
                f"engine='transformers' takes no engine_kwargs, got {', '.join(settings.options)}. Drop them."
            )
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
            RuntimeError: where `generate` changes the model's distribution.
            FloatingPointError: for logits that are NaN or infinite.
        """
        if self._model is None:
            raise RuntimeError("call sync(policy) before generate()")
        if not self._checked:
            assert_neutral(self._model, prompts[0], self.generation_config)
            self._checked = True
        numbers = uniforms(address, rows, self.settings.max_completion_length)
        return generate(self._model, prompts, self.generation_config, numbers, limits)
