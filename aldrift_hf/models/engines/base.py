"""The engine's seam: what draws completions from the model that is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from ...types import Draws


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is told of the run.

    Attributes:
        max_completion_length: tokens after which a completion is cut; being cut is an outcome like any other.
        eos_token_ids: any of these tokens ends a completion.
        pad_token_id: fills rows; its value has no effect.
        options: the engine's own (`engine_kwargs`).
    """

    max_completion_length: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    options: Mapping[str, Any] = field(default_factory=dict)


class Engine(ABC):
    """Draws completions by plain ancestral sampling (temperature 1, no truncation), with `log q` as drawn.

    `q` is the law that the tokens really came from. An engine reports its own log-probability of each token, whatever
    its rounding: then the weights `L·exp(-τ·d)/q` are exact, of the archive too ([`aldrift_hf.algorithm.archive`]).

    Every round of draws is checked ([`aldrift_hf.models.engines.guard`]): the engine's law must be that of the model,
    up to rounding, and the tokens must come from it.

    Attributes:
        draws_with_policy: whether it draws with the very module that is trained, which must then be whole on every
            process. For others it stays sharded.
        follows_model: whether the law is meant to be that of the model that is trained. Otherwise nothing is checked.
        remedy: what to do where it is not, for the error.
    """

    draws_with_policy: ClassVar[bool] = True
    follows_model: ClassVar[bool] = True
    remedy: ClassVar[str] = (
        "Its weights may be old (sync), or it may change probabilities: draw at temperature 1, without top-k, top-p or "
        "penalties, and report the log-probability of each token."
    )

    @classmethod
    def from_settings(cls, settings: EngineSettings) -> Engine:
        """An engine for a run."""
        return cls()

    def check(self, policy: nn.Module) -> None:  # noqa: B027 - most engines draw with any model
        """Refuse a model that this engine cannot draw with; called once, before anything is computed.

        Args:
            policy: the model that will be trained.

        Raises:
            ValueError: with the remedy.
        """

    @abstractmethod
    def sync(self, policy: nn.Module) -> None:
        """Take over the present weights; called before each round of draws, in eval mode, on all processes.

        Args:
            policy: the model that is trained, a `PreTrainedModel` or `PeftModel` with its adapter active. Where it is
                sharded, [`aldrift_hf.models.sharding.whole`] makes a parameter whole.
        """

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        address: Sequence[int],
        rows: range,
        limits: Sequence[int] | None = None,
    ) -> Draws:
        """One completion per prompt.

        What a row draws depends on its own random numbers alone, and not on the batch it is drawn in: derive them from
        `(*address, row)`, as [`aldrift_hf.streams`] does.

        Args:
            prompts: `n` lists of token ids, each of at least one token.
            address: the address of the random stream.
            rows: the `n` rows' numbers in the stream.
            limits: most tokens of each completion; `None` for `max_completion_length`. Only `sampler="suffix"`,
                `"span"` and `sample(correction="suffix")` ask for others, and need an engine that has this argument.
        """

    def rest(self) -> None:  # noqa: B027 - most engines keep nothing that others could use
        """The round of draws is over: give up, until the next [`sync`], what memory learning can use."""
