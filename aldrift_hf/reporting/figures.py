"""Plots of a run: its metrics along the ladder."""

from __future__ import annotations

import functools
import itertools
import math
import os
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..algorithm.diagnostics import MISSING_MASS_WARNING
from .draw_figures import plots_of_draws
from .figure_style import GREY, PALETTE, PLOT_SIZE, Plot, set_margins, styled
from .health import MAX_KHAT
from .record import RunRecord

_TITLE = 0.2
"""Height of a title, in inches."""
_COLUMNS = 3
_MAX_MARKERS = 60
"""Up to this number of rungs, each has a dot of its own."""

# Name, title, how to read it, the keys of a rung's record with their labels.
_ALONG_THE_LADDER: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    (
        "cost",
        "Cost",
        "Samples are what the sampler selects from the proposals. The model is trained on them, so the next rung's "
        "proposals should follow them down.",
        {"objective_mean": "proposals, mean", "sample_objective_mean": "samples, mean", "objective_best": "best"},
    ),
    (
        "success",
        "Success (share of proposals)",
        "Proposals that cost at most success_threshold. Success does not measure variety: read it together with the "
        "missing mass.",
        {"success": "proposals"},
    ),
    (
        "missing_mass",
        "Missing mass (nats)",
        "log Z along the ladder minus log Z from the model's own draws. At x nats, these draws cover a share exp(-x) "
        "of the target. It should stay near 0 (values below 0 are noise); a rise means that the model loses texts.",
        {"missing_mass": "model"},
    ),
    (
        "kl",
        "KL divergence (nats)",
        "Of the model that drew the proposals, per completion. KL(model‖prior) grows as the model moves away from the "
        "prior. KL(model‖p_τ) is its distance from the target of this rung, for which it has not been trained yet.",
        {"kl_to_prior": "to the prior", "kl_to_target": "to the rung's target"},
    ),
    (
        "ess",
        "Effective sample size (share of draws)",
        "The number of independent draws of the rung's target that the weighted draws are worth. It does not notice "
        "texts that the model no longer writes.",
        {"ess": "proposals", "archive_ess": "archive"},
    ),
    (
        "khat",
        "k-hat",
        f"The shape of the tail of the weights. Above {MAX_KHAT}, a few draws dominate, and weighted estimates are "
        "unreliable. There is no dot where the weights have no tail to fit.",
        {"khat": "proposals", "archive_khat": "archive"},
    ),
    (
        "acceptance",
        "Acceptance rate",
        "Share of proposals that the Metropolis-Hastings chains accept. Near 1, the model already samples the rung's "
        "target; near 0, the chains do not move.",
        {"acceptance_rate": "chains"},
    ),
    (
        "distinct",
        "Distinct texts (share)",
        "Proposals repeat if the target is narrow, or if the model memorizes (missing mass tells which). Samples also "
        "repeat if a few proposals dominate the weights.",
        {"distinct_proposals": "proposals", "distinct_samples": "samples"},
    ),
    (
        "diversity",
        "Diversity",
        "How much two draws for one prompt differ: 1 - |A∩B| / |A∪B|, where A and B are their sets of neighbouring "
        "tokens. At 0 all draws are the same; at 1 no two have a pair of tokens in common.",
        {"diversity": "proposals"},
    ),
    (
        "entropy",
        "Entropy (nats per token)",
        "Mean of -log q per token of the proposals, where q is the model. It falls as the model narrows down to the "
        "target.",
        {"entropy": "proposals"},
    ),
    (
        "length",
        "Length of proposals (tokens)",
        "Mean number of tokens, the end-of-text token included.",
        {"completions/mean_length": "proposals"},
    ),
    (
        "log_z",
        "log Z (nats)",
        "The logarithm of the prior's mean of exp(-τ·d), estimated along the ladder. Its slope is minus the target's "
        "mean cost.",
        {"log_z": "ladder"},
    ),
    (
        "loss",
        "Training loss",
        "Mean over the updates of a rung. Every rung is trained on its own samples, so the levels of two rungs cannot "
        "be compared.",
        {"loss": "updates"},
    ),
)
_SHARES = ("success", "ess", "acceptance", "distinct", "diversity")
_LIMITS = {
    "missing_mass": (MISSING_MASS_WARNING, f"warning above {MISSING_MASS_WARNING}"),
    "khat": (MAX_KHAT, f"unreliable above {MAX_KHAT}"),
}


