"""Step 1 of ALDRIFT, *propose*: plain ancestral sampling from a model.

The correction in step 2 needs the probability with which a proposal was really drawn. `generate` silently changes that
probability by whatever a checkpoint's `generation_config` contains (by `top_k=50` even if it contains nothing), so here
it runs under a configuration that changes nothing.

Tokens are drawn by inverse transform sampling from uniform numbers that belong to the row. A draw depends on the model,
its prompt and its own numbers, and not on the batch, the process or the memory available (up to the rounding of
logits). And a token's probability is known when it is drawn.
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
from . import quiet
from .head import LOGITS_BUDGET, contiguous_input
from .loading import context_length
from .numerics import check_logits
from .scoring import completion_length
from .shared_prompts.attention import sharing
from .shared_prompts.cache import CACHE, SharedPrompts, prefill

MIN_ROWS_TO_SPLIT = 8
"""A smaller batch keeps its finished rows until all of them have ended."""


def neutral_generation_config(
    *, max_completion_length: int, eos_token_ids: Sequence[int], pad_token_id: int
) -> GenerationConfig:
    """A configuration that leaves the model's distribution alone: no temperature, truncation, penalty or forced token.

    `do_sample` is off because [`generate`] draws each token before `generate` of transformers chooses one.
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
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    numbers: Tensor,
    limits: Sequence[int] | None = None,
) -> Draws:
    """One completion for every prompt, by ancestral sampling. No global random state is read or changed.

    Whenever half of the rows of a batch have ended, generation continues with the others only. A prompt of several rows
    is computed, and its keys and values are kept, once for all of them where the model can do so.

    Args:
        model: in eval mode, without gradients, under the autocast in which it will be scored.
        prompts: `n` lists of token ids, each of at least one token; padded on the left for generation.
        config: from [`neutral_generation_config`].
        numbers: `[n, max_completion_length]` from [`aldrift_hf.streams.uniforms`], one for each token.
        limits: most tokens of each row, where they are fewer.
    """
    most, pad_token_id = cast(int, config.max_new_tokens), cast(int, config.pad_token_id)
    limit = torch.full((len(prompts),), most) if limits is None else torch.tensor(limits).clamp(max=most)
    width = int(limit.max())
    eos_token_ids = torch.tensor(cast(list[int], config.eos_token_id), device=model.device)
    input_ids, attention_mask = (tensor.to(model.device) for tensor in _pad_left(prompts, pad_token_id))
    ids = torch.full((len(prompts), most), pad_token_id, dtype=torch.long)
    log_probs = torch.zeros((len(prompts), most), dtype=torch.float64)
    left, done, room = torch.arange(len(prompts)), 0, context_length(model.config) or math.inf
    cache: Any = prefill(model, prompts, input_ids, attention_mask, width)
    while len(left) and done < width:
        rows = left.to(model.device)
        draw = _InverseTransform(
            numbers[left, done:].to(model.device), eos_token_ids, limit.to(model.device)[rows] - done
        )
        steps = width - done
        if input_ids.shape[1] + steps > room:  # a row that is longer than others has come to its own limit before
            steps = int(limit[left].min()) - done
        rest = _with(config, max_new_tokens=steps, return_dict_in_generate=True)
        shared = sharing(model, cache) if isinstance(cache, SharedPrompts) else contextlib.nullcontext()
        with neutralised(model, rest), contiguous_input(model), shared:
            output = cast(Any, model).generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=rest,
                logits_processor=LogitsProcessorList([draw]),
                stopping_criteria=StoppingCriteriaList([draw.half_ended]),
                synced_gpus=False,  # parameters are whole (sharding.py), so no process waits for another's tokens
                **{CACHE: cache},
            )
        new = output.sequences[:, input_ids.shape[1] :]
        ids[left, done : done + new.shape[1]] = new.cpu()
        log_probs[left, done : done + new.shape[1]] = torch.stack(draw.log_probs, dim=1).cpu()
        done += new.shape[1]
        going = (~draw.ended).nonzero()[:, 0]
        left, input_ids = left[going.cpu()], output.sequences[going]
        attention_mask = torch.cat([attention_mask, torch.ones_like(new)], dim=1)[going]
        cache = _selected(getattr(output, CACHE), going)
    # After a finished row `generate` pads; a row that is cut at the limit has no end-of-text token and counts in full.
    length = torch.minimum(completion_length(ids, cast(list[int], config.eos_token_id)), limit)
    ended = torch.arange(most) >= length[:, None]
    return Draws(Completions(ids.masked_fill(ended, pad_token_id), length), log_probs.masked_fill(ended, 0.0))


