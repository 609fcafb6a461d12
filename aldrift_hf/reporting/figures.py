"""Plots of a run: its metrics along the ladder, and the weights of its newest draws.

The process's own matplotlib settings are left alone: no backend is chosen, and the style applies only while drawing.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from ..algorithm.diagnostics import MISSING_MASS_WARNING
from .health import MAX_KHAT
from .record import RunRecord

# Okabe and Ito's palette, which colour-blind readers can tell apart; its light colours are darkened for a white ground.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#C98200", "#009E73", "#B8578F", "#666666"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, "#D55E00", "#2B93D1", "#000000", GREY)

_STYLE: dict[str, Any] = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: smaller, and drawn by the browser
}
PLOT_SIZE = (3.6, 2.4)
"""Width and height of a small plot, in inches."""
_MARGINS = {"left": 0.66, "right": 0.1, "bottom": 0.42, "top": 0.1}
"""Around a small plot's axes, in inches: fixed, for finding them takes as long as all drawing. "-0.00025" fits."""
_TITLE = 0.2
"""Height of a title, in inches."""
_COLUMNS = 3
_MAX_MARKERS = 60
"""Up to this number of rungs, each has a dot of its own."""
_MIN_WEIGHT = 1e-3
"""All weights below it share the first bar."""
_MIN_DRAWS = 10
"""Prompts with fewer draws are left out: so few weights cannot be compared with one another."""


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Draw in the common style, whatever the process's own is."""
    with matplotlib.style.context(["default", _STYLE]):
        yield


@dataclass(frozen=True)
class Plot:
    """A small plot.

    Attributes:
        name: identifies it in a page.
        title: what it shows, with the unit.
        caption: how to read it.
        summary: its content in words, for readers who cannot see it.
        draw: draws everything but the title.
    """

    name: str
    title: str
    caption: str
    summary: str
    draw: Callable[[Axes], None]

    def figure(self) -> Figure:
        """The plot alone, without its title. Call it in [`styled`]."""
        figure = Figure(PLOT_SIZE)
        _set_margins(figure, 1, 1, title=0.0)
        self.draw(figure.add_subplot())
        return figure

    def svg(self) -> str:
        """The plot as an SVG document with a transparent ground, in colours for a light page."""
        file = io.StringIO()
        with styled():
            self.figure().savefig(file, format="svg", transparent=True, metadata={"Date": None})
        return file.getvalue()


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
_SHARES = ("success", "ess", "acceptance", "distinct")
_LIMITS = {
    "missing_mass": (MISSING_MASS_WARNING, f"warning above {MISSING_MASS_WARNING}"),
    "khat": (MAX_KHAT, f"unreliable above {MAX_KHAT}"),
}


def plots(record: RunRecord) -> list[Plot]:
    """The plots for which a run has data: along its ladder, and of its newest draws."""
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
    weights = relative_weights(record)
    return [*found, _weights_plot(weights, record.draws[0]["tau"])] if len(weights) else found


def write_ladder(record: RunRecord, path: str | Path) -> None:
    """Write all plots as one PNG file; nothing if there is nothing to plot yet."""
    panels = plots(record)
    if not panels:
        return
    path = Path(path)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with styled():
        rows = math.ceil(len(panels) / _COLUMNS)
        figure = Figure((PLOT_SIZE[0] * _COLUMNS, (PLOT_SIZE[1] + _TITLE) * rows))
        _set_margins(figure, rows, _COLUMNS, _TITLE)
        for place, plot in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, _COLUMNS, place)
            plot.draw(axes)
            axes.set_title(plot.title)
        figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)


def _set_margins(figure: Figure, rows: int, columns: int, title: float) -> None:
    """Fixed margins around each of a figure's small plots, and `title` inches above it."""
    width, height = figure.get_size_inches()
    left, right, bottom, top = (_MARGINS[side] for side in ("left", "right", "bottom", "top"))
    top += title
    figure.subplots_adjust(
        left=left / width, right=1 - right / width, bottom=bottom / height, top=1 - top / height,
        # The space between axes, in multiples of their own size.
        wspace=(left + right) / (width / columns - left - right),
        hspace=(bottom + top) / (height / rows - bottom - top),
    )  # fmt: skip


def relative_weights(record: RunRecord) -> np.ndarray:
    """Weights of the newest draws as multiples of their prompt's mean, `n·w(s) / Σ w`; 0 for excluded draws.

    Prompts with too few draws are left out.
    """
    of_prompt: dict[str, list[float]] = {}
    for draw in record.draws:
        log_weight = draw["log_weight"]
        of_prompt.setdefault(json.dumps(draw["prompt"]), []).append(-math.inf if log_weight is None else log_weight)
    several = [np.array(weights) for weights in of_prompt.values() if len(weights) >= _MIN_DRAWS]
    weights = [np.exp(logs - logs.max()) for logs in several if np.isfinite(logs.max())]
    return np.concatenate([len(w) * w / w.sum() for w in weights]) if weights else np.empty(0)


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


def _weights_plot(weights: np.ndarray, tau: float) -> Plot:
    near = ((weights > 0.5) & (weights < 2)).mean()
    return Plot(
        "weights",
        f"Weights of the newest draws at τ\u00a0=\u00a0{tau:.3g}",
        "The weight of a draw is p_τ(s)/q(s), shown as a multiple of the mean. At 1, the model writes a text as often "
        "as the target does; above 1, too rarely; below 1, too often. Bars count draws, the outline counts them by "
        "weight. Both should be close to 1; an outline far to the right of the bars means that a few draws stand for "
        "most of the target.",
        summary=f"{near:.0%} of the draws have a weight between 1/2 and 2; the largest weight is {weights.max():.3g}",
        draw=functools.partial(_draw_weights, weights=weights),
    )


def _draw_weights(axes: Axes, weights: np.ndarray) -> None:
    shown = weights.clip(_MIN_WEIGHT)
    low, high = min(shown.min() / 1.2, 0.5), max(shown.max() * 1.2, 2.0)
    bins = np.geomspace(low, high, 31).tolist()
    axes.hist(shown, bins, weights=np.full(len(weights), 1 / len(weights)), color=BLUE, label="draws")
    by_weight = weights / weights.sum()
    axes.hist(shown, bins, weights=by_weight, histtype="step", color=ORANGE, linewidth=1.5, label="by weight")
    axes.axvline(1.0, color=GREY, linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 50 else (1,)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="weight, as a multiple of the mean", ylabel="share")
    axes.legend()
