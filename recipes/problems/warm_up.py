"""A LoRA warm-up of any causal language model on texts, cached outside the repository."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aldrift_hf.models import quiet
from aldrift_hf.streams import stream_seed
from aldrift_hf.toy import NUM_FINGERPRINT_TEXTS, TextSource, cache_folder, completion_ids, fit, store

logger = logging.getLogger(__name__)


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    draw: TextSource,
    peft_config: PeftConfig,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> PeftModel:
    """A model with an adapter fitted to texts, from the cache or trained now.

    If the result is passed to the trainer, a frozen copy of the adapter is the prior, and the adapter is trained on.

    Args:
        model: a causal language model, quantized or not.
        tokenizer: its tokenizer.
        draw: draws texts.
        peft_config: the adapter's configuration.
        steps: optimizer updates.
        batch_size: new texts per update.
        learning_rate: peak of a one-cycle schedule.
        seed: random seed of the adapter's weights and of the texts.
        cache_dir: the folder of all cached priors, as in [`aldrift_hf.toy.small_prior`].
    """
    texts = completion_ids(draw(NUM_FINGERPRINT_TEXTS, np.random.default_rng(seed)), tokenizer)
    folder = cache_folder(cache_dir, [steps, batch_size, learning_rate, seed, *fingerprints(model, peft_config), texts])
    with PartialState().main_process_first():
        if not folder.is_dir():
            logger.warning(f"warming up the prior: {steps} updates on {batch_size} texts each; cached in {folder}")
            with torch.random.fork_rng():
                torch.manual_seed(stream_seed(seed))
                with quiet.new_adapter():
                    fitted = cast(PeftModel, get_peft_model(model, peft_config))
                fit(fitted, tokenizer, draw, steps, batch_size, learning_rate, seed)
            store(fitted, tokenizer, folder)
            model = cast(PreTrainedModel, fitted.unload())  # without the adapter, which is loaded below
    with quiet.new_adapter():
        return PeftModel.from_pretrained(model, folder, is_trainable=True)


def fingerprints(model: PreTrainedModel, peft_config: PeftConfig) -> tuple[str, str]:
    """What tells a model from others (a few values of every tensor, which other revisions and quantizations do not
    share), and the adapter's configuration."""
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, tensor in model.state_dict().items():
        ends = torch.cat([tensor.flatten()[:16], tensor.flatten()[-16:]]).cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {ends.tolist()}".encode())
    return digest.hexdigest(), json.dumps(peft_config.to_dict(), sort_keys=True, default=sorted)
