"""From names on the command line to a trainer: the cost functions, the prompts, the model and its adapter."""

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

from ..models import quiet
from ..models.loading import is_adapter
from ..objective.protocol import CostFunction
from ..trainer.config import ALDRIFTConfig
from ..trainer.trainer import ALDRIFTTrainer
from .parser import AdapterConfig, TaskArguments

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_objective(name: str) -> CostFunction:
    """The cost function `MODULE:FUNCTION` or `FILE.py:FUNCTION`; a module may also be in the working directory.

    Raises:
        ValueError: if the name is wrong; the message says which part. Errors inside the module are not caught.
    """
    source, colon, attribute = name.rpartition(":")
    if not colon or not source or not attribute:
        raise ValueError(f"--objective {name}: write MODULE:FUNCTION or FILE.py:FUNCTION")
    module = _load_file(source) if source.endswith(".py") else _load_module(source)
    try:
        function = operator.attrgetter(attribute)(module)
    except AttributeError:
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        similar = difflib.get_close_matches(attribute, known, n=1)
        hint = f"did you mean {similar[0]}?" if similar else f"its functions: {', '.join(known) or 'none'}."
        raise ValueError(f"--objective {name}: {source} has no function {attribute!r}; {hint}") from None
    if not callable(function):
        raise ValueError(f"--objective {name}: {attribute} is not a function, but {type(function).__name__}")
    return cast(CostFunction, function)


def _load_file(path: str) -> ModuleType:
    """Import a file under a unique name, so that a `random.py` does not replace the module `random`."""
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
            raise  # the module exists, and one that it imports does not
        raise ValueError(
            f"--objective {name}: there is no module {error.name!r}, neither installed nor in {os.getcwd()}"
        ) from None


def load_prompts(task: TaskArguments) -> Dataset | None:
    """The dataset of `--dataset_name`: a file, a dataset on the Hub, or a single prompt. `None` if it is not given.

    Raises:
        ValueError: for a file that is missing or of an unknown format.
    """
    if task.dataset_name is None:
        return None
    name, suffix = task.dataset_name, Path(task.dataset_name).suffix.lower()
    if os.path.isfile(name):
        if suffix not in _READERS:
            raise ValueError(f"--dataset_name {name}: the name of a file of prompts ends in {', '.join(_READERS)}")
        with quiet.reading_files():
            dataset = load_dataset(_READERS[suffix], data_files=name, split="train")
        return cast(Dataset, dataset.rename_column("text", "prompt") if suffix == ".txt" else dataset)
    if suffix in _READERS:
        raise ValueError(f"--dataset_name {name}: there is no such file")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) or os.path.isdir(name):
        return cast(Dataset, load_dataset(name, task.dataset_config, split=task.dataset_train_split))
    return Dataset.from_dict({"prompt": [name]})


def make_trainer(
    task: TaskArguments, config: ALDRIFTConfig, model: AdapterConfig, run: Path | None = None
) -> ALDRIFTTrainer:
    """A trainer with these options. Mistakes in them are found before the model is loaded.

    Args:
        task: the objective and the prompts.
        config: the settings; those of the model are added to its `model_init_kwargs`.
        model: the model and its adapter.
        run: the output directory of a finished run, whose tokenizer and adapter settings are used.

    Raises:
        ValueError, TypeError, OSError: for an option that cannot be used; the message says what to change.
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
    # Training continues an adapter as it is, and its frozen copy is the prior.
    adapter = is_adapter(model.model_name_or_path, config.model_init_kwargs)
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
