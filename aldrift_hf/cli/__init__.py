"""The command `aldrift`: train, sample, evaluate, report, and whether all is well with the machine."""

from __future__ import annotations

import contextlib
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from huggingface_hub import snapshot_download
from rich.console import Console
from transformers import PrinterCallback, TrainingArguments

from .. import selftest as tests
from ..models.prior import PRIOR_ADAPTER
from ..reporting import health
from ..reporting.record import RUN_FILE, RunRecord
from ..reporting.report import write_report
from ..trainer.config import ALDRIFTConfig
from ..trainer.trainer import ALDRIFTTrainer
from .parser import Arguments
from .task import make_trainer

OPTIONS_FILE = "run.yaml"
"""Where a run of the command line keeps its options, for `--config` and for the commands that come after it."""

USAGE = """\
usage: aldrift COMMAND ...

  train      turn a model into a sampler of p_T(s) ∝ L(s)·exp(-T·d(s)), for a cost d of yours
  sample     draw from a trained model, corrected to p_T
  evaluate   measure how close a trained model is to p_T
  report     write a run's report.html anew, and say how the run came out
  selftest   check exact probabilities and draws on this machine, device and model
  env        versions and devices, for a bug report

aldrift COMMAND --help explains each. On several processes:
accelerate launch -m aldrift_hf.cli train ...
"""


@dataclass
class SampleArguments:
    """What to draw."""

    _argument_group_name = "draws"
    num_samples: int = field(default=16, metadata={"help": "Samples a prompt.", "aliases": ["-n"]})
    correction: Literal["metropolis_hastings", "isir", "none"] = field(
        default="metropolis_hastings",
        metadata={"help": "How proposals become draws of p_T; none: the model's own draws, as they come."},
    )
    output: str | None = field(
        default=None, metadata={"help": "A file for the draws, as JSON lines. None: standard output."}
    )


def train(argv: Sequence[str]) -> None:
    parser = Arguments(
        "aldrift train",
        "aldrift train --objective MODULE:FUNCTION --model_name_or_path MODEL [--dataset DATASET] [options]",
        "Climbs the temperature ladder from the prior, MODEL, to p_T(s) ∝ L(s)·exp(-T·d(s)).",
    )
    task, config, model = parser.parse(argv)
    trainer = _made(parser, task, config, model)
    if trainer.is_world_process_zero():
        Path(config.output_dir, OPTIONS_FILE).write_text(yaml.safe_dump(parser.given, allow_unicode=True))
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()  # and pushes it, with push_to_hub
    if trainer.is_world_process_zero():
        _say(trainer.record, config.output_dir)


def sample(argv: Sequence[str]) -> None:
    parser = Arguments(
        "aldrift sample",
        "aldrift sample RUN -n NUMBER [options]",
        "Draws of p_T from the trained model in RUN (a folder, or a model id of the Hub), as JSON lines. The run's own "
        "options stand unless others are given.",
        [SampleArguments],
    )
    with tempfile.TemporaryDirectory() as scratch:
        (asked,), trainer = _trained(parser, argv, scratch)
        plain = asked.correction == "none"
        draws = trainer.sample(
            asked.num_samples,
            chain_length=1 if plain else None,
            correction="metropolis_hastings" if plain else asked.correction,
        )
        if trainer.is_world_process_zero():
            with contextlib.nullcontext(sys.stdout) if asked.output is None else open(asked.output, "w") as file:
                file.writelines(json.dumps(draw, ensure_ascii=False) + "\n" for draw in draws)


def evaluate(argv: Sequence[str]) -> None:
    parser = Arguments(
        "aldrift evaluate",
        "aldrift evaluate RUN [options]",
        "Measures the trained model in RUN (a folder, or a model id of the Hub) on fresh draws, and prints the metrics "
        "of ALDRIFTTrainer.evaluate as JSON. The run's own options stand unless others are given.",
    )
    with tempfile.TemporaryDirectory() as scratch:
        _, trainer = _trained(parser, argv, scratch)
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            print(json.dumps(metrics, indent=2))


def report(argv: Sequence[str]) -> None:
    if len(argv) != 1 or argv[0].startswith("-"):
        print("usage: aldrift report RUN\n\nWrites RUN/report.html from the files of a run, under way or ended.")
        raise SystemExit(0 if argv[:1] in (["--help"], ["-h"]) else 2)
    try:
        record = RunRecord.read(argv[0])
        write_report(record, argv[0])
        _say(record, argv[0])
    except (ValueError, OSError) as error:
        raise SystemExit(f"aldrift report: {error}") from None
    except (LookupError, TypeError, AttributeError) as error:  # of a figure that is not there, or is none
        raise SystemExit(f"aldrift report: the files of {argv[0]} are not those of a whole run: {error!r}") from None


def selftest(argv: Sequence[str]) -> None:
    raise SystemExit(tests.main(argv))


