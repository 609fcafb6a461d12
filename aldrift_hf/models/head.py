"""From hidden states to token log-probabilities, without ever holding the logits of a whole batch.

The logits of 16,384 tokens over a vocabulary of 128,256 take 8 GiB in fp32. They are never needed all at once: a
token's log-probability needs its own row only. So when a model's forward pass reaches its output embedding, the hidden
states are projected in chunks, and the model continues with a single position. This happens inside the forward pass
because sharded weights (FSDP, ZeRO-3) are whole there.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from . import sharding

logger = logging.getLogger(__name__)

LOGITS_BUDGET = 2**25
"""Most logits (tokens × vocabulary) that are computed at once: 128 MiB in fp32, in up to three copies."""

Finish = Callable[[Tensor], Tensor]
"""What a model does to the output embedding's logits, element by element."""

Statistic = Callable[[Tensor, Tensor], Tensor]
"""What is wanted of logits `[N, vocabulary]` and targets `[N]`: `[N, …]`, each row of its own logits."""

PROBED = 32
"""Most tokens that a model is tried on, to find out what it does to its logits: that may depend on the token before."""

_known: WeakKeyDictionary[nn.Module, Finish | None] = WeakKeyDictionary()


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """`[N]` log-probabilities, from logits `[N, vocabulary]`; in fp32, whatever the model computes in."""
    logits = logits.float()
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def projected_logprobs(
    model: PreTrainedModel,
    select: Callable[[Tensor], Tensor],
    targets: Tensor,
    statistic: Statistic = token_logprobs,
    **inputs: Any,
) -> Tensor:
    """Log-probabilities of chosen tokens, from one forward pass; or another statistic of their logits.

    Args:
        model: a causal language model.
        select: maps the hidden states that the output embedding receives, `[n, positions, hidden]`, to those that
            predict the targets, `[N, hidden]`.
        targets: `[N]`, token ids.
        statistic: what is wanted.
        inputs: arguments of the forward pass.

    Returns:
        `[N]`, fp32; or what `statistic` returns.
    """
    if model not in _known:
        _known[model] = _finish_of(model, targets)
    with projecting(model, select, targets, statistic) as projection:
        return projection.of(model(**inputs).logits)


class Projection:
    """Log-probabilities of chosen tokens, from a forward pass within the `with` block of [`projecting`]."""

    def __init__(self, select: Callable[[Tensor], Tensor], targets: Tensor, statistic: Statistic) -> None:
        self.select, self.targets, self.statistic = select, targets, statistic
        self.chunks: list[Tensor] = []

    def of(self, logits: Tensor) -> Tensor:
        """`[N]`, fp32, with gradients if there are any. `logits` are those that the forward pass returned."""
        if not self.chunks:
            return self.statistic(self.select(logits), self.targets.to(logits.device))
        # FSDP gathers its weights for the backward pass when that reaches what the forward pass has returned.
        return torch.cat(self.chunks) + logits.flatten()[:0].sum()