def plots_along_ladder(record: RunRecord) -> list[Plot]:
    """The plots for which a run has data."""
    rows = list(_ALONG_THE_LADDER)
    parts = {key: key.removeprefix("objective/") for rung in record.rungs for key in rung if "objective/" in key}
    rows.insert(1, ("objectives", "Cost by objective", "Means over a rung's proposals, before weighting.", parts))
    if not _tau_rises(record):
        rows.insert(0, ("tau", "Inverse temperature τ", "The ladder's inverse temperature on each rung.", {"tau": "τ"}))
    found = [
        Plot(
            name,
            title,
            caption,
            summary=_summary(curves, record),
            draw=functools.partial(_draw_curves, name=name, curves=curves, record=record),
        )
        for name, title, caption, labels in rows
        if (curves := _curves(record, labels)) and not (name == "length" and _is_constant(curves))
    ]
    return found


def write_ladder(record: RunRecord, path: str | Path) -> None:
    """Write all plots as one PNG file; nothing if there is nothing to plot yet."""
    panels = [*plots_of_draws(record), *plots_along_ladder(record)]
    if not panels:
        return
    path = Path(path)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with styled():
        rows = math.ceil(len(panels) / _COLUMNS)
        figure = Figure((PLOT_SIZE[0] * _COLUMNS, (PLOT_SIZE[1] + _TITLE) * rows))
        set_margins(figure, rows, _COLUMNS, _TITLE)
        for place, plot in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, _COLUMNS, place)
            plot.draw(axes)
            axes.set_title(plot.title)
        figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)


def _curves(record: RunRecord, labels: dict[str, str]) -> dict[str, list[float]]:
    """Values by label, one per rung, NaN where a rung has none. Curves without any value are left out."""
    found = {label: [rung.get(key, math.nan) for rung in record.rungs] for key, label in labels.items()}
    return {label: values for label, values in found.items() if np.isfinite(values).any()}


def _is_constant(curves: dict[str, list[float]]) -> bool:
    return all(len(set(values)) == 1 for values in curves.values()) and len(next(iter(curves.values()))) > 1


def _summary(curves: dict[str, list[float]], record: RunRecord) -> str:
    """Each curve's first and last value."""
    parts = []
    for label, values in curves.items():
        known = [(rung["rung"], value) for rung, value in zip(record.rungs, values) if math.isfinite(value)]
        (first, start), (last, end) = known[0], known[-1]
        parts.append(f"{label}: {start:.3g} on rung {first}, {end:.3g} on rung {last}")
    return "; ".join(parts)


def _tau_rises(record: RunRecord) -> bool:
    return all(before["tau"] < after["tau"] for before, after in itertools.pairwise(record.rungs))


def _draw_curves(axes: Axes, name: str, curves: dict[str, list[float]], record: RunRecord) -> None:
    """Against `τ` or, if the ladder repeats an inverse temperature, against the rung."""
    by_tau = _tau_rises(record)
    x = [rung["tau" if by_tau else "rung"] for rung in record.rungs]
    for (label, values), colour in zip(curves.items(), itertools.cycle(PALETTE)):
        marker = "." if len(x) <= _MAX_MARKERS else ""
        axes.plot(x, values, color=colour, marker=marker, label=label.replace("$", r"\$"))
    if name in _LIMITS:
        value, label = _LIMITS[name]
        axes.axhline(value, color=GREY, linestyle="--", linewidth=1, label=label)
    if name in _SHARES:
        axes.set_ylim(-0.03, 1.03)
    if not by_tau:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("inverse temperature τ" if by_tau else "rung")
    if len(axes.lines) > 1:
        axes.legend()
