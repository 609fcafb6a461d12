"""A run in pictures: small plots along its ladder, and the weights of its newest draws.

The process's own matplotlib settings are left alone: no backend is chosen, and the style holds only while it is drawn.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import math
import os
import re
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
from .health import KHAT_WARNING
from .record import RunRecord

# Okabe and Ito's palette: colours that the colour-blind tell apart.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#666666"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, "#D55E00", "#56B4E9", "#000000", GREY)

_STYLE: dict[str, Any] = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
_INK = "#010203"
"""Stands for what text and axes are drawn in: SVG leaves plain black unsaid."""
_PANEL = (3.6, 2.4)
"""Inches of a small plot."""
_COLUMNS = 3
_MOST_MARKERS = 60
"""Rungs up to which each has a dot of its own."""
_LEAST_WEIGHT = 1e-3
"""Weights below it share the first bar."""
_LEAST_DRAWS = 10
"""Draws of a prompt below which their weights say nothing of each other."""


@contextlib.contextmanager
def styled(*more: dict[str, Any]) -> Iterator[None]:
    """The common style, whatever the process's own is, for as long as it takes to draw."""
    with matplotlib.style.context(["default", _STYLE, *more]):
        yield


@dataclass(frozen=True)
class Plot:
    """A small plot.

    Attributes:
        name: what begins its ids in a page.
        title: what it shows, with the unit.
        caption: how to read it.
        draw: draws it, but for the title.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Axes], None]

    def svg(self) -> str:
        """An `<svg>` that stands in a page among others: its colours and its font are the page's, text stays text.

        Text and axes take `currentColor`, the palette's colours `var(--series-0)` and on.
        """
        ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK)
        file = io.StringIO()
        with styled(ink, {"svg.fonttype": "none", "svg.hashsalt": self.name}):
            sheet = Figure(_PANEL)
            self.draw(sheet.add_subplot())
            no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            sheet.savefig(file, format="svg", transparent=True, metadata=no_metadata)
        text = file.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<defs>\s*<style.*?</defs>", "", text, count=1, flags=re.DOTALL)  # would hold for the whole page
        text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
        text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
        colours = {_INK: "currentColor", **{colour: f"var(--series-{i})" for i, colour in enumerate(PALETTE)}}
        for colour, of_the_page in colours.items():
            text = re.sub(f"(fill|stroke): {colour}", rf"\1: {of_the_page}", text, flags=re.IGNORECASE)
        return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{self.name}-", text)


# Name, title, how to read it, the records' keys with their labels.
_ALONG_THE_LADDER: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    (
        "cost",
        "Cost",
        "The samples are what a rung's correction made of its proposals; the model learns them, so the next rung's "
        "proposals should follow them down.",
        {"objective_mean": "proposals, mean", "sample_objective_mean": "samples, mean", "objective_best": "best"},
    ),
    (
        "success",
        "Success (share of proposals)",
        "Proposals of cost 0 or, where none was ever seen, of the best cost known. Success says nothing of variety: "
        "read it beside missing mass.",
        {"success": "proposals"},
    ),
    (
        "missing_mass",
        "Missing mass (nats)",
        "log Z along the ladder minus log Z from the model's own draws: x nats mean that they account for a share "
        "exp(-x) of the target. About 0 is right, and below 0 is noise; a rise means that the model loses texts.",
        {"missing_mass": "model"},
    ),
    (
        "ess",
        "Effective sample size (share of draws)",
        "How many independent draws of the rung's target the weighted ones are worth. It judges what the model draws, "
        "and is blind to what it stopped drawing.",
        {"ess": "proposals", "archive_ess": "archive"},
    ),
    (
        "khat",
        "k-hat",
        f"The shape of the weights' tail. Above {KHAT_WARNING} a few draws carry everything, and what is estimated by "
        "weight cannot be relied on. No dot where there is no tail to fit.",
        {"khat": "proposals", "archive_khat": "archive"},
    ),
    (
        "acceptance",
        "Acceptance rate",
        "Share of proposals that the Metropolis-Hastings chains accept. Near 1 the model already draws from the rung's "
        "target; near 0 the chains stand still.",
        {"acceptance_rate": "chains"},
    ),
    (
        "distinct",
        "Distinct texts (share)",
        "Proposals repeat where the target is narrow and where the model memorises (missing mass tells which), samples "
        "also where few proposals carry the weight.",
        {"distinct_proposals": "proposals", "distinct_samples": "samples"},
    ),
    (
        "log_z",
        "log Z (nats)",
        "The log of the prior's mean of exp(-τ·d), by the ladder. Its slope is minus the mean cost of the target.",
        {"log_z": "ladder"},
    ),
    (
        "loss",
        "Training loss",
        "Mean over a rung's updates. Every rung has samples of its own to learn, so two rungs' levels do not compare.",
        {"sft_loss": "updates"},
    ),
)
_SHARES = ("success", "ess", "acceptance", "distinct")
_NOT_ABOVE = {
    "missing_mass": (MISSING_MASS_WARNING, f"{MISSING_MASS_WARNING}: warned of above"),
    "khat": (KHAT_WARNING, f"{KHAT_WARNING}: unreliable above"),
}


def plots(record: RunRecord) -> list[Plot]:
    """The plots that a run has something to show in: along its ladder, and of its newest draws."""
    kinds = list(_ALONG_THE_LADDER)
    parts = {key: key.removeprefix("objective/") for rung in record.rungs for key in rung if "objective/" in key}
    kinds.insert(1, ("objectives", "Cost by objective", "Means of a rung's proposals, before weighting.", parts))
    if not _tau_rises(record):
        kinds.insert(0, ("tau", "Inverse temperature τ", "Where the ladder stands on each rung.", {"tau": "τ"}))
    found = [
        Plot(name, title, caption, functools.partial(_draw_curves, name=name, curves=curves, record=record))
        for name, title, caption, keys in kinds
        if (curves := _curves(record, keys))
    ]
    weights = relative_weights(record)
    return [*found, _weights_plot(weights, record.draws[0]["tau"])] if len(weights) else found


def write_ladder(record: RunRecord, path: str | Path) -> None:
    """All plots as one PNG; none is written where there is nothing to show yet."""
    panels = plots(record)
    if not panels:
        return
    path = Path(path)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with styled():
        rows = math.ceil(len(panels) / _COLUMNS)
        sheet = Figure((_PANEL[0] * _COLUMNS, _PANEL[1] * rows))
        for place, plot in enumerate(panels, start=1):
            axes = sheet.add_subplot(rows, _COLUMNS, place)
            plot.draw(axes)
            axes.set_title(plot.title)
        sheet.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)


def relative_weights(record: RunRecord) -> np.ndarray:
    """Weights of the newest draws as multiples of their prompt's mean, `n·w(s) / Σ w`; 0 where the target excludes one.

    Prompts of which there are too few draws to compare are left out.
    """
    of_prompt: dict[str, list[float]] = {}
    for draw in record.draws:
        log_weight = draw["log_weight"]
        of_prompt.setdefault(json.dumps(draw["prompt"]), []).append(-math.inf if log_weight is None else log_weight)
    several = [np.array(weights) for weights in of_prompt.values() if len(weights) >= _LEAST_DRAWS]
    weights = [np.exp(logs - logs.max()) for logs in several if np.isfinite(logs.max())]
    return np.concatenate([len(w) * w / w.sum() for w in weights]) if weights else np.empty(0)


def _curves(record: RunRecord, keys: dict[str, str]) -> dict[str, list[float]]:
    """Values on each rung by label, NaN where a rung has none; only of those that some rung has."""
    found = {label: [rung.get(key, math.nan) for rung in record.rungs] for key, label in keys.items()}
    return {label: values for label, values in found.items() if np.isfinite(values).any()}


def _tau_rises(record: RunRecord) -> bool:
    return all(before["tau"] < after["tau"] for before, after in itertools.pairwise(record.rungs))


def _draw_curves(axes: Axes, name: str, curves: dict[str, list[float]], record: RunRecord) -> None:
    """Against `τ` or, where a ladder stays at one, against rungs."""
    by_tau = _tau_rises(record)
    across = [rung["tau" if by_tau else "rung"] for rung in record.rungs]
    for (label, values), colour in zip(curves.items(), itertools.cycle(PALETTE)):
        marker = "." if len(across) <= _MOST_MARKERS else ""
        axes.plot(across, values, color=colour, marker=marker, label=label.replace("$", r"\$"))
    if name in _NOT_ABOVE:
        value, label = _NOT_ABOVE[name]
        axes.axhline(value, color=GREY, linestyle="--", linewidth=1, label=label)
    if name in _SHARES:
        axes.set_ylim(-0.03, 1.03)
    if not by_tau:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("inverse temperature τ" if by_tau else "rung")
    if len(axes.lines) > 1:
        axes.legend()


def _weights_plot(weights: np.ndarray, tau: float) -> Plot:
    return Plot(
        "weights",
        f"Weights of the newest draws, for τ\u00a0=\u00a0{tau:.3g}",
        "A draw's weight is p(s)/q(s), here as a multiple of the mean: at 1 the model writes a text just as often as "
        "the target does, to the right of it too seldom, to the left too often. Bars count the draws, the outline "
        "counts them by weight. Both close to 1 is right; an outline far to the right of the bars means that few draws "
        "stand for most of the target.",
        functools.partial(_draw_weights, weights=weights),
    )


def _draw_weights(axes: Axes, weights: np.ndarray) -> None:
    shown = weights.clip(_LEAST_WEIGHT)
    low, high = min(shown.min() / 1.2, 0.5), max(shown.max() * 1.2, 2.0)
    bins = np.geomspace(low, high, 31).tolist()
    axes.hist(shown, bins, weights=np.full(len(weights), 1 / len(weights)), color=BLUE, label="draws")
    by_weight = weights / weights.sum()
    axes.hist(shown, bins, weights=by_weight, histtype="step", color=ORANGE, linewidth=1.5, label="their weight")
    axes.axvline(1.0, color=GREY, linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 50 else (1,)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="weight, as a multiple of the mean", ylabel="share")
    axes.legend()
