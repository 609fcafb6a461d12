"""One forward pass over prompts and completions: what goes in, and where the log-probabilities come out.

Rows lie apart, padded to the longest, or packed into one ([`aldrift_hf.models.shared_prompts.packing`]); everything
else is the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..types import pad_right

Tokens = Sequence[Sequence[int]]


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


def join(prompts: Tokens, completions: Tokens, pad_token_id: int) -> Padded:
    """Each row's prompt followed by its completion, padded on the right to the longest row.

    Right padding needs no position ids in a causal model, because it never moves the tokens before it.
    """
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    input_ids = pad_right(rows, pad_token_id)
    start = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    end = torch.tensor([len(row) for row in rows])[:, None]
    position = torch.arange(input_ids.shape[1])
    return Padded(input_ids, (position < end).long(), (position >= start) & (position < end))


@dataclass
class Pass:
    """A forward pass that predicts the `N` tokens of `n` completions.

    Attributes:
        inputs: the model's arguments.
        select: maps hidden states or logits, `[rows, positions, …]`, to those that predict the targets, `[N, …]`.
        targets: `[N]`, token ids.
        rows, places: `[N]`, the completion of each target, and its place there.
        size: n.
        copies: `[m]`, where equal completions are computed once: which of the n each of them is.
    """

    inputs: dict[str, Any]
    select: Callable[[Tensor], Tensor]
    targets: Tensor
    rows: Tensor
    places: Tensor
    size: int
    copies: Tensor | None = None

    def to(self, device: torch.device) -> Pass:
        """The pass with its tensors on a device."""
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.inputs.items()}
        targets, rows, places = (tensor.to(device) for tensor in (self.targets, self.rows, self.places))
        return replace(self, inputs=moved, targets=targets, rows=rows, places=places)

    def table(self, values: Tensor) -> Tensor:
        """Values of the targets by completion and place, 0 elsewhere: `[N, …]` to `[n or m, longest length, …]`."""
        shape = (self.size, int(self.places.max()) + 1, *values.shape[1:])
        where = (self.rows.to(values.device), self.places.to(values.device))
        table = values.new_zeros(shape).index_put(where, values)
        return table if self.copies is None else table[self.copies.to(values.device)]


def apart(padded: Padded, keeps_logits: bool = False) -> Pass:
    """Rows that lie apart.

    Args:
        padded: the rows.
        keeps_logits: whether the model can be told for which positions it should compute logits.
    """
    # Position t-1 predicts token t; the part that is prompt in every row is left out.
    first = int((padded.attention_mask.sum(-1) - padded.completion_mask.sum(-1)).min())
    keep = padded.input_ids.shape[1] - first + 1
    predicted = padded.completion_mask[:, first:]
    rows, _ = predicted.nonzero(as_tuple=True)
    return Pass(
        {
            "input_ids": padded.input_ids,
            "attention_mask": padded.attention_mask,
            "use_cache": False,
            **({"logits_to_keep": keep} if keeps_logits else {}),
        },
        lambda states: states[:, -keep:-1][predicted.to(states.device)],
        padded.input_ids[:, first:][predicted],
        rows,
        (predicted.cumsum(-1) - 1)[predicted],
        len(predicted),
    )
