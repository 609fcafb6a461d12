"""Draws that a sampler keeps from rung to rung, prompt by prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...types import Completions, Proposals, join_prompts

_COLUMNS = ("ids", "length", "objective", "log_prior")


class KeptDraws:
    """Draws of any number for each prompt. `log q` is not kept: the model that has it goes on learning.

    Args:
        name: what they are called in a checkpoint.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._of: dict[int, Proposals] = {}  # by prompt, each [1, m]

    def put(self, draws: Proposals) -> None:
        """Keep these draws in place of what their prompts had."""
        for place, prompt in enumerate(draws.prompts.tolist()):
            self._of[prompt] = of_prompt(draws, place)

    def of(self, prompt: int) -> Proposals | None:
        """`[1, m]`, the draws kept for a prompt; `None` if there are none yet."""
        return self._of.get(prompt)

    def first(self, prompts: Sequence[int], count: int) -> Proposals | None:
        """`[P, count]`, the first draws of these prompts; `None` if one of them has fewer."""
        kept = [self._of.get(prompt) for prompt in prompts]
        known = [draws for draws in kept if draws is not None and draws.objective.shape[1] >= count]
        if len(known) < len(prompts):
            return None
        return join_prompts([draws.select(torch.arange(count)[None]) for draws in known])

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        named: dict[str, Tensor] = {}
        for prompt, draws in self._of.items():
            columns = (*draws.completions, draws.objective, draws.log_prior)
            named |= {f"{self.name}.{prompt}.{name}": column for name, column in zip(_COLUMNS, columns, strict=True)}
        return named

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what [`state_dict`] gave."""
        self._of = {}
        for prompt in sorted({int(key.split(".")[1]) for key in state}):
            ids, length, objective, log_prior = (state[f"{self.name}.{prompt}.{name}"] for name in _COLUMNS)
            rows, unknown = torch.full_like(length, prompt), torch.full_like(objective, math.nan)
            self._of[prompt] = Proposals(rows, Completions(ids, length), objective, log_prior, unknown)


def of_prompt(draws: Proposals, place: int) -> Proposals:
    """`[1, m]`, the draws for the prompt at a place among those that were drawn for; without `log q`, which is NaN."""
    count = draws.objective.shape[1]
    rows = torch.arange(count * place, count * (place + 1))
    objective, log_prior = draws.objective[place : place + 1], draws.log_prior[place : place + 1]
    unknown = torch.full_like(objective, math.nan)
    return Proposals(draws.rows[rows], draws.completions.select(rows), objective, log_prior, unknown)
