"""From names on a command line to what the trainer wants: a cost function, prompts, a model with an adapter."""

from __future__ import annotations

import difflib
import importlib.util
import operator
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from datasets import Dataset, load_dataset
from peft import PeftConfig
from peft.utils import CONFIG_NAME as PEFT_CONFIG
from transformers import AutoTokenizer
from trl import get_peft_config, get_quantization_config

from ..models.loading import is_adapter
from ..objective.objective import CostFunction
from ..trainer.config import ALDRIFTConfig
from ..trainer.trainer import ALDRIFTTrainer
from .parser import AdapterConfig, TaskArguments

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_objective(name: str) -> CostFunction:
    """The cost function `MODULE:FUNCTION` or `FILE.py:FUNCTION`; modules are looked for in the working directory too.

    Raises:
        ValueError: saying which part of the name is wrong. An error inside the module goes through as it is.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise ValueError(f"--objective {name}: name it as MODULE:FUNCTION or FILE.py:FUNCTION")
    module = _load_file(place) if place.endswith(".py") else _load_module(place)
    try:
        function = operator.attrgetter(attribute)(module)
    except AttributeError:
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        alike = difflib.get_close_matches(attribute, there, n=1)
        hint = f"did you mean {alike[0]}?" if alike else f"it has {', '.join(there) or 'none'}."
        raise ValueError(f"--objective {name}: {place} has no function {attribute!r}; {hint}") from None
    if not callable(function):
        raise ValueError(f"--objective {name}: {attribute} is not a function, but {type(function).__name__}")
    return cast(CostFunction, function)


def _load_file(path: str) -> ModuleType:
    """Imports a file under a name of its own: one called `random.py` hides no other module."""
    if not os.path.isfile(path):
        raise ValueError(f"--objective {path}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"objective:{Path(path).stem}", path)
    module = importlib.util.module_from_spec(cast(Any, spec))
    sys.modules[module.__name__] = module
    cast(Any, spec).loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and misses one of its own
        raise ValueError(
            f"--objective {name}: there is no module {error.name!r}, neither installed nor in {os.getcwd()}"
        ) from None


def load_prompts(task: TaskArguments) -> Dataset | None:
    """The data set that `--dataset` means: a file, an id of the Hub, or one prompt.

    Raises:
        ValueError: for a file that is missing, or of a kind that is not known.
    """
    if task.dataset is None:
        return None
    suffix = Path(task.dataset).suffix.lower()
    if os.path.isfile(task.dataset):
        if suffix not in _READERS:
            raise ValueError(f"--dataset {task.dataset}: a file of prompts ends in {', '.join(_READERS)}")
        dataset = load_dataset(_READERS[suffix], data_files=task.dataset, split="train")
        return cast(Dataset, dataset.rename_column("text", "prompt") if suffix == ".txt" else dataset)
    if suffix in _READERS:
        raise ValueError(f"--dataset {task.dataset}: there is no such file")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", task.dataset) or os.path.isdir(task.dataset):
        return cast(Dataset, load_dataset(task.dataset, task.dataset_config, split=task.dataset_split))
    return Dataset.from_dict({"prompt": [task.dataset]})


def make_trainer(
    task: TaskArguments, config: ALDRIFTConfig, model: AdapterConfig, run: Path | None = None
) -> ALDRIFTTrainer:
    """The trainer that the options mean; what can be wrong with them is found before the model is loaded.

    Args:
        task: cost and prompts.
        config: settings; the model's go into its `model_init_kwargs`.
        model: the model and its adapter.
        run: the output directory of a run, to make a trainer like its own, with its tokenizer and kind of adapter.

    Raises:
        ValueError, TypeError, OSError: with what to change.
    """
    if model.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: the id or path of a causal language model, the prior")
    objectives = [load_objective(name) for name in task.objective]
    dataset = load_prompts(task)
    kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        "quantization_config": get_quantization_config(model),
        "trust_remote_code": model.trust_remote_code,
    }
    config.model_init_kwargs = {
        **{key: value for key, value in kwargs.items() if value},
        **cast(dict[str, Any], config.model_init_kwargs or {}),
    }
    peft_config = get_peft_config(model)
    if run is not None:
        peft_config = PeftConfig.from_pretrained(str(run)) if (run / PEFT_CONFIG).is_file() else None
    # An adapter is trained on as it is: its frozen copy is the prior.
    adapter = is_adapter(model.model_name_or_path, config)
    return ALDRIFTTrainer(
        model=model.model_name_or_path,
        objective=objectives,
        args=config,
        train_dataset=dataset,
        processing_class=None
        if run is None
        else AutoTokenizer.from_pretrained(run, trust_remote_code=model.trust_remote_code),
        peft_config=None if adapter else peft_config,
    )
