"""Step 1 of ALDRIFT, *propose*: plain ancestral sampling from a model.

The correction in step 2 needs the probability with which a proposal was really drawn. `generate` changes that
probability in silence through anything that a checkpoint's `generation_config` carries (`top_k=50` even when it
carries nothing), so here it runs under a configuration in which nothing is left to change.

Tokens are drawn by inverse transform of uniform numbers that belong to the row: a draw depends on the model, its prompt
and its own numbers, and not on the batch, the process or the memory that it happened to be drawn in (up to the rounding
of logits). And a token's probability is known when it is drawn.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..types import Completions, Draws
from .head import LOGITS_BUDGET
from .numerics import check_logits
from .scoring import completion_length

THIN = 8
"""Rows of a batch below which it goes on with its finished rows."""


def neutral_generation_config(
    *, max_completion_length: int, eos_token_ids: Sequence[int], pad_token_id: int
) -> GenerationConfig:
    """The model's own distribution: no temperature, no truncation, no penalty, no forced token.

    `do_sample` is off because a token is chosen before `generate` comes to choose: see [`generate`].
    """
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_completion_length,
        eos_token_id=list(eos_token_ids),
        pad_token_id=pad_token_id,
        use_cache=True,
    )


def generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: GenerationConfig, numbers: Tensor
) -> Draws:
    """One completion of every prompt, by ancestral sampling. No global random state is read or changed.

    Whenever half of a batch's rows have ended, the batch goes on with the others alone.

    Args:
        model: in eval mode, without gradients, under the autocast in which it will be scored.
        prompts: `n` lists of token ids, each of at least one token; padded on the left for generation.
        config: from [`neutral_generation_config`].
        numbers: `[n, max_completion_length]` from [`uniforms`], one for each token.
    """
    width, pad_token_id = cast(int, config.max_new_tokens), cast(int, config.pad_token_id)
    eos_token_ids = torch.tensor(cast(list[int], config.eos_token_id), device=model.device)
    input_ids, attention_mask = (tensor.to(model.device) for tensor in _pad_left(prompts, pad_token_id))
    ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.long)
    log_probs = torch.zeros((len(prompts), width), dtype=torch.float64)
    left, done, cache = torch.arange(len(prompts)), 0, None
    while len(left) and done < width:
        draw = _InverseTransform(numbers[left, done:].to(model.device), eos_token_ids)
        rest = _with(config, max_new_tokens=width - done, return_dict_in_generate=True)
        with neutralised(model, rest):
            output = cast(Any, model).generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                generation_config=rest,
                logits_processor=LogitsProcessorList([draw]),
                stopping_criteria=StoppingCriteriaList([draw.half_ended]),
                synced_gpus=False,  # parameters are whole (sharding.py): no process waits for another's tokens
            )
        new = output.sequences[:, input_ids.shape[1] :]
        ids[left, done : done + new.shape[1]] = new.cpu()
        log_probs[left, done : done + new.shape[1]] = torch.stack(draw.log_probs, dim=1).cpu()
        done += new.shape[1]
        going = (~draw.ended).nonzero()[:, 0]
        left, input_ids = left[going.cpu()], output.sequences[going]
        attention_mask = torch.cat([attention_mask, torch.ones_like(new)], dim=1)[going]
        cache = _selected(output.past_key_values, going)
    # Behind a finished row `generate` pads; a row cut at the limit has no end-of-text token and counts in full.
    length = completion_length(ids, cast(list[int], config.eos_token_id))
    ended = torch.arange(width) >= length[:, None]
    return Draws(Completions(ids.masked_fill(ended, pad_token_id), length), log_probs.masked_fill(ended, 0.0).sum(-1))


class _InverseTransform(LogitsProcessor):
    """Draws each row's next token, and leaves `generate` that token alone to choose.

    Args:
        numbers: `[n, steps]`, uniform in [0, 1).
        eos_token_ids: tokens that end a row.
    """

    def __init__(self, numbers: Tensor, eos_token_ids: Tensor) -> None:
        self.numbers, self.eos_token_ids = numbers, eos_token_ids
        self.log_probs: list[Tensor] = []
        self.ended = torch.zeros(len(numbers), dtype=torch.bool, device=numbers.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        numbers = self.numbers[:, len(self.log_probs)]
        size = max(1, LOGITS_BUDGET // (2 * scores.shape[-1]))
        parts = [_draw(*part) for part in zip(torch.split(scores, size), torch.split(numbers, size), strict=True)]
        tokens, log_probs = (torch.cat(column) for column in zip(*parts, strict=True))
        self.log_probs.append(log_probs)
        self.ended |= torch.isin(tokens, self.eos_token_ids)
        return torch.full_like(scores, -math.inf).scatter_(1, tokens[:, None], 0.0)

    def half_ended(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """A stopping criterion: whether the batch had better go on with fewer rows."""
        n = len(self.ended)
        return (2 * self.ended.sum() >= n).expand(n) if n >= THIN else self.ended


def _draw(scores: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """`[n]` tokens of distributions `softmax(scores)`, and their log-probabilities (fp64)."""
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    # Summed in fp64: in fp32 the steps of rare tokens would vanish beside 1.
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, numbers[:, None] * total, right=True).clamp_(max=scores.shape[-1] - 1)
    return tokens[:, 0], (weights.gather(1, tokens).double() / total).log()[:, 0]


def _with(config: GenerationConfig, **changes: Any) -> GenerationConfig:
    changed = copy.deepcopy(config)
    changed.update(**changes)
    return changed


def _selected(cache: Any, rows: Tensor) -> Any:
    """A cache of these rows alone; `None`, for which `generate` computes it anew, where it cannot be cut.

    Models that mix attention with recurrence (Jamba, Qwen 3 Next, …) keep states in it that know no rows.
    """
    attention = (DynamicLayer, DynamicSlidingWindowLayer)
    if type(cache) is not DynamicCache or any(type(layer) not in attention for layer in cache.layers):
        return None
    cache.batch_select_indices(rows)
    return cache


def assert_neutral(model: PreTrainedModel, prompt: Sequence[int], config: GenerationConfig) -> None:
    """Draw two tokens and compare the logits with the scores that `generate` sampled from.

    Raises:
        RuntimeError: if anything stands between the two, for then the log-weights would be wrong.
        FloatingPointError: if the logits are no numbers.
    """
    input_ids, attention_mask = _pad_left([prompt], cast(int, config.pad_token_id))
    device, tokens = model.device, min(2, cast(int, config.max_new_tokens))
    seen = _with(config, max_new_tokens=tokens, return_dict_in_generate=True, output_scores=True, output_logits=True)
    with neutralised(model, seen):
        output = cast(Any, model).generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=seen,
            synced_gpus=False,
        )
    for scores, logits in zip(output.scores, output.logits, strict=True):
        check_logits(logits)
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


def _pad_left(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    attention_mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return input_ids, attention_mask
