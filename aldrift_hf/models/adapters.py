"""Adapters of a `PeftModel`, whatever their names: where their weights lie in a folder, and how they are loaded."""

from __future__ import annotations

import copy
import itertools
import logging
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

logger = logging.getLogger(__name__)

FROZEN = "prior"
"""Name of the frozen adapter that holds the prior of a `PeftModel`, followed by a number where it is taken."""

_NEVER_PUSHED = ("_", "checkpoint-")
"""Folders of `output_dir` that begin so are not pushed to the Hub, and those of checkpoints are deleted in turn."""


def folder_of(folder: Path, name: str) -> Path:
    """Where PEFT saves the adapter of a name below a folder: `default` in the folder itself, others in subfolders."""
    return folder if name == "default" else folder / name


def load_active(model: PeftModel, folder: Path, saved_as: str | None = None) -> None:
    """Put the weights that were saved in a folder into a model's active adapter.

    Args:
        model: its active adapter may have another name than it had when it was saved.
        folder: a run's, or a checkpoint's.
        saved_as: the name that the adapter had then; `None` for its present one.

    Raises:
        ValueError: if the folder holds no adapter of that name, or one with other parameters.
    """
    name = str(model.active_adapter)
    if saved_as is not None and saved_as != Path(saved_as).name:  # read from a file, it must not lead elsewhere
        saved_as = None
    sources = [folder_of(folder, each) for each in (saved_as, name) if each is not None]
    source = next(filter(_has_weights, sources), None)
    if source is None:
        raise ValueError(f"{folder} holds no adapter called {saved_as or name!r}: it has no weights in {sources[0]}.")
    result = cast(Any, model.load_adapter(str(source), name, is_trainable=True))
    # Up to PEFT 0.18, an adapter whose name is part of another's parameters' names is saved with these, too.
    others = [f".{other}." for other in model.peft_config if other != name]
    unexpected = [key for key in getattr(result, "unexpected_keys", ()) if not any(other in key for other in others)]
    if unexpected:
        raise ValueError(f"the adapter in {source} does not fit this model: it has parameters {unexpected[:3]} too.")


def _has_weights(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("adapter_model.safetensors", "adapter_model.bin"))


def add_frozen_copy(model: PeftModel) -> str:
    """Add a frozen copy of the active adapter to a model, and return the copy's name.

    Raises:
        ValueError: unless there is one active adapter, which is not merged, under a name that can be saved.
    """
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"the PeftModel has {len(active)} active adapters ({active}); activate the one to train.")
    name = active[0]
    if name.startswith(_NEVER_PUSHED):
        raise ValueError(
            f"the adapter to train is called {name!r}, and folders whose names begin with '_' or 'checkpoint-' are "
            "not pushed to the Hub. Give it another name."
        )
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError("the PeftModel's adapter is merged into its base; call model.unmerge_adapter() first.")
    if any(layer.disable_adapters for layer in layers):
        raise ValueError("the PeftModel's adapter is switched off; call model.enable_adapter_layers() first.")
    taken = {*model.peft_config, *(part for path, _ in model.named_modules() for part in path.split("."))}
    numbered = (f"{FROZEN}{number}" for number in itertools.count(2))
    frozen_name = next(each for each in itertools.chain([FROZEN], numbered) if each not in taken)
    if FROZEN in model.peft_config:
        logger.warning(
            f"the PeftModel already has an adapter called {FROZEN!r}, as after an earlier ALDRIFTTrainer. The prior of "
            f"this run is the adapter {name!r} as it is now, after that training. If you meant the original, load "
            "the model again."
        )
    config = copy.deepcopy(model.peft_config[name])
    config.inference_mode = True  # some kinds of adapters (AdaLoRA) allow one that is trained
    # Its values are overwritten below: what matters is that creating the adapter does not change the base weights.
    if hasattr(config, "init_lora_weights"):
        cast(Any, config).init_lora_weights = True
    model.add_adapter(frozen_name, config)
    parameters = dict(model.named_parameters())
    frozen = [path for path in parameters if frozen_name in path.split(".")]
    for path in frozen:
        # PEFT may make it in another precision, which would round its values, or what is computed with them.
        original = parameters.get(".".join(name if part == frozen_name else part for part in path.split(".")))
        if original is not None:
            parameters[path].data = parameters[path].data.to(original.dtype)
    set_peft_model_state_dict(model, get_peft_model_state_dict(model, adapter_name=name), adapter_name=frozen_name)
    model.set_adapter(name)
    for path in frozen:
        parameters[path].requires_grad_(False)
    return frozen_name


def cast_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """Put the trained parameters into a precision, before an optimizer holds them. PEFT makes adapters in fp32."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def has_layers(model: nn.Module) -> bool:
    """Whether PEFT has put adapter layers into a model."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())
