"""Sentences that several recipes print at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from aldrift_hf.algorithm.diagnostics import MISSING_MASS_WARNING
from aldrift_hf.reporting.numbers import with_error


def missing_mass_in_words(metrics: Mapping[str, float]) -> str:
    """The missing mass of the final model, and what it means.

    Args:
        metrics: of the final model; empty if it was not measured.
    """
    if "missing_mass" not in metrics:
        return "missing mass: not measured, because max_objective_calls was reached"
    nats = metrics["missing_mass"]
    verdict = "the model covers the target" if nats <= MISSING_MASS_WARNING else "the model has LOST part of the target"
    share = min(1.0, float(np.exp(-nats)))
    return (
        f"missing mass: {with_error(metrics, 'missing_mass', '.2f')} nats; by the ladder's log Z, the model's draws "
        f"cover {share:.0%} of p_T: {verdict}"
    )


def effort_in_words(record: dict[str, Any]) -> str:
    """How many proposals were drawn and evaluated up to a rung, from the rung's record."""
    return f"{record['proposals']:,} proposals, {record['objective_calls']:,} distinct objective calls"
