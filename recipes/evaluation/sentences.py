"""Sentences that several recipes print at the end."""

from __future__ import annotations

from typing import Any

import numpy as np

from aldrift_hf.algorithm.diagnostics import MISSING_MASS_WARNING


def missing_mass_in_words(nats: float | None) -> str:
    """The missing mass of the final model, and what it means.

    Args:
        nats: the missing mass; `None` if it was not measured.
    """
    if nats is None:
        return "missing mass: not measured, because max_objective_calls was reached"
    verdict = "the model covers the target" if nats <= MISSING_MASS_WARNING else "the model has LOST part of the target"
    share = min(1.0, float(np.exp(-nats)))
    return (
        f"missing mass: {nats:.2f} nats; by the ladder's log Z, the model's draws cover {share:.0%} of p_T: {verdict}"
    )


def effort_in_words(record: dict[str, Any]) -> str:
    """How many proposals were drawn and evaluated up to a rung, from the rung's record."""
    return f"{record['proposals']:,} proposals, {record['objective_calls']:,} distinct objective calls"
