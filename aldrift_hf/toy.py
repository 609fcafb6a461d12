"""Small priors that are made on the spot, without a download: for documentation, recipes and tests.

[`small_prior`] fits a small GPT-2 with a tokenizer of its own ([`word_tokenizer`]) to texts from a function, in some
seconds. The result is cached outside the repository, under a fingerprint of everything that it depends on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftModel
from rich.console import Console
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .models import quiet
from .models.kernels import attention_of_any_shape
from .models.loading import context_length
from .models.prior import base_model
from .models.prompts import encode_prompt
from .reporting.progress import ProgressBars
from .streams import stream_seed
from .trainer.samples import SampleCollator
from .types import no_progress

logger = logging.getLogger(__name__)

END = "<|endoftext|>"
UNKNOWN = "<|unknown|>"

NUM_FINGERPRINT_TEXTS = 1000
"""Texts in a cached prior's fingerprint: so many that two different problems do not draw the same ones."""

TextSource = Callable[[int, np.random.Generator], list[str]]
"""`(count, rng) -> texts`: draws `count` texts."""


@dataclass(frozen=True)
class SmallPriorConfig:
    """Size and training of a small prior.

    Attributes:
        layers, width, heads: the size of the GPT-2 model.
        steps: optimizer updates, each on `batch_size` new texts.
        learning_rate: peak of a one-cycle schedule.
        seed: random seed of weights and texts.
        batches_per_draw: batches whose texts are drawn at once, and then sorted by length into batches with little
            padding, which come in random order. For texts of many lengths.
        longest: tokens of the longest text; `None`: as many as the longest of 64 random texts has.
    """

    layers: int = 2
    width: int = 64
    heads: int = 4
    steps: int = 800
    batch_size: int = 128
    learning_rate: float = 5e-3
    seed: int = 0
    batches_per_draw: int = 1
    longest: int | None = None


def word_tokenizer(words: Sequence[str], separator: str) -> PreTrainedTokenizerBase:
    """A tokenizer with one token per word. The separator is not a token; decoding puts it back.

    `END` is the end-of-text token, and a prompt is encoded with `END` before it.

    Args:
        words: the vocabulary. Any other word becomes `UNKNOWN`.
        separator: the text between words. If it is empty, a text is cut from the left into the longest words.

    Raises:
        ValueError: for a word that is there twice, or that would be cut, because it has the separator, a space or a `▁`
            in it.
    """
    if twice := [word for word, times in Counter(words).items() if times > 1]:
        raise ValueError(f"each word is a token of its own, so it must be there once: got {twice[0]!r} again")
    mark = "▁" if separator else ""  # precedes every word, so that decoding knows where the separator belongs
    if mark and (cut := [word for word in words if any(part in word for part in (separator, " ", mark))]):
        raise ValueError(f"words must be without {separator!r}, ' ' and {mark!r}, which would cut them: got {cut[0]!r}")
    tokens = [END, UNKNOWN, *(mark + word for word in words)]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=UNKNOWN))
    if separator:
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
    else:
        longest_first = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), behavior="isolated")
        tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=UNKNOWN)


