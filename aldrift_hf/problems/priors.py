"""A small prior made on the spot: a GPT-2-architecture model trained for some seconds on draws of a local constraint.

The recipes' default, so that they need no download. The model has a tokenizer of its own with one token a word, where
words are what stands between separators ("Acciaiuoli-Medici" is one); it is cached outside the repository, under a name
that is a fingerprint of everything it depends on.
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

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..proposals import stream_seed

logger = logging.getLogger(__name__)

END = "<|endoftext|>"
UNKNOWN = "<|unknown|>"

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
    """One token a word; the separator is no token, decoding puts it back. `END` opens, closes and pads a text."""
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, unk_token=UNKNOWN
    )


def small_prior(
    words: Sequence[str],
    separator: str,
    draw: TextSource,
    config: SmallPriorConfig | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model of the texts that `draw` yields, from the cache or trained now.

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
    root = Path(cache_dir or os.environ.get("ALDRIFT_CACHE") or Path.home() / ".cache" / "aldrift_hf")
    texts = draw(8, np.random.default_rng(config.seed))
    made_of = json.dumps([asdict(config), list(words), separator, texts, torch.__version__], sort_keys=True)
    folder = root / f"prior-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"
    tokenizer = word_tokenizer(words, separator)
    if not (folder / "config.json").is_file():
        logger.warning(f"making the prior: {config.steps} steps of {config.batch_size} fresh texts, kept in {folder}")
        _store(_train(tokenizer, draw, config), tokenizer, folder)
    model = GPT2LMHeadModel.from_pretrained(folder)
    return model.eval(), tokenizer


def _train(tokenizer: PreTrainedTokenizerBase, draw: TextSource, config: SmallPriorConfig) -> GPT2LMHeadModel:
    rng = np.random.default_rng(config.seed)
    end = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(config.seed))
        length = max(len(tokenizer(text)["input_ids"]) for text in draw(64, rng)) + 2  # type: ignore[arg-type]
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=2 ** math.ceil(math.log2(length + 1)),
                n_embd=config.width,
                n_layer=config.layers,
                n_head=config.heads,
                # Nothing to regularise: every batch is fresh.
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                activation_function="gelu_pytorch_tanh",  # gelu_new, fused
                bos_token_id=end,
                eos_token_id=end,
                pad_token_id=end,
            )
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps)
        for _ in tqdm(range(config.steps), desc="making the prior", leave=False):
            ids = [[end, *row, end] for row in tokenizer(draw(config.batch_size, rng))["input_ids"]]  # type: ignore[union-attr]
            width = max(map(len, ids))
            labels = torch.tensor([row + [-100] * (width - len(row)) for row in ids])
            loss = model(input_ids=labels.clamp(min=0), labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model


def _store(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Into the cache under a temporary name, then renamed: several processes may be making the same prior."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    try:
        os.replace(temporary, folder)
    except OSError:  # another process was first; its prior has the same fingerprint
        shutil.rmtree(temporary)