@contextlib.contextmanager
def projecting(
    model: PreTrainedModel,
    select: Callable[[Tensor], Tensor],
    targets: Tensor,
    statistic: Statistic = token_logprobs,
) -> Iterator[Projection]:
    """Within a `with` block a forward pass projects the selected hidden states alone, in chunks.

    That needs to know what the model does to its logits, which [`projected_logprobs`] finds out; until then, and where
    it is not known, the logits of the whole batch are computed.

    Args:
        model: a causal language model; it may be called by what wraps it, with or without gradients.
        select, targets, statistic: see [`projected_logprobs`].
    """
    projection, finish, thread = Projection(select, targets, statistic), _known.get(model), threading.get_ident()
    if finish is None:
        yield projection
        return

    def project(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if threading.get_ident() != thread:  # an objective in another thread runs the model too
            return args
        states = select(args[0])
        size = max(1, LOGITS_BUDGET // sharding.vocabulary_size(model))
        for chunk, wanted in zip(torch.split(states, size), torch.split(targets, size), strict=True):
            # `forward`, not a call: a call would run this hook again.
            projection.chunks.append(_of_chunk(head, finish, statistic, chunk, wanted.to(chunk.device)))
        return (args[0][0, -1].clone()[None, None],)  # of its own strides: see contiguous_input

    handle = model.get_output_embeddings().register_forward_pre_hook(project)
    try:
        yield projection
    finally:
        handle.remove()


def _of_chunk(head: nn.Module, finish: Finish, statistic: Statistic, states: Tensor, targets: Tensor) -> Tensor:
    """The statistic of a chunk; for a backward pass, without keeping the logits."""

    def measured(states: Tensor) -> Tensor:
        return statistic(finish(head.forward(states)), targets)

    if not (torch.is_grad_enabled() and states.requires_grad):
        return measured(states)
    if any(parameter.requires_grad for parameter in head.parameters()):
        return cast(Tensor, checkpoint(measured, states, use_reentrant=False))
    return cast(Tensor, cast(Any, _FrozenHead).apply(states, measured))


class _FrozenHead(torch.autograd.Function):
    """A function of hidden states in which each row of the result depends on its own row alone.

    The gradient of a row is then a number times a vector that is known in the forward pass, while the logits are there:
    nothing is computed again in the backward pass, and only the vectors are kept.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            leaf = states.detach().requires_grad_()
            values = function(leaf)
            (slopes,) = torch.autograd.grad(values.sum(), leaf)
        ctx.save_for_backward(slopes)
        return values.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (slopes,) = ctx.saved_tensors
        return (gradients[0][:, None] * slopes).to(slopes.dtype), None


@contextlib.contextmanager
def contiguous_input(model: PreTrainedModel) -> Iterator[None]:
    """Within a `with` block the output embedding gets hidden states that are contiguous in memory.

    A prefill hands it the last position of each row, a strided view. PyTorch multiplies such a batch row by row where
    the weights are frozen, and some of its kernels copy the weights for every row: gigabytes and minutes for 128 rows
    of a vocabulary of 49,152.
    """

    def make_contiguous(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].contiguous(), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(make_contiguous)
    try:
        yield
    finally:
        handle.remove()


def _finish_of(model: PreTrainedModel, targets: Tensor) -> Finish | None:
    """Which of [`_finishes`] this model applies, found by trying them on some tokens; `None` if none fits."""
    raw: list[Tensor] = []
    # A copy: the model may change its logits where they are.
    handle = model.get_output_embeddings().register_forward_hook(lambda head, args, output: raw.append(output.clone()))
    tokens = torch.unique(targets)[:PROBED, None]
    try:  # with a mask: of a token that pads, too, its own logits are wanted
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    finally:
        handle.remove()
    for finish in _finishes(model.config.get_text_config()):
        if torch.allclose(finish(raw[0]).float(), logits.float(), rtol=1e-4, atol=1e-4):
            return finish
    logger.warning(
        f"{type(model).__name__} changes its logits in an unknown way, so completions are scored from whole batches of "
        "logits. If memory runs out, lower per_device_generation_batch_size."
    )
    return None


def _finishes(config: PreTrainedConfig) -> Iterator[Finish]:
    """What models are known to do to their logits, as far as this config asks for it."""
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):  # Gemma, …, xLSTM
        yield from (_capped(cap) for cap in [getattr(config, name, None)] if cap)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, …, Falcon-H1
        yield from (_times(factor) for factor in [getattr(config, name, None)] if factor is not None)
    scaling = getattr(config, "logits_scaling", None)  # Granite divides, HyperCLOVA X multiplies
    if scaling is not None:
        yield _times(1 / scaling)
        yield _times(scaling)
    yield lambda logits: logits


def _capped(cap: float) -> Finish:
    return lambda logits: torch.tanh(logits / cap) * cap


def _times(factor: float) -> Finish:
    return lambda logits: logits * factor
