"""What every recipe says at its end, in words."""

from __future__ import annotations

from typing import Any

import numpy as np

from aldrift_hf.algorithm.diagnostics import MISSING_MASS_WARNING


def missing_mass_in_words(nats: float | None) -> str:
    """The verdict on the final model; `None` where it was not measured."""
    if nats is None:
        return "missing mass: not measured, the budget of objective calls is spent"
    verdict = "the model covers the target" if nats <= MISSING_MASS_WARNING else "the model has LOST part of the target"
    share = min(1.0, float(np.exp(-nats)))
    return f"missing mass: {nats:.2f} nats: by the ladder's log Z its draws account for {share:.0%} of p_T; {verdict}"


def effort_in_words(record: dict[str, Any]) -> str:
    """What a run asked for up to a rung, by the rung's record."""
    return f"{record['proposals']:,} proposals, {record['objective_calls']:,} distinct objective calls"
