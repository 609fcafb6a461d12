"""A rung's updates, where the settings leave them open: how many, and the learning rate's course over them.

Every rung has a new target, and its model draws the next proposals. So each rung is a cycle of its own: the learning
rate begins high and falls to 0 along half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5), which leaves
the model at the mean of what the last updates say, without their noise. The run's last rung, whose model is the result,
is learned longer: no draw can be better spent any more.

How often a draw is worth learning from depends on how much of the space the draws can show. Draws of short texts come
near to covering it, and many passes over them find what they have in common. A text of 40 nats, one in e^40, has little
in common with any other draw: after a few passes, what is learned from it is itself.
"""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_utils import SchedulerType

from ..types import Proposals
from .config import ALDRIFTConfig
from .state import RunState

ROWS_PER_DRAW = 30
"""Training rows per rung for each of its proposals: earlier rungs' draws are learned from again, with new weights."""
FEWEST_UPDATES, MOST_UPDATES = 30, 240
"""Optimizer updates per rung, at least and at most."""
SHORT_TEXT = 12.0
"""Nats, the mean of `-log q`, up to which a text gets [`ROWS_PER_DRAW`]."""
FEWER = 2
"""Texts of `h` nats, where that is more, get `(SHORT_TEXT / h)^FEWER` times as many, but a row at least."""
LAST_RUNG = 2
"""The run's last rung has so many times more."""


def updates_per_rung(draws: int, rows_per_update: int) -> int:
    """Optimizer updates of a rung of short texts that is not the run's last.

    Args:
        draws: its proposals, over all prompts.
        rows_per_update: training rows per update, over all processes.
    """
    return min(MOST_UPDATES, max(FEWEST_UPDATES, ROWS_PER_DRAW * draws // rows_per_update))


def updates_for(proposals: Proposals, most: int, rows_per_update: int) -> int:
    """Optimizer updates of a rung that is not the run's last, by the entropy of its texts: one pass at least.

    Args:
        proposals: the rung's.
        most: updates for short texts.
        rows_per_update: training rows per update, over all processes.
    """
    nats = max(SHORT_TEXT, -float(proposals.log_model.mean()))
    one_pass = math.ceil(len(proposals) / rows_per_update)
    share: float = (SHORT_TEXT / nats) ** FEWER
    return min(most, max(one_pass, round(most * share)))


def has_cycles(args: ALDRIFTConfig) -> bool:
    """Whether the schedule is a cycle per rung: cosines with restarts whose number is not set."""
    return args.lr_scheduler_type == SchedulerType.COSINE_WITH_RESTARTS and not args.lr_scheduler_kwargs


def cycles(optimizer: Optimizer, state: RunState, warmup_steps: int) -> LambdaLR:
    """The schedule of a cycle per rung, after a linear rise over the run's first `warmup_steps` updates.

    Args:
        optimizer: whose learning rates are scaled.
        state: the run's, which knows the rung's update and how many it will have.
        warmup_steps: 0 for none.
    """

    def factor(step: int) -> float:
        # Called before the first update, and after each one, before it is counted.
        update = 0 if step == 0 else state.updates + 1
        warm = min(1.0, step / warmup_steps) if warmup_steps else 1.0
        return warm * (cosine(update / state.planned) if update < state.planned else 1.0)

    return LambdaLR(optimizer, factor)


def cosine(share: float) -> float:
    """From 1 to 0, as `share` of the cycle goes from 0 to 1."""
    return (1 + math.cos(math.pi * share)) / 2
