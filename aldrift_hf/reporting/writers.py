"""The callbacks that write a run's files into its output directory: record, report and model card."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from . import report
from .callbacks import RunCallback
from .card import write_card
from .record import RunRecord

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_REPORTS = 60.0
"""A report takes about two seconds to draw."""


class RecordWriter(RunCallback):
    """Keeps `run.json`, `rungs.jsonl` and `draws.jsonl` up to date: see [`RunRecord`]."""

    def _write(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, record: RunRecord, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            record.write(str(args.output_dir))

    on_rung_drawn = on_rung_learned = on_run_end = _write


class ReportWriter(RunCallback):
    """Writes `report.html` and `figures/ladder.png`: at most once a minute while the run goes on, and at its end.

    A report that cannot be drawn is logged as a warning and does not stop the run.

    Args:
        picture: how completions are shown, beside their text: `picture(completions, weights)` returns HTML or SVG. See
            [`aldrift_hf.reporting.report.Picture`].
    """

    def __init__(self, picture: report.Picture | None = None) -> None:
        self.picture = picture
        self._written = time.monotonic()

    def _write(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, record: RunRecord, **kwargs: Any
    ) -> None:
        due = record.finished or time.monotonic() - self._written >= _SECONDS_BETWEEN_REPORTS
        if not due or not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir))
        try:
            report.write_report(record, folder, self.picture)
        except Exception:
            logger.warning(f"{folder / report.REPORT_FILE} could not be written; the run continues", exc_info=True)
        self._written = time.monotonic()

    on_rung_drawn = on_rung_learned = on_run_end = _write


class ModelCardWriter(RunCallback):
    """Writes the model card, `README.md`, when a run ends.

    `save_model` and `push_to_hub` write a card as well, whether or not this callback is installed: PEFT would write one
    that has gaps to fill in.
    """

    def on_run_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, record: RunRecord, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            write_card(record, str(args.output_dir), args.hub_model_id)
