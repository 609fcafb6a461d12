"""`aldrift sample`."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..command_line import write_out
from ..reporting.record import finite
from .parser import RunParser
from .runs import DEFAULTS, load


@dataclass
class SampleArguments:
    """What to draw."""

    _argument_group_name = "samples"
    num_samples: int = field(default=16, metadata={"help": "Samples per prompt.", "aliases": ["-n"]})
    correction: Literal["metropolis_hastings", "isir", "suffix", "none"] = field(
        default="metropolis_hastings",
        metadata={"help": "How the model's draws are turned into samples of p_T. none: they are not."},
    )
    output: str | None = field(
        default=None, metadata={"help": "File to write the samples to, as JSON lines. None: standard output."}
    )


def main(argv: Sequence[str]) -> None:
    """Print samples as JSON lines, or write them to a file."""
    parser = RunParser(
        "aldrift sample",
        "aldrift sample RUN -n NUMBER [options]",
        "Draws samples of p_T from the trained model in RUN (an output directory, or a model id on the Hub), as JSON "
        f"lines. {DEFAULTS} The same command gives the same samples, --seed others.",
        [SampleArguments],
    )
    with tempfile.TemporaryDirectory() as scratch:
        (options,), trainer = load(parser, argv, scratch, _check)
        corrected = options.correction != "none"
        with contextlib.redirect_stdout(sys.stderr):  # a cost may print
            draws = trainer.sample(
                options.num_samples,
                chain_length=None if corrected else 1,
                correction=options.correction if corrected else "metropolis_hastings",
            )
        if trainer.is_world_process_zero():
            lines = [json.dumps(finite(draw), ensure_ascii=False) + "\n" for draw in draws]
            if options.output is None:
                write_out(lines)
            else:
                Path(options.output).write_text("".join(lines), encoding="utf-8")


def _check(options: SampleArguments) -> None:
    """Find out what cannot work before a model is loaded and draws are paid for."""
    if options.num_samples < 1:
        raise ValueError(f"--num_samples must be at least 1, got {options.num_samples}")
    if options.output is not None:
        open(options.output, "a", encoding="utf-8").close()