class _InverseTransform(LogitsProcessor):
    """Draws each row's next token, and leaves `generate` only that token to choose.

    Args:
        numbers: `[n, steps]`, uniform in [0, 1).
        eos_token_ids: tokens that end a row.
        limits: `[n]`, most tokens of each row.
    """

    def __init__(self, numbers: Tensor, eos_token_ids: Tensor, limits: Tensor) -> None:
        self.numbers, self.eos_token_ids, self.limits = numbers, eos_token_ids, limits
        self.log_probs: list[Tensor] = []
        self.ended = torch.zeros(len(numbers), dtype=torch.bool, device=numbers.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        numbers = self.numbers[:, len(self.log_probs)]
        size = max(1, LOGITS_BUDGET // (2 * scores.shape[-1]))
        parts = [_draw(*part) for part in zip(torch.split(scores, size), torch.split(numbers, size), strict=True)]
        tokens, log_probs = (torch.cat(column) for column in zip(*parts, strict=True))
        self.log_probs.append(log_probs)
        self.ended |= torch.isin(tokens, self.eos_token_ids) | (self.limits <= len(self.log_probs))
        return torch.full_like(scores, -math.inf).scatter_(1, tokens[:, None], 0.0)

    def half_ended(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """A stopping criterion: whether generation should continue with fewer rows."""
        n = len(self.ended)
        return (2 * self.ended.sum() >= n).expand(n) if n >= MIN_ROWS_TO_SPLIT else self.ended


def _draw(scores: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """`[n]` tokens of distributions `softmax(scores)`, and their log-probabilities (fp64)."""
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    # Summed in fp64: in fp32 the probabilities of rare tokens would vanish beside 1.
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, numbers[:, None] * total, right=True).clamp_(max=scores.shape[-1] - 1)
    return tokens[:, 0], (weights.gather(1, tokens).double() / total).log()[:, 0]


def _with(config: GenerationConfig, **changes: Any) -> GenerationConfig:
    changed = copy.deepcopy(config)
    changed.update(**changes)
    return changed


def _selected(cache: Any, rows: Tensor) -> Any:
    """The cache of these rows only; `None`, for which `generate` computes it again, if rows cannot be selected.

    Models that mix attention with recurrence (Jamba, Qwen 3 Next, …) keep states in it that cannot be selected by row.
    """
    if isinstance(cache, SharedPrompts):
        cache.keep(rows)
        return cache
    attention = (DynamicLayer, DynamicSlidingWindowLayer)
    if type(cache) is not DynamicCache or any(type(layer) not in attention for layer in cache.layers):
        return None
    cache.batch_select_indices(rows)
    return cache


def assert_neutral(model: PreTrainedModel, prompt: Sequence[int], config: GenerationConfig) -> None:
    """Draw two tokens and compare the model's logits with the scores that `generate` sampled from.

    Raises:
        RuntimeError: if they differ, because then the log-weights would be wrong.
        FloatingPointError: if the logits are NaN or infinite.
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
                "generate() of this model changes the logits before it samples, so a proposal does not have the "
                "model's own probability and its weight would be wrong. Remove the logits processor that the model's "
                "generation code adds."
            )


@contextlib.contextmanager
def neutralised(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Within a `with` block `config` replaces the model's own, from which `generate` would fill every open field."""
    own = model.generation_config
    model.generation_config = config
    try:
        with quiet.masks_of_ones():
            yield
    finally:
        model.generation_config = own


def _pad_left(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    attention_mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return input_ids, attention_mask
