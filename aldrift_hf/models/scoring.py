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
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..types import Completions, pad_right
from .head import projected_logprobs

Row = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of its completion."""


class Padded(NamedTuple):
    """Prompts and completions joined to rows, padded on the right.

    Attributes:
        input_ids: `[n, width]`.
        attention_mask: `[n, width]`, 1 on prompt and completion.
        completion_mask: `[n, width]`, true on the completion's tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor


def completion_length(ids: Tensor, eos_token_ids: Sequence[int]) -> Tensor:
    """Number of tokens up to and including the first end-of-text token, or all tokens. `[n, width]` to `[n]`.

    Padding ids are not considered: most tokenizers pad with their end-of-text token.
    """
    is_eos = torch.isin(ids, torch.tensor(list(eos_token_ids), device=ids.device))
    return torch.where(is_eos.any(-1), is_eos.int().argmax(-1) + 1, ids.shape[-1])


def join(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_token_id: int) -> Padded:
    """Each row's prompt followed by its completion, padded on the right to the longest row.

    Right padding needs no position ids in a causal model, because it never moves the tokens before it.
    """
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    input_ids = pad_right(rows, pad_token_id)
    start = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    end = torch.tensor([len(row) for row in rows])[:, None]
    position = torch.arange(input_ids.shape[1])
    return Padded(input_ids, (position < end).long(), (position >= start) & (position < end))


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
    the sum over tokens in fp64. Equal rows are scored once. Logits are computed for completion tokens only, at most
    [`aldrift_hf.models.head.LOGITS_BUDGET`] at a time. Call it in eval mode, without gradients, and under the autocast
    in which the policy generates and trains.

    Args:
        model: a causal language model.
        prompts: `n` lists of token ids, each of at least one token.
        completions: `n` completions.
        pad_token_id: fills the rows; its value has no effect.
        batch_size: most rows per forward pass.
        batch_tokens: most tokens per forward pass (rows × width), unless a single row has more: this bounds the memory
            of activations.

    Returns:
        `[n]`, fp64, on the CPU.
    """
    keys: dict[Row, int] = {}
    where = [
        keys.setdefault((tuple(prompt), tuple(completion)), len(keys))
        for prompt, completion in zip(prompts, completions.tokens(), strict=True)
    ]
    scores = torch.empty(len(keys), dtype=torch.float64)
    # The longest rows first: there is little padding, and if rows do not fit into memory, it shows at once.
    rows_left = sorted(keys.items(), key=lambda item: -_width(item[0]))
    while rows_left:
        size = max(1, min(batch_size, batch_tokens // _width(rows_left[0][0])))
        batch, rows_left = rows_left[:size], rows_left[size:]
        scores[[slot for _, slot in batch]] = _score([row for row, _ in batch], model, pad_token_id)
    return scores[where]


def _score(batch: list[Row], model: PreTrainedModel, pad_token_id: int) -> Tensor:
    """`[n]` log-probabilities of rows of similar length, from one forward pass."""
    padded = join([prompt for prompt, _ in batch], [completion for _, completion in batch], pad_token_id)
    input_ids, attention_mask, completion_mask = (tensor.to(model.device) for tensor in padded)
    # Position t-1 predicts token t; the part that is prompt in every row is left out.
    first = min(len(prompt) for prompt, _ in batch)
    keep = input_ids.shape[1] - first + 1
    predicted = completion_mask[:, first:]
    token_logprobs = projected_logprobs(
        model,
        lambda hidden: hidden[:, -keep:-1][predicted.to(hidden.device)],
        input_ids[:, first:][predicted],
        input_ids=input_ids,
        attention_mask=attention_mask,
        use_cache=False,
        **({"logits_to_keep": keep} if _keeps_logits(model) else {}),
    )
    scores = torch.zeros(predicted.shape, dtype=torch.float64)
    scores[predicted.cpu()] = token_logprobs.double().cpu()
    return scores.sum(-1)


def label_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the labels under a training batch's logits, in fp32; 0 where there is no label.

    Args:
        logits: `[n, width, vocabulary]`.
        labels: `[n, width]`, token ids, -100 where nothing is predicted.

    Returns:
        `[n, width - 1]`, nats, with gradients.
    """
    shifted = logits[:, :-1].float()
    nll = nn.functional.cross_entropy(
        shifted.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    return -nll.view(labels[:, 1:].shape)


def without_dropout(model: nn.Module) -> None:
    """Turn every dropout of a model off for good: `log q` in training is then the number that was scored."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):  # Llama's, which is not a module
            setattr(module, "attention_dropout", 0.0)  # noqa: B010


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
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _width(row: Row) -> int:
    return len(row[0]) + len(row[1])


def _keeps_logits(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters
