"""Completions as padded token tensors, and their exact log-probabilities under a model.

The event space is the same everywhere: a completion is a sequence of tokens that ends with its first end-of-text
token, or that is cut after `max_completion_length` tokens without one. A cut completion is an outcome like any other,
and its probability is the product of its tokens' probabilities. With this rule the probabilities of all completions of
a prompt sum to 1, under the prior and under the policy. Weights belong to token sequences: decoded text is never
tokenised again.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..types import Completions
from .head import Statistic, projected_logprobs, token_logprobs
from .kernels import attention_of_any_shape
from .passes import Padded, Pass, apart, join
from .shared_prompts import packing
from .shared_prompts.attention import sharing
from .shared_prompts.support import can_share_prompts

Row = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of its completion."""


def completion_length(ids: Tensor, eos_token_ids: Sequence[int]) -> Tensor:
    """Number of tokens up to and including the first end-of-text token, or all tokens. `[n, width]` to `[n]`.

    Padding ids are not considered: most tokenizers pad with their end-of-text token.
    """
    is_eos = torch.isin(ids, torch.tensor(list(eos_token_ids), device=ids.device))
    return torch.where(is_eos.any(-1), is_eos.int().argmax(-1) + 1, ids.shape[-1])


def sequence_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions: Completions,
    *,
    pad_token_id: int,
    batch_size: int,
    batch_tokens: int = 2**14,
) -> Tensor:
    """`log p(completion | prompt)` of every row, in nats. The prior and the policy are scored by this function alone.

    Log-softmax is computed in fp32, whatever the model computes in (in bf16 it costs 0.1 to 0.2 nats per sequence), and
    the sum over tokens in fp64. Equal rows are scored once, and a prompt is computed once for all of its completions
    where the model can do so. Logits are computed for completion tokens only, at most
    [`aldrift_hf.models.head.LOGITS_BUDGET`] at a time. Call it in eval mode, without gradients, and under the autocast
    in which the policy generates and trains.

    Args:
        model: a causal language model.
        prompts: `n` lists of token ids, each of at least one token.
        completions: `n` completions.
        pad_token_id: fills the rows; its value has no effect.
        batch_size: most rows per forward pass.
        batch_tokens: most tokens per forward pass (rows × width, or those of one packed row), unless a single row has
            more: this bounds the memory of activations.

    Returns:
        `[n]`, fp64, on the CPU.
    """
    return sequence_sums(
        model,
        prompts,
        completions,
        token_logprobs,
        pad_token_id=pad_token_id,
        batch_size=batch_size,
        batch_tokens=batch_tokens,
    )


def sequence_sums(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions: Completions,
    statistic: Statistic,
    *,
    pad_token_id: int,
    batch_size: int,
    batch_tokens: int,
) -> Tensor:
    """Sums over each completion's tokens of any statistic of their logits; see [`sequence_logprobs`].

    Args:
        statistic: in fp32, of logits `[N, vocabulary]` and tokens `[N]`.

    Returns:
        `[n, …]`, as many values per row as `statistic` has per token, fp64, on the CPU.
    """
    return _scored(
        model, prompts, completions, statistic, pad_token_id, batch_size, batch_tokens, lambda table: table.sum(1)
    )


def token_table(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions: Completions,
    *,
    pad_token_id: int,
    batch_size: int,
    batch_tokens: int,
) -> Tensor:
    """What [`sequence_logprobs`] sums up: the log-probability of every token, nats.

    Returns:
        `[n, width]`, as wide as the completions' ids; 0 after a completion's end; fp64, on the CPU.
    """
    width = completions.ids.shape[1]

    def padded(table: Tensor) -> Tensor:
        return nn.functional.pad(table, (0, width - table.shape[1]))

    return _scored(model, prompts, completions, token_logprobs, pad_token_id, batch_size, batch_tokens, padded)


