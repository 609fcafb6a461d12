"""`aldrift train`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from .parser import RunParser
from .report import print_outcome
from .runs import OPTIONS_FILE
from .task import make_trainer


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
        trainer = make_trainer(task, config, model)
    if trainer.is_world_process_zero():
        Path(config.output_dir, OPTIONS_FILE).write_text(yaml.safe_dump(parser.given, allow_unicode=True))
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()  # with push_to_hub, this pushes it too
    if trainer.is_world_process_zero():
        print_outcome(trainer.record, config.output_dir)
