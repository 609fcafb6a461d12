"""What a run tells its callbacks, beyond the events of [`transformers.TrainerCallback`].

Record files, report, model card, console lines, progress bars and health warnings are callbacks of this kind. Pass your
own in `callbacks=`, and remove one of ours with `trainer.remove_callback(...)`.
"""

from __future__ import annotations

import contextlib
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..types import Advance, Prompts, Proposals
from .record import RunRecord


class RunCallback(TrainerCallback):
    """A callback that is told about rungs. Every method does nothing unless overridden; every process calls them."""

    def running(self) -> contextlib.AbstractContextManager[None]:
        """A context that `train()` enters when it starts and leaves when it ends, also after an error."""
        return contextlib.nullcontext()

    def progress(
        self, description: str, total: int, done: int = 0
    ) -> contextlib.AbstractContextManager[Advance] | None:
        """A context for a piece of work, which yields the function that reports further steps; or `None`.

        Args:
            description: what the work is, such as `"proposals"`.
            total: number of steps.
            done: number of steps that were done before.
        """
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
        tau_max: float | None,
        **kwargs: Any,
    ) -> None:
        """A rung begins.

        Args:
            rung: index of the rung, from 0.
            num_rungs: number of rungs in the run; `None` where it ends by itself.
            tau: inverse temperature of the previous rung; 0 before the first.
            tau_max: T, as far as it is known; `None` before.
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
        """A rung's proposals have been drawn, evaluated and weighted; its optimizer updates come next.

        Args:
            record: the run so far, without this rung, but with this rung's `draws`.
            metrics: what is known about this rung (see [`RunRecord`]), all but what its updates tell: `loss`,
                `updates`, `learning_rate` and `seconds_learn`.
            proposals: the draws of this rung.
            prompts: the prompts that they answer.
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
        """A rung's optimizer updates are done, and `record.rungs[-1]` is complete.

        A callback may add metrics of its own to it; they are kept in the record, in checkpoints and when a run resumes.
        """

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
        """The model was measured, by `evaluate()` or at the end of a run.

        Args:
            record: the run so far.
            metrics: the metrics of [`ALDRIFTTrainer.evaluate`], without prefix.
        """

    def on_run_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        record: RunRecord,
        **kwargs: Any,
    ) -> None:
        """`train()` is done: the final model has been measured if that was possible, and `record.finished` is true."""
