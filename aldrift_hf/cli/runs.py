"""A trained run as a trainer: what `aldrift sample` and `aldrift evaluate` begin with."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download
from transformers import PrinterCallback, TrainingArguments

from ..algorithm.ladders import LADDERS
from ..algorithm.samplers import SAMPLERS
from ..models.engines import ENGINES
from ..objective.store import FOLDER as COSTS_FOLDER
from ..objective.store import file_of_machine
from ..reporting.console import print_to_stderr
from ..reporting.record import RUN_FILE, RunRecord
from ..trainer.config import ALDRIFTConfig
from ..trainer.trainer import ALDRIFTTrainer
from .parser import RunParser
from .task import make_trainer

OPTIONS_FILE = "run.yaml"
"""The file in a run's output directory with its options, for `--config` and for later commands."""

_OWN_SETTINGS = {field.name for field in fields(ALDRIFTConfig)} - {field.name for field in fields(TrainingArguments)}
_LOADED = ("model_revision", "dtype", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")
HUB_OPTIONS = {
    *(_OWN_SETTINGS - {"model_init_kwargs", "objective_cache_key", "engine", "engine_kwargs"}),
    *("model_name_or_path", *_LOADED, "dataset_name", "dataset_config", "dataset_train_split", "bf16", "fp16", "seed"),
}
"""Options that are taken from a run on the Hub: those that describe it, and name no code or file of this machine."""
DEFAULTS = (
    "Options default to those of a run by `aldrift train`. A run from Python needs --objective and, if it had prompts, "
    "--dataset_name; one from the Hub needs --objective."
)


def load(
    parser: RunParser, argv: Sequence[str], scratch: str, check: Callable[[Any], None] = lambda own: None
) -> tuple[list[Any], ALDRIFTTrainer]:
    """The command's own options, and a trainer with the model that a run trained.

    Args:
        parser: the command's.
        argv: the run, and options that replace its own.
        scratch: a folder for whatever the trainer writes.
        check: called with each class of the command's own options, before anything is loaded.

    Raises:
        SystemExit: after one line that says what is wrong.
    """
    folder, (*own, task, config, model) = parse(parser, argv, scratch)
    with parser.errors_in_one_line(ValueError, OSError):
        for options in own:
            check(options)
    with contextlib.redirect_stdout(sys.stderr), parser.errors_in_one_line(ValueError, TypeError, OSError):
        trainer = make_trainer(task, config, model, folder)  # a module of costs may print
    print_to_stderr(trainer.callback_handler.callbacks)
    trainer.remove_callback(PrinterCallback)
    with parser.errors_in_one_line(ValueError):
        if task.dataset_name is None:
            _check_prompts(folder, trainer)
    trainer.load_run(folder)
    if Path(argv[0]).is_dir() and os.access(folder, os.W_OK):  # what the run has paid for is not paid for again
        store = trainer.objective.store
        store.folder, store.first_file = folder / COSTS_FOLDER, file_of_machine()
        store.about = None  # an objective of this command is not the run's
    return own, trainer


def parse(parser: RunParser, argv: Sequence[str], scratch: str) -> tuple[Path, tuple[Any, ...]]:
    """The folder of the run that `argv` names, and the options: the run's own, unless `argv` replaces them."""
    if argv[:1] in (["-h"], ["--help"]):
        parser.parse(argv)
    if not argv or argv[0].startswith("-"):
        parser.error(f"name the run first: {parser.usage}")
    local = Path(argv[0]).is_dir()
    with parser.errors_in_one_line(ValueError, OSError):
        folder = Path(argv[0]) if local else _download(argv[0])
        saved = _saved_options(folder)
        if not local:
            saved = {name: value for name, value in saved.items() if name in HUB_OPTIONS}
        if (frozen := _frozen_adapter(folder)) is not None:
            saved["model_name_or_path"] = str(frozen)
    fixed = {"output_dir": scratch, "report_to": "none", "push_to_hub": False, "save_strategy": "no"}
    return folder, parser.parse(argv[1:], saved | fixed)


def _check_prompts(folder: Path, trainer: ALDRIFTTrainer) -> None:
    """A run from Python has its prompts nowhere but in its fingerprint: others are not drawn for in their place."""
    of_run = RunRecord.read(folder).settings if (folder / RUN_FILE).is_file() else {}
    if of_run.get("prompts_fingerprint", now := trainer.record.settings["prompts_fingerprint"]) != now:
        raise ValueError(
            f"the run in {folder} had prompts of its own ({of_run['prompts']:,}), which its folder does not hold. Give "
            "them, or others, as --dataset_name: a file, a dataset on the Hub, or one prompt"
        )


def _download(model_id: str) -> Path:
    try:
        return Path(snapshot_download(model_id))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{model_id} is neither a folder nor a model on the Hub that can be downloaded: {error}"
        ) from error


def _frozen_adapter(folder: Path) -> Path | None:
    """The folder of the adapter that is the prior of a run which trained on from an adapter."""
    name = RunRecord.read(folder).settings.get("prior_adapter") if (folder / RUN_FILE).is_file() else None
    # A name in a downloaded file must not lead elsewhere.
    return folder / name if isinstance(name, str) and name == Path(name).name else None


def _saved_options(folder: Path) -> dict[str, Any]:
    """A run's options: its `run.yaml` or, for a run from Python, the settings in its record."""
    if (folder / OPTIONS_FILE).is_file():
        try:
            saved = yaml.safe_load((folder / OPTIONS_FILE).read_bytes())
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{folder / OPTIONS_FILE} is damaged: {error}") from error
        if not isinstance(saved, dict) or not all(isinstance(name, str) for name in saved):
            raise ValueError(f"{folder / OPTIONS_FILE} is damaged: it does not map options to values")
    elif (folder / RUN_FILE).is_file():
        settings = RunRecord.read(folder).settings
        known = {field.name for field in fields(ALDRIFTConfig)}
        saved = {name: value for name, value in settings.items() if name in known and value is not None}
        for part, registry in (("sampler", SAMPLERS), ("ladder", LADDERS), ("engine", ENGINES)):
            if saved.get(part) not in registry:  # the user's own, by its class; a trained model is sampled without it
                saved.pop(part, None)
        loaded = settings.get("loaded", {})
        saved |= {name: loaded[name] for name in _LOADED if name in loaded}
        saved["model_name_or_path"] = settings.get("base_model")
    else:
        raise ValueError(f"{folder} is not the output directory of a run: it has neither {OPTIONS_FILE} nor {RUN_FILE}")
    # A file must not allow a model's own code to run: the user decides that, every time.
    for name in ("model_init_kwargs", "engine_kwargs"):
        if isinstance(saved.get(name), dict):
            saved[name].pop("trust_remote_code", None)
    return {name: value for name, value in saved.items() if name not in ("env", "trust_remote_code")}
