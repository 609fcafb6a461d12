"""From names on the command line to a trainer: the cost functions, the prompts, the model and its adapter."""

from __future__ import annotations

import glob
import logging
import os
import re
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from peft import PeftConfig
from peft.utils import CONFIG_NAME as PEFT_CONFIG
from transformers import AutoTokenizer
from trl import get_peft_config, get_quantization_config

from ..models import quiet
from ..models.loading import is_adapter
from ..objective.protocol import CostFunction
from ..trainer.config import ALDRIFTConfig
from ..trainer.trainer import ALDRIFTTrainer
from .functions import load_function
from .parser import AdapterConfig, TaskArguments

logger = logging.getLogger(__name__)

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_prompts(task: TaskArguments) -> Dataset | None:
    """The dataset of `--dataset_name`: a file, a dataset on the Hub, or a single prompt. `None` if it is not given.

    Raises:
        ValueError: for a file that is missing, damaged or of an unknown format.
    """
    if task.dataset_name is None:
        return None
    name, suffix = task.dataset_name, Path(task.dataset_name).suffix.lower()
    if os.path.isfile(name):
        if suffix not in _READERS:
            raise ValueError(f"--dataset_name {name}: the name of a file of prompts ends in {', '.join(_READERS)}")
        try:
            with quiet.reading_files():
                dataset = load_dataset(_READERS[suffix], data_files=glob.escape(name), split="train")
        except (DatasetGenerationError, StopIteration, ValueError) as error:
            raise ValueError(f"--dataset_name {name} is empty or damaged: {error.__cause__ or error}") from error
        return cast(Dataset, dataset.rename_column("text", "prompt") if suffix == ".txt" else dataset)
    if suffix in _READERS:
        raise ValueError(f"--dataset_name {name}: there is no such file")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) or os.path.isdir(name):
        return cast(Dataset, load_dataset(name, task.dataset_config, split=task.dataset_train_split))
    if re.fullmatch(r"\S+(\.[A-Za-z]\w{0,6}|[/\\])", name):
        raise ValueError(
            f"--dataset_name {name}: there is no such file or folder (a prompt with such a name: in a file)"
        )
    logger.warning(f"--dataset_name is neither a file nor a data set's id, so it is the prompt: {name!r}")
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
    objectives: list[CostFunction] = [load_function(name, "--objective") for name in task.objective]
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
