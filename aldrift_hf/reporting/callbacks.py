"""What a run tells its callbacks, beyond the events of [`transformers.TrainerCallback`].

Record files, report, model card, console lines and progress bars are callbacks of this kind: pass your own in
`callbacks=`, and take one of ours away with `trainer.remove_callback(...)`.
"""

from __future__ import annotations

import contextlib
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..types import Advance, Prompts, Proposals
from .record import RunRecord


class RunCallback(TrainerCallback):
    """A callback that hears of rungs. All methods do nothing unless overridden; all processes call them."""

    def running(self) -> contextlib.AbstractContextManager[None]:
        """A context that is entered for the time of `train()` and left however it ends."""
        return contextlib.nullcontext()

    def progress(
        self, description: str, total: int, done: int = 0
    ) -> contextlib.AbstractContextManager[Advance] | None:
        """A context for a piece of work of `total` steps, `done` of them before; yields what moves it on. Or `None`."""
        return None

    def on_rung_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        rung: int,
        num_rungs: int | None,
        tau: float,
        **kwargs: Any,
    ) -> None:
        """A rung begins.

        Args:
            rung: its index.
            num_rungs: how many there will be; `None` where the ladder cannot tell.
            tau: the inverse temperature reached so far.
        """

    def on_rung_drawn(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        record: RunRecord,
        metrics: dict[str, Any],
        proposals: Proposals,
        prompts: Prompts,
        **kwargs: Any,
    ) -> None:
        """A rung's proposals are drawn, evaluated and weighted; its updates come next.

        Args:
            record: the run so far, with the rungs that are complete; its `draws` are this rung's.
            metrics: the rung's figures so far.
            proposals: its draws.
            prompts: whose rows they answer.
        """

    def on_rung_learned(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        record: RunRecord,
        **kwargs: Any,
    ) -> None:
        """A rung's updates are done; `record.rungs[-1]` is complete."""

    def on_measured(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        record: RunRecord,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """The model was measured, by `evaluate()` or at the end of a run; `metrics` have no prefix."""

    def on_run_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        record: RunRecord,
        **kwargs: Any,
    ) -> None:
        """`train()` has ended, the final model was measured, and `record.finished` is true."""
