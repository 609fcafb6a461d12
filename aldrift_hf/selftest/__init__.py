"""Statistical self-tests on one's own machine, device, precision and model: `aldrift selftest`.

The package's tests enumerate every completion of tiny models. What they show on one machine, a new GPU, a new torch or
a new family of models can break in silence. These checks are of the same kind: they take less than a minute, and print
every distance between what is computed and what is known exactly, beside its bound.
"""

from __future__ import annotations

import math
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig
from transformers import logging as transformers_logging

from ..cli.parser import Parser
from ..models.prior import base_model
from .checks import CHECKS, OF_ANY_MODEL, Distance
from .options import Options
from .subjects import Subject, tiny_subject, whole_subject
from .tiny import NotShrunkError

FAMILIES = (
    GPT2Config(activation_function="gelu_pytorch_tanh"),
    LlamaConfig(num_key_value_heads=8, attention_dropout=0.1),
)
"""Tested where no model is given: learned positions and rotary ones, attention in full and grouped."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the self-test and print its tables.

    Args:
        argv: the command line's options; `None`: the program's own.

    Returns:
        The exit status: 0 if all checks pass, 1 if any fails.

    Raises:
        SystemExit: with status 2, after one line, for options that cannot be.
    """
    start, console = time.perf_counter(), Console(highlight=False)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        options, subjects = _asked(sys.argv[1:] if argv is None else argv, folder)
        console.print(_setting(options), style="dim")
        failures = [line for title, make in subjects for line in _examine(title, make, console)]
    for line in failures:
        console.print(escape(line))
    verdict, color = (f"failed checks: {len(failures)}", "red") if failures else ("all checks pass", "green")
    console.print(f"{verdict}, in {time.perf_counter() - start:.0f} s", style=f"bold {color}")
    return int(bool(failures))


def _asked(argv: Sequence[str], folder: str) -> tuple[Options, list[tuple[str, Callable[[], Subject]]]]:
    """The options, and what is tested: titles, and what makes them."""
    names = ", ".join(map(_name, CHECKS))
    parser = Parser(
        "aldrift selftest", "aldrift selftest [options]", f"{(__doc__ or '').split(': ')[0]}: {names}.", [Options]
    )
    try:
        options, unknown = parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True)
        if unknown:
            parser.refuse(unknown)
        options.folder = folder
        if (name := options.model_name_or_path) is None:
            return options, [_tiny(config, options) for config in FAMILIES]
        whole = whole_subject(name, options)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    return options, [(name, lambda: whole), _tiny(base_model(whole.trainer.model).config, options)]


def _tiny(config: PreTrainedConfig, options: Options) -> tuple[str, Callable[[], Subject]]:
    return f"a tiny {config.get_text_config().model_type}", lambda: tiny_subject(config, options)


def _examine(title: str, make: Callable[[], Subject], console: Console) -> list[str]:
    """Make all checks of one subject and print their table; what to say of those that fail."""
    try:
        subject = make()
    except NotShrunkError as error:
        console.print(escape(f"{title} is not checked: {error}"), style="yellow")
        return []
    except Exception as error:
        return [f"{title}: there are no checks without it. {_first_line(error)}"]
    table, failures = Table(title=f"[bold]{escape(title)}", box=box.SIMPLE_HEAD, pad_edge=False), []
    for column in ("check", "compared"):
        table.add_column(column)
    for column in ("distance", "bound", ""):
        table.add_column(column, justify="right")
    for check in CHECKS if subject.make else OF_ANY_MODEL:
        compared, _, remedy = (check.__doc__ or "").partition("\n\n")
        try:
            distance, raised = check(subject), []
        except Exception as error:  # one that breaks leaves the others to be made
            distance, raised = Distance(math.nan, math.nan), [_first_line(error)]
        table.add_row(_name(check), compared, *distance.cells(), "pass" if distance.passed else "[bold red]FAIL")
        if not distance.passed:
            failures.append(" ".join([f"{title}: {_name(check)}:", *raised, *remedy.split()]))
    console.print(table)
    return failures


def _name(check: Callable[[Subject], Distance]) -> str:
    return check.__name__.replace("_", " ")


def _setting(options: Options) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("aldrift_hf", "torch", "transformers", "peft"))
    cpu = options.device == "cpu"
    device = platform.machine() if cpu else torch.get_device_module(options.device).get_device_name()
    return (
        f"{packages}\n{options.device} ({device}), weights {options.dtype}{' in 4 bits' * options.load_in_4bit}, mixed "
        f"precision {options.mixed_precision}, seed {options.seed}"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
