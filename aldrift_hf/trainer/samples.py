"""One rung of the ladder: its proposals, its samples as a data set to learn from, and its record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..models.scoring import join
from ..types import Completions


class RungSamples(Dataset[dict[str, list[int]]]):
    """The samples of the rung that is being learnt, as a map-style data set of fixed length.

    Its length is that of a rung's updates, so that the `Trainer`, which asks once, sees every epoch alike; its contents
    are replaced at the beginning of every epoch. The order is the data set's own and part of a checkpoint.
    """

    def __init__(self, length: int, prompts: list[list[int]]) -> None:
        self.length = length
        self.prompts = prompts
        self.load(
            {
                "rows": torch.empty(0, dtype=torch.long),
                "ids": torch.empty((0, 1), dtype=torch.long),
                "length": torch.empty(0, dtype=torch.long),
                "order": torch.empty(0, dtype=torch.long),
            }
        )

    def fill(
        self,
        rows: Tensor,
        completions: Completions,
        generator: torch.Generator,
        densities: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take new samples and lay out one rung of them: whole random passes, the last one cut.

        Args:
            rows: `[n]`, the prompt of each sample.
            completions: the `n` samples.
            generator: of the order.
            densities: columns of `[n]` floats that the loss needs beside the samples, by name.
        """
        passes = math.ceil(self.length / len(rows))
        order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(passes)])[: self.length]
        columns = {"rows": rows, "ids": completions.ids, "length": completions.length, "order": order}
        self.load(columns | dict(densities or {}))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        columns = {"rows": self.rows, "ids": self.completions.ids, "length": self.completions.length}
        return columns | {"order": self.order} | self.densities

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of [`tensors`]."""
        columns = dict(tensors)
        self.rows, self.order = columns.pop("rows"), columns.pop("order")
        self.completions = Completions(columns.pop("ids"), columns.pop("length"))
        self.densities = columns
        self._tokens = self.completions.tokens()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = int(self.order[index])
        tokens = {"prompt": self.prompts[int(self.rows[sample])], "completion": self._tokens[sample]}
        return tokens | {name: column[sample] for name, column in self.densities.items()}


@dataclass
class SampleCollator:
    """Samples to a batch: padded on the right, labels on the completion alone; other columns as fp32 tensors."""

    pad_token_id: int

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        prompts, completions = ([sample[part] for sample in samples] for part in ("prompt", "completion"))
        batch = join(prompts, completions, self.pad_token_id)
        labels = batch.input_ids.masked_fill(~batch.completion_mask, -100)
        others = [name for name in samples[0] if name not in ("prompt", "completion")]
        densities = {name: torch.tensor([sample[name] for sample in samples]).float() for name in others}
        tokens = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}
        return tokens | densities