def _scored(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions: Completions,
    statistic: Statistic,
    pad_token_id: int,
    batch_size: int,
    batch_tokens: int,
    reduced: Callable[[Tensor], Tensor],
) -> Tensor:
    """`[n, …]`: `reduced`, of each forward pass's table of tokens, `[rows, width, …]`; see [`sequence_sums`]."""
    keys: dict[Row, int] = {}
    where = [
        keys.setdefault((tuple(prompt), tuple(completion)), len(keys))
        for prompt, completion in zip(prompts, completions.tokens(), strict=True)
    ]
    # The longest rows first: there is little padding, and if rows do not fit into memory, it shows at once.
    rows = sorted(keys, key=lambda row: -_width(row))
    order: list[int] = []
    found: list[Tensor] = []
    if packing.pays(*_columns(rows)) and can_share_prompts(model, _width(rows[0])):
        with sharing(model):
            for batch in _batches(_by_prompt(rows), batch_size, batch_tokens, shared=True):
                order += [keys[row] for row in batch]
                found.append(reduced(_table(model, packing.pack(*_columns(batch)), statistic)).cpu())
    else:
        for batch in _batches(rows, batch_size, batch_tokens, shared=False):
            order += [keys[row] for row in batch]
            padded = join(*_columns(batch), pad_token_id)
            found.append(reduced(_table(model, apart(padded, _keeps_logits(model)), statistic)).cpu())
    place = torch.tensor(order).argsort()
    return torch.cat(found)[place[where]]


def _batches(rows: list[Row], batch_size: int, batch_tokens: int, shared: bool) -> Iterator[list[Row]]:
    """Consecutive rows, as many as fit into a forward pass: padded to the first, or after one copy of each prompt."""
    batch: list[Row] = []
    used = 0
    for row in rows:
        new_prompt = not batch or row[0] != batch[-1][0]
        tokens = (len(row[1]) + new_prompt * len(row[0])) if shared else _width(batch[0] if batch else row)
        if batch and (len(batch) == batch_size or used + tokens > batch_tokens):
            yield batch
            batch, used, tokens = [], 0, _width(row)
        batch.append(row)
        used += tokens
    if batch:
        yield batch


def _by_prompt(rows: list[Row]) -> list[Row]:
    """Rows of one prompt beside each other, prompts in the order in which they first come."""
    first: dict[tuple[int, ...], int] = {}
    return sorted(rows, key=lambda row: first.setdefault(row[0], len(first)))


def _columns(rows: Sequence[Row]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Rows as their prompts and their completions."""
    return [prompt for prompt, _ in rows], [completion for _, completion in rows]


def _table(model: PreTrainedModel, forward: Pass, statistic: Statistic) -> Tensor:
    """`[n, width, …]`, from one forward pass."""
    forward = forward.to(model.device)
    found = projected_logprobs(model, forward.select, forward.targets, statistic, **forward.inputs)
    return forward.table(found.double())


def learning_pass(model: PreTrainedModel, padded: Padded, drops_out: bool = False) -> Pass:
    """A training step's forward pass, on the rows' device. Equal rows are computed once: the gradient is the same.

    Args:
        model: the language model inside the one that is trained.
        padded: the rows of a micro-batch.
        drops_out: whether the model drops something at random, so that equal rows come out differently.
    """
    start = padded.completion_mask.int().argmax(-1).tolist()
    end = padded.attention_mask.sum(-1).tolist()
    rows = [(tuple(ids[:a]), tuple(ids[a:b])) for ids, a, b in zip(padded.input_ids.tolist(), start, end, strict=True)]
    keys: dict[Row, int] = {}
    copies = torch.tensor([keys.setdefault(row, len(keys)) for row in rows])
    if drops_out or len(keys) == len(rows):
        return _learning_pass(model, padded, rows)
    first = [rows.index(row) for row in keys]
    return replace(_learning_pass(model, Padded(*(column[first] for column in padded)), [*keys]), copies=copies)


def _learning_pass(model: PreTrainedModel, padded: Padded, rows: list[Row]) -> Pass:
    # The model is not asked here what it can do: its weights may be spread over the processes.
    if packing.pays(*_columns(rows)) and can_share_prompts(model, padded.input_ids.shape[1], find_out=False):
        return packing.pack(*_columns(rows)).to(padded.input_ids.device)
    return apart(padded)


@contextlib.contextmanager
def inference(*models: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every submodule's own mode is restored afterwards, also after an exception.

    `Trainer.training_step` leaves the model in train mode, in which dropout (also LoRA's, and Llama's attention
    dropout, which is not an `nn.Dropout`) would make scores random.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad(), attention_of_any_shape():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _width(row: Row) -> int:
    return len(row[0]) + len(row[1])


def _keeps_logits(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters
