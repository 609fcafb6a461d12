"""Priors for the recipes, fitted on the spot to draws of a local constraint.

Either a small GPT-2-architecture model with a tokenizer of its own, which needs no download and some seconds
([`small_prior`]), or a LoRA warm-up of any causal language model ([`warm_up`]). Both are cached outside the repository,
under a name that is a fingerprint of everything they depend on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .models.prompts import encode_prompt
from .reporting.progress import Bars
from .streams import stream_seed
from .trainer.samples import SampleCollator

logger = logging.getLogger(__name__)

END = "<|endoftext|>"
UNKNOWN = "<|unknown|>"

FINGERPRINT = 1000
"""Texts that a cached prior is known by: two problems that differ must not draw so many alike."""

TextSource = Callable[[int, np.random.Generator], list[str]]


@dataclass(frozen=True)
class SmallPriorConfig:
    """Size and training of a small prior.

    Attributes:
        layers, width, heads: of the GPT-2 architecture.
        steps: optimizer updates, each on `batch_size` fresh texts.
        learning_rate: peak of a one-cycle schedule.
        seed: of weights and texts.
    """

    layers: int = 2
    width: int = 64
    heads: int = 4
    steps: int = 800
    batch_size: int = 128
    learning_rate: float = 5e-3
    seed: int = 0


def word_tokenizer(words: Sequence[str], separator: str) -> PreTrainedTokenizerBase:
    """One token a word; the separator is no token, decoding puts it back. `END` opens and closes a text.

    A prompt is encoded with `END` before it, so that the beginning of a text can be a prompt.
    """
    mark = "▁"  # stands before every word, so that decoding can tell where the separator belongs
    tokens = [END, UNKNOWN, *(mark + word for word in words)]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(separator, behavior="removed"),
            pre_tokenizers.Metaspace(replacement=mark, prepend_scheme="always"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Metaspace(replacement=mark, prepend_scheme="always"),
            decoders.Replace(" ", separator),
            decoders.Fuse(),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=UNKNOWN)


def small_prior(
    words: Sequence[str],
    separator: str,
    draw: TextSource,
    config: SmallPriorConfig | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A small causal language model of the texts that `draw` yields, from the cache or trained now.

    Args:
        words: the vocabulary; every text is words joined by `separator`.
        separator: what stands between words.
        draw: `(count, rng) -> count texts`.
        config: size and training.
        cache_dir: folder of all cached priors; `None` is `$ALDRIFT_CACHE` or `~/.cache/aldrift_hf`.

    Returns:
        The model (fp32, on the CPU, in eval mode) and its tokenizer.
    """
    config = config or SmallPriorConfig()
    tokenizer = word_tokenizer(words, separator)
    folder = cache_folder(
        cache_dir, [asdict(config), list(words), separator, draw(FINGERPRINT, np.random.default_rng(config.seed))]
    )
    with PartialState().main_process_first():
        if not folder.is_dir():
            logger.warning(
                f"making the prior: {config.steps} steps of {config.batch_size} texts, to be kept in {folder}"
            )
            with torch.random.fork_rng():
                torch.manual_seed(stream_seed(config.seed))
                model = GPT2LMHeadModel(_gpt2_config(config, tokenizer, draw))
                # Long embeddings: logits are their products with a state of fixed norm, so with short ones no change of
                # the layers in between, which is all that LoRA makes, could forbid a word or single one out.
                model.transformer.wte.weight.data.mul_(4.0)
                fit(model, tokenizer, draw, config.steps, config.batch_size, config.learning_rate, config.seed)
            store(model, tokenizer, folder)
    return GPT2LMHeadModel.from_pretrained(folder).eval(), tokenizer


def fit(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    draw: TextSource,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Maximum likelihood on fresh draws, after the empty prompt: each step sees `batch_size` new texts."""
    rng = np.random.default_rng(seed)
    start, device = encode_prompt("", 0, tokenizer), model.device
    collate = SampleCollator(int(cast(int, tokenizer.eos_token_id)))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    with Bars(PartialState().is_main_process).task("updates of the prior", steps) as advance:
        for _ in range(steps):
            texts = draw(batch_size, rng)
            batch = collate([{"prompt": start, "completion": ids} for ids in completion_ids(texts, tokenizer)])
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            advance(1)
    model.eval()


def completion_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Each text's tokens as a finished completion: with the end-of-text token."""
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [[*ids, int(cast(int, tokenizer.eos_token_id))] for ids in cast(list[list[int]], encoded)]


def _gpt2_config(config: SmallPriorConfig, tokenizer: PreTrainedTokenizerBase, draw: TextSource) -> GPT2Config:
    longest = max(map(len, completion_ids(draw(64, np.random.default_rng(config.seed)), tokenizer)))
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=2 ** math.ceil(math.log2(longest + 2)),
        n_embd=config.width,
        n_layer=config.layers,
        n_head=config.heads,
        # Nothing to regularise: every batch is fresh.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=config.width**-0.5,  # GPT-2's 0.02 is for wide models
        activation_function="gelu_pytorch_tanh",  # gelu_new, fused
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def cache_folder(cache_dir: str | Path | None, made_of: list[Any]) -> Path:
    root = Path(cache_dir or os.environ.get("ALDRIFT_CACHE") or Path.home() / ".cache" / "aldrift_hf")
    fingerprint = hashlib.sha256(json.dumps([*made_of, torch.__version__], sort_keys=True).encode()).hexdigest()
    return root / f"prior-{fingerprint[:16]}"


def store(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Into the cache under a temporary name, then renamed: a run that was killed leaves no half of a prior."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    try:
        os.replace(temporary, folder)
    except OSError:  # another run was first; its prior has the same fingerprint
        shutil.rmtree(temporary)
