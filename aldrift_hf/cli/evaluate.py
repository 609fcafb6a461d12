"""`aldrift evaluate`."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence

from ..reporting.record import finite
from .parser import RunParser
from .runs import DEFAULTS, load

NUM_WORST = 5
"""Prompts, of several, that are shown by themselves."""


def main(argv: Sequence[str]) -> None:
    """Print metrics as JSON."""
    parser = RunParser(
        "aldrift evaluate",
        "aldrift evaluate RUN [options]",
        "Measures the trained model in RUN (an output directory, or a model id on the Hub), and prints the metrics of "
        f"ALDRIFTTrainer.evaluate as JSON. {DEFAULTS} The same command makes the same draws, --seed others.",
    )
    with tempfile.TemporaryDirectory() as scratch:
        _, trainer = load(parser, argv, scratch)
        with contextlib.redirect_stdout(sys.stderr):  # a cost may print
            metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            by_prompt = [] if trainer.prompt_metrics is None else trainer.prompt_metrics.to_list()
            worst = {"worst_prompts": by_prompt[:NUM_WORST]} if len(by_prompt) > 1 else {}
            print(json.dumps(finite({**metrics, **worst}), indent=2))
