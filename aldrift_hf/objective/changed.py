"""Whether cost functions still give the costs that a run has learned from, where their identity is another."""

from __future__ import annotations

import logging
import math

from ..types import Prompts
from .objective import Objective
from .store import Costs

logger = logging.getLogger(__name__)

COMPARED = 16
"""Texts whose costs are compared, at most."""


def check_unchanged(objective: Objective, identity: str, prompts: Prompts, folder: str) -> None:
    """Check that the functions give the costs that they gave when a checkpoint was written.

    Their identity ([`aldrift_hf.objective.identity`]) may be another although their costs are the same: they may count
    their calls, for example, or hold something that cannot be hashed. So where it is, a few texts whose costs are on
    disk are evaluated once more. With `objective_cache_key`, the user vouches for them.

    Args:
        objective: open. All processes call this together.
        identity: the objective's when the checkpoint was written.
        prompts: the run's.
        folder: the checkpoint's, for the message.

    Raises:
        ValueError: if a cost differs: the run would go on with both.
    """
    objective(prompts, [], [])  # the first process's identity counts, and it has been shared now
    if objective.store.identity == identity or (objective.cache_key is not None and identity.startswith("content:")):
        return
    row_of = {key: row for row, key in enumerate(prompts.keys)}
    known = [item for item in objective.store.sample(identity, COMPARED) if item[0][0] in row_of]
    if not known:
        logger.warning(
            f"the objective is not the one that {folder} was written with, or refers to other data, and no cost is on "
            "disk to be compared. If its costs have changed, start again without resume_from_checkpoint."
        )
    about, objective.store.about = objective.store.about, None  # these are not yet the run's
    try:
        objective(prompts, [row_of[prompt] for (prompt, _), _ in known], [text for (_, text), _ in known])
    finally:
        objective.store.about = about
    for key, before in known:
        now = objective.store.get(key)  # none if its evaluation has failed
        if now is not None and not _agree(before, now):
            shown = [values[0] if len(values) == 1 else values for values in (before, now)]
            raise ValueError(
                f"{folder} was written with other costs than the objective has now: {key[1]!r} cost {shown[0]} and "
                f"costs {shown[1]}. The run would go on with both. Take the change back, or start again without "
                "resume_from_checkpoint. If the costs are random, set objective_cache_key: they are then not compared."
            )


def _agree(before: Costs, now: Costs) -> bool:
    return all(
        one is other if one is None or other is None else math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-6)
        for one, other in zip(before, now, strict=True)
    )
