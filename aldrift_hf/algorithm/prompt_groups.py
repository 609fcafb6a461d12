"""Which prompts a rung draws for, where it does not draw for all of them (`prompts_per_rung`).

The prompts are dealt out to groups once, at random, and a rung takes a group. One epoch over the prompts takes each
group once, in a new random order. Groups stay as they are, so that all prompts of one have been drawn for on the same
rungs: their draws have the same mixture of models in the archive.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import streams


def num_groups(num_prompts: int, per_rung: int | None) -> int:
    """Rungs per epoch over the prompts.

    Args:
        num_prompts: prompts of the run.
        per_rung: most prompts per rung; `None` for all.
    """
    return 1 if per_rung is None else math.ceil(num_prompts / per_rung)


def group_of(rung: int, num_prompts: int, per_rung: int | None, seed: int) -> Tensor:
    """`[S]`, the prompts of a rung in ascending order: a function of the arguments alone.

    Groups differ in size by at most 1. See [`num_groups`] for the other arguments.

    Args:
        rung: the rung's index.
        seed: the run's.
    """
    groups = num_groups(num_prompts, per_rung)
    if groups == 1:
        return torch.arange(num_prompts)
    epoch, place = divmod(rung, groups)
    deal = torch.randperm(num_prompts, generator=streams.generator(seed, streams.DEAL))
    order = torch.randperm(groups, generator=streams.generator(seed, streams.DEAL, epoch))
    return torch.tensor_split(deal, groups)[int(order[place])].sort().values
