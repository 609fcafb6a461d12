"""A rung's samples as a data set of fixed length, and its batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..models.passes import join
from ..types import Samples

RESERVED = ("prompt", "completion", "input_ids", "attention_mask", "labels", "log_probs", "num_tokens")
"""Names that a loss cannot give to columns of its own: the tokens' in a batch, and those of its other arguments."""


class RungSamples(Dataset[dict[str, Any]]):
    """The samples of the rung that is being learned, as a map-style data set.

    Its length is the number of training rows of a rung, so that the `Trainer`, which asks once, sees every epoch alike;
    its contents are replaced when an epoch begins. The order is the samples' own, and part of a checkpoint.

    Args:
        length: training rows per rung, over all processes. They may be more than one pass over the samples, which then
            begins again. A rung that makes fewer updates makes one whole pass: on a part of it, chance decides what
            is learned.
        prompts: token ids of the run's prompts.
    """

    def __init__(self, length: int, prompts: Sequence[list[int]]) -> None:
        self.length, self.prompts = length, prompts
        self.samples: Samples | None = None
        self._tokens: list[list[int]] = []

    def fill(self, samples: Samples) -> None:
        """Take a rung's samples.

        Raises:
            ValueError: for a loss's column under a reserved name.
        """
        if taken := [name for name in samples.columns if name in RESERVED]:
            raise ValueError(f"the loss has columns called {taken}; these names are reserved: {', '.join(RESERVED)}")
        self.samples, self._tokens = samples, samples.completions.tokens()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.samples is None:
            raise RuntimeError("there are no samples before the first rung is drawn")
        sample = int(self.samples.order[index % len(self.samples.order)])
        tokens = {"prompt": self.prompts[int(self.samples.rows[sample])], "completion": self._tokens[sample]}
        return tokens | {name: column[sample] for name, column in self.samples.columns.items()}


@dataclass
class SampleCollator:
    """Samples to a batch: padded on the right, labels on the completion alone; the loss's columns as fp32 tensors."""

    pad_token_id: int

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        prompts, completions = ([sample[part] for sample in samples] for part in ("prompt", "completion"))
        batch = join(prompts, completions, self.pad_token_id)
        labels = batch.input_ids.masked_fill(~batch.completion_mask, -100)
        names = [name for name in samples[0] if name not in ("prompt", "completion")]
        columns = {name: torch.tensor([sample[name] for sample in samples]).float() for name in names}
        tokens = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}
        return tokens | columns
