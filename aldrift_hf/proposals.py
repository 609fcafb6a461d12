"""Step 1 of ALDRIFT, *propose*: plain ancestral sampling from a model.

The correction in step 2 needs the probability with which a proposal was really drawn. `generate` changes that
probability in silence through anything that a checkpoint's `generation_config` carries (`top_k=50` even when it
carries nothing), so here it runs under a configuration in which nothing is left to change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from .sequences import Completions, completion_length


def neutral_generation_config(
    *, max_completion_length: int, eos_token_ids: Sequence[int], pad_token_id: int
) -> GenerationConfig:
    """Sampling from the model's own distribution: temperature 1, no truncation, no penalty, no forced token."""
    return GenerationConfig(
        do_sample=True,
        num_beams=1,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=max_completion_length,
        eos_token_id=list(eos_token_ids),
        pad_token_id=pad_token_id,
        use_cache=True,
    )


def generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: GenerationConfig, seed: int
) -> Completions:
    """One completion of every prompt, by ancestral sampling. The global random state is left as it was.

    Args:
        model: in eval mode, without gradients, under the autocast in which it will be scored.
        prompts: `n` lists of token ids, each of at least one token; padded on the left for generation.
        config: from [`neutral_generation_config`].
        seed: of this batch alone. The draws depend on it, the prompts and the model, and on nothing else.

    Returns:
        `n` [`Completions`], on the CPU.
    """
    input_ids, attention_mask = _pad_left(prompts, cast(int, config.pad_token_id))
    device = model.device
    with neutralised(model, config), _seeded(seed, device):
        output = cast(Any, model).generate(
            input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), generation_config=config
        )
    new_tokens = output[:, input_ids.shape[1] :].cpu()
    width = cast(int, config.max_new_tokens)
    ids = torch.full((len(prompts), width), cast(int, config.pad_token_id), dtype=torch.long)
    ids[:, : new_tokens.shape[1]] = new_tokens
    # Behind a finished row `generate` pads; a row cut at the limit has no end-of-text token and counts in full.
    return Completions(ids, completion_length(ids, cast(list[int], config.eos_token_id)))


def assert_neutral(model: PreTrainedModel, prompt: Sequence[int], config: GenerationConfig) -> None:
    """Draw two tokens and compare the logits with the scores that `generate` sampled from.

    Raises:
        RuntimeError: if anything stands between the two, for then the log-weights would be wrong.
    """
    input_ids, attention_mask = _pad_left([prompt], cast(int, config.pad_token_id))
    device = model.device
    with neutralised(model, config), _seeded(0, device):
        output = cast(Any, model).generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=config,
            max_new_tokens=min(2, cast(int, config.max_new_tokens)),
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
    for scores, logits in zip(output.scores, output.logits, strict=True):
        if not torch.equal(scores.float(), logits.float()):
            raise RuntimeError(
                "generate() of this model changes the logits before it samples, so the probability of a proposal is "
                "not the model's own and the Metropolis-Hastings correction would be wrong. Remove the logits "
                "processor that its generation code adds."
            )


@contextlib.contextmanager
def neutralised(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """The model's own generation config set aside: `generate` fills every field that a config leaves open from it."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def stream_seed(*key: int) -> int:
    """A seed for one stream of random numbers, by its address (run seed, purpose, rung, batch, …).

    Counters instead of a running state: a rung's draws are the same on one process or eight, before a crash or after.
    """
    # With its length, for a SeedSequence takes (1,) and (1, 0) for the same.
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _pad_left(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    attention_mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return input_ids, attention_mask


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=_fork_type(device)):
        torch.manual_seed(seed)
        yield


def _fork_type(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type
