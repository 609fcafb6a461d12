"""`aldrift train`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..reporting.callbacks import RunCallback
from ..reporting.record import replace_file
from ..trainer.checkpoints import to_resume_from
from .parser import RunParser
from .report import print_outcome
from .runs import OPTIONS_FILE
from .task import make_trainer


class OptionsWriter(RunCallback):
    """Writes the run's options, beside its record: what is in the folder before belongs to whatever was there.

    Args:
        given: the options.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given

    def _write(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            text = yaml.safe_dump(dict(self.given), allow_unicode=True)
            replace_file(Path(str(args.output_dir), OPTIONS_FILE), text.splitlines())

    on_rung_drawn = on_run_end = _write


def main(argv: Sequence[str]) -> None:
    """Train, save the model and the run's options, and print the outcome."""
    parser = RunParser(
        "aldrift train",
        "aldrift train --objective MODULE:FUNCTION --model_name_or_path MODEL [--dataset_name PROMPTS] [options]",
        "Trains MODEL, the prior L, into a sampler of p_T(s) ∝ L(s)·exp(-T·d(s)), rung by rung up a ladder of "
        "inverse temperatures.",
    )
    task, config, model = parser.parse(argv)
    with parser.errors_in_one_line(ValueError, TypeError, OSError):
        to_resume_from(config.resume_from_checkpoint, str(config.output_dir))  # refused before a model is loaded
        trainer = make_trainer(task, config, model)
    trainer.add_callback(OptionsWriter(parser.given))
    try:
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    except Exception:
        learned = trainer.state.global_step and trainer.is_world_process_zero() and not config.save_only_model
        if learned and (kept := get_last_checkpoint(str(config.output_dir))):
            print(f"{kept} is kept: --resume_from_checkpoint True goes on from there.", file=sys.stderr)
        raise
    trainer.save_model()  # with push_to_hub, this pushes it too
    if trainer.is_world_process_zero():
        print_outcome(trainer.record, config.output_dir)
