"""Statistical self-tests on your own machine, device, precision and model: `aldrift selftest`.

The package's tests enumerate every completion of tiny models. A new GPU, a new torch or a new model family may break
what they show on one machine without any error. These checks do the same where you run them, in less than a minute.
Each prints the distance between what is computed and what is known exactly, and the bound that it must keep.
"""

from __future__ import annotations

import functools
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from ..command_line import Parser
from ..models.prior import base_model
from ..reporting.letters import print_every_letter
from .checks import CHECKS, CHECKS_OF_ANY_MODEL, Check, Distance
from .options import Options
from .subjects import NUM_DRAWS, Subject, tiny_subject, whole_subject
from .tiny import NotShrunkError

FAMILIES = (
    GPT2Config(activation_function="gelu_pytorch_tanh"),
    LlamaConfig(num_key_value_heads=8, attention_dropout=0.1),
)
"""Tested when no model is given: learned and rotary positions, full and grouped attention."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the self-test from the command line.

    Args:
        argv: its options. `None`: those of the program.

    Returns:
        The exit status: 0 if all checks pass, 1 if any fails.

    Raises:
        SystemExit: with status 2, after one line, for options that cannot be used.
    """
    print_every_letter()
    checks = ", ".join(map(_name, CHECKS))
    parser = Parser(
        "aldrift selftest", "aldrift selftest [options]", f"{(__doc__ or '').split(': ')[0]}: {checks}.", [Options]
    )
    with parser.errors_in_one_line(ImportError, OSError, ValueError):
        options, unknown = parser.parse_args_into_dataclasses(
            list(sys.argv[1:] if argv is None else argv), return_remaining_strings=True
        )
        if unknown:
            parser.refuse_unknown(unknown)
        return run(options)


def run(
    options: Options,
    families: Sequence[PreTrainedConfig] = FAMILIES,
    checks: Sequence[Check] = CHECKS,
    num_draws: int = NUM_DRAWS,
) -> int:
    """Run the self-test and print its tables.

    Args:
        options: the model and how it is run.
        families: configs of the families of which tiny models are tested when `options` names no model.
        checks: what is checked.
        num_draws: draws per prompt in the tests of frequencies.

    Returns:
        The exit status: 0 if all checks pass, 1 if any fails.

    Raises:
        ImportError, OSError, ValueError: if the model cannot be loaded or trained.
    """
    start, console = time.perf_counter(), Console(highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        options.folder = folder
        subjects: list[tuple[str, Callable[[], Subject]]] = []
        if options.model_name_or_path is not None:
            whole = whole_subject(options.model_name_or_path, options)
            subjects.append((options.model_name_or_path, lambda: whole))
            families = [base_model(whole.trainer.model).config]
        for config in families:
            title = f"a tiny {config.get_text_config().model_type}"
            subjects.append((title, functools.partial(tiny_subject, config, options, num_draws)))
        console.print(_setting(options), style="dim")
        failures = [line for title, make in subjects for line in _examine(title, make, checks, console)]
    for line in failures:
        console.print(escape(line))
    verdict, color = (f"failed checks: {len(failures)}", "red") if failures else ("all checks pass", "green")
    console.print(f"{verdict}, in {time.perf_counter() - start:.0f} s", style=f"bold {color}")
    return int(bool(failures))


def _examine(title: str, make: Callable[[], Subject], checks: Sequence[Check], console: Console) -> list[str]:
    """Check one subject and print its table. Returns a line about each check that fails, with the remedy."""
    try:
        subject = make()
    except NotShrunkError as error:
        console.print(escape(f"{title} is not checked: {error}"), style="yellow")
        return []
    except Exception as error:
        return [f"{title}: it could not be made, so nothing was checked. {_first_line(error)}"]
    table, failures = Table(title=f"[bold]{escape(title)}", box=box.SIMPLE_HEAD, pad_edge=False), []
    for column in ("check", "compared"):
        table.add_column(column)
    for column in ("distance", "bound", ""):
        table.add_column(column, justify="right")
    for check in [check for check in checks if subject.make or check in CHECKS_OF_ANY_MODEL]:
        compared, _, remedy = (check.__doc__ or "").partition("\n\n")
        try:
            distance, raised = check(subject), []
        except Exception as error:  # the other checks are made nevertheless
            distance, raised = Distance(math.nan, math.nan), [_first_line(error)]
        table.add_row(_name(check), compared, *distance.cells(), "pass" if distance.passed else "[bold red]FAIL")
        if not distance.passed:
            failures.append(" ".join([f"{title}: {_name(check)}:", *raised, *remedy.split()]))
    console.print(table)
    return failures


def _name(check: Check) -> str:
    return check.__name__.replace("_", " ")


def _setting(options: Options) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("aldrift_hf", "torch", "transformers", "peft"))
    cpu = options.device == "cpu"
    device = platform.machine() if cpu else torch.get_device_module(options.device).get_device_name()
    return (
        f"{packages}\n{options.device} ({device}), weights in {options.dtype}{' and 4 bits' * options.load_in_4bit}, "
        f"adapter in {options.adapter_dtype or 'its own precision'}, mixed precision {options.mixed_precision}, "
        f"seed {options.seed}"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