def env(argv: Sequence[str]) -> None:
    packages = (
        *("aldrift_hf", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes"),
        *("deepspeed", "huggingface_hub", "numpy", "safetensors"),
    )
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count()
    names = [torch.cuda.get_device_name(i) for i in range(count)] if torch.cuda.is_available() else []
    devices = "none" if accelerator is None else f"{count} of {accelerator.type} {', '.join(sorted(set(names)))}"
    lines = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "accelerators": devices,
        "bf16 on them": str(torch.cuda.is_bf16_supported()) if names else "-",
        "threads": str(torch.get_num_threads()),
    }
    for name, value in lines.items():
        print(f"- {name}: {value}")


COMMANDS = {
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "report": report,
    "selftest": selftest,
    "env": env,
}

_FROM_STRANGERS = {
    *(field.name for field in fields(ALDRIFTConfig)),
    *("model_name_or_path", "model_revision", "dtype", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type"),
    *("use_bnb_nested_quant", "dataset", "dataset_config", "dataset_split"),
} - {field.name for field in fields(TrainingArguments)} - {"model_init_kwargs"} | {"bf16", "fp16", "seed"}
"""Options that are taken from a run of the Hub: what it is, and nothing that names code or files of this machine."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; `argv` is the program's own where it is `None`."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
    elif argv[0] not in COMMANDS:
        raise SystemExit(f"aldrift: there is no command {argv[0]!r}; it is one of {', '.join(COMMANDS)}")
    else:
        try:
            COMMANDS[argv[0]](argv[1:])
        except KeyboardInterrupt as stop:
            print(f"aldrift {argv[0]}: {stop or 'stopped'}", file=sys.stderr)
            raise SystemExit(130) from None


def _made(parser: Arguments, *options: Any) -> ALDRIFTTrainer:
    try:
        return make_trainer(*options)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))


def _trained(parser: Arguments, argv: Sequence[str], scratch: str) -> tuple[list[Any], ALDRIFTTrainer]:
    """The command's own options, and the trainer of a run with the model that it trained.

    Args:
        parser: of the command.
        argv: the run, and options that differ from its own.
        scratch: a folder for what a trainer writes.
    """
    if argv[:1] in (["-h"], ["--help"]):
        parser.parse(argv)
    if not argv or argv[0].startswith("-"):
        parser.error(f"name the run first: {parser.usage}")
    here = Path(argv[0]).is_dir()
    try:
        folder = Path(argv[0]) if here else _downloaded(argv[0])
        saved = _saved_options(folder)
        if not here:
            saved = {name: value for name, value in saved.items() if name in _FROM_STRANGERS}
        if (folder / PRIOR_ADAPTER).is_dir():  # the prior was an adapter, and is trained on
            saved["model_name_or_path"] = str(folder / PRIOR_ADAPTER)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    of_this_call = {"output_dir": scratch, "report_to": "none", "push_to_hub": False, "save_strategy": "no"}
    *own, task, config, model = parser.parse(argv[1:], saved | of_this_call)
    trainer = _made(parser, task, config, model, folder)
    trainer.bars.console.stderr = True  # standard output is for results
    trainer.remove_callback(PrinterCallback)
    trainer.load_run(folder)
    return own, trainer


def _downloaded(name: str) -> Path:
    try:
        return Path(snapshot_download(name))
    except (ValueError, OSError) as error:
        raise ValueError(f"{name} is no folder here, and cannot be had from the Hub: {error}") from error


def _saved_options(folder: Path) -> dict[str, Any]:
    """The options of a run: those it was given or, where it came from Python, those that its record knows."""
    if (folder / OPTIONS_FILE).is_file():
        try:
            saved = yaml.safe_load((folder / OPTIONS_FILE).read_bytes())
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{folder / OPTIONS_FILE} is damaged: {error}") from error
        if not isinstance(saved, dict) or not all(isinstance(name, str) for name in saved):
            raise ValueError(f"{folder / OPTIONS_FILE} is damaged: it is no mapping of options to values")
    elif (folder / RUN_FILE).is_file():
        settings = RunRecord.read(folder).settings
        known = {field.name for field in fields(ALDRIFTConfig)}
        saved = {name: value for name, value in settings.items() if name in known and value is not None}
        saved["model_name_or_path"] = settings.get("base_model")
    else:
        raise ValueError(f"{folder} is not the output directory of a run: it has neither {OPTIONS_FILE} nor {RUN_FILE}")
    # Whether a model's own code may run is for the user to say, each time.
    if isinstance(saved.get("model_init_kwargs"), dict):
        saved["model_init_kwargs"].pop("trust_remote_code", None)
    return {name: value for name, value in saved.items() if name not in ("env", "trust_remote_code")}


def _say(record: RunRecord, folder: str) -> None:
    """The outcome, the warnings, and where things are."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(health.outcome(record), markup=False)
    for warning in health.warnings(record):
        console.print(f"warning: {warning}", markup=False, style="yellow")
    console.print(f"report: {folder}/report.html", markup=False)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