def small_prior(
    words: Sequence[str],
    separator: str,
    draw: TextSource,
    config: SmallPriorConfig | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A small causal language model of the texts that `draw` returns, from the cache or trained now.

    Args:
        words: the vocabulary; every text consists of words joined by `separator`.
        separator: the text between words, as in [`word_tokenizer`].
        draw: draws texts.
        config: size and training. `None`: the defaults of [`SmallPriorConfig`].
        cache_dir: the folder of all cached priors. `None`: `$ALDRIFT_CACHE`, or `~/.cache/aldrift_hf`.

    Returns:
        The model (fp32, on the CPU, in eval mode) and its tokenizer.
    """
    config = config or SmallPriorConfig()
    tokenizer = word_tokenizer(words, separator)
    texts = draw(NUM_FINGERPRINT_TEXTS, np.random.default_rng(config.seed))
    folder = cache_folder(cache_dir, [asdict(config), list(words), separator, texts])
    with PartialState().main_process_first():
        if not folder.is_dir():
            logger.warning(
                f"training the prior: {config.steps} updates on {config.batch_size} texts each; cached in {folder}"
            )
            with torch.random.fork_rng():
                torch.manual_seed(stream_seed(config.seed))
                model = GPT2LMHeadModel(_gpt2_config(config, tokenizer, draw))
                # Logits are products of the embeddings with a state of fixed norm. With short embeddings, no change of
                # the layers in between, which is all that LoRA makes, could exclude a word or make one certain.
                model.transformer.wte.weight.data.mul_(4.0)
                fit(
                    model, tokenizer, draw, config.steps, config.batch_size, config.learning_rate, config.seed,
                    config.batches_per_draw,
                )  # fmt: skip
            store(model, tokenizer, folder)
    with quiet.late_bars():
        return GPT2LMHeadModel.from_pretrained(folder).eval(), tokenizer


def fit(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    draw: TextSource,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    batches_per_draw: int = 1,
) -> None:
    """Train a model by maximum likelihood on texts after the empty prompt.

    Args:
        model: the model; its trainable parameters are updated.
        tokenizer: its tokenizer.
        draw: draws texts.
        steps: optimizer updates.
        batch_size: new texts per update.
        learning_rate: peak of a one-cycle schedule.
        seed: random seed of the texts.
        batches_per_draw: as in [`SmallPriorConfig`].

    Raises:
        ValueError: for a text that is longer than the model's context.
    """
    rng = np.random.default_rng(seed)
    start, device = encode_prompt("", 0, tokenizer), model.device
    collate = SampleCollator(int(cast(int, tokenizer.eos_token_id)))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    base_model(model).loss_type = "ForCausalLM"  # which the class name of GPT-2 does not tell, as a warning says
    model.train()
    what, room = "updates of the prior", context_length(base_model(model).config) or math.inf
    progress = ProgressBars(Console()).progress(what, steps) or no_progress(what, steps)
    with attention_of_any_shape(), progress as advance:
        for texts in itertools.islice(_batches(draw, batch_size, batches_per_draw, rng), steps):
            completions = completion_ids(texts, tokenizer)
            if (length := len(start) + max(map(len, completions))) > room:
                raise ValueError(
                    f"a text has {length} tokens with its ends, and the model's context is {room}: for a small prior "
                    "set longest, the tokens of the longest text."
                )
            batch = collate([{"prompt": start, "completion": ids} for ids in completions])
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            advance(1)
    model.eval()


def _batches(draw: TextSource, size: int, per_draw: int, rng: np.random.Generator) -> Iterator[list[str]]:
    """Batches of texts without end; of those that are drawn at once, a batch has neighbours in length."""
    while True:
        texts = draw(size * per_draw, rng)
        if per_draw == 1:
            yield texts
        else:
            texts.sort(key=len)
            yield from (texts[size * place : size * (place + 1)] for place in rng.permutation(per_draw))


def completion_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of each text as a complete completion, with the end-of-text token."""
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [[*ids, int(cast(int, tokenizer.eos_token_id))] for ids in cast(list[list[int]], encoded)]


def _gpt2_config(config: SmallPriorConfig, tokenizer: PreTrainedTokenizerBase, draw: TextSource) -> GPT2Config:
    longest = config.longest or max(map(len, completion_ids(draw(64, np.random.default_rng(config.seed)), tokenizer)))
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=2 ** math.ceil(math.log2(longest + 2)),
        n_embd=config.width,
        n_layer=config.layers,
        n_head=config.heads,
        # No dropout: every batch is new, so there is no overfitting.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=config.width**-0.5,  # GPT-2's 0.02 is for wide models
        activation_function="gelu_pytorch_tanh",  # the fused gelu_new
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """The folder of everything that is cached: as given, `$ALDRIFT_CACHE`, or `~/.cache/aldrift_hf`."""
    return Path(cache_dir or os.environ.get("ALDRIFT_CACHE") or Path.home() / ".cache" / "aldrift_hf")


def cache_folder(cache_dir: str | Path | None, made_of: list[Any]) -> Path:
    """The folder of a cached prior.

    Args:
        cache_dir: the folder of all cached priors, as in [`small_prior`].
        made_of: everything that the prior depends on, as JSON values.
    """
    fingerprint = hashlib.sha256(json.dumps([*made_of, torch.__version__], sort_keys=True).encode()).hexdigest()
    return cache_root(cache_dir) / f"prior-{fingerprint[:16]}"


def store(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a prior to the cache. A killed run never leaves a part of it there: it is written elsewhere and renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    with quiet.late_bars():
        model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    try:
        os.replace(temporary, folder)
    except OSError:  # another run stored the same prior first
        shutil.rmtree(temporary)
