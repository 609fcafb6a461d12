"""The table, the sentences and the figure of the coarse-learnability recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from aldrift_hf.reporting.figure_style import BLUE, GREEN, GREY, ORANGE, PURPLE
from evaluation import suprema
from evaluation.figures import figure
from evaluation.tables import Comparison

COLOURS = (ORANGE, PURPLE, GREEN, BLUE)


@dataclass(frozen=True)
class Sweep:
    """The settings of the experiments in `recipes/coarse_learnability.py`, and `log sup p/L` of every fit, in nats.

    Attributes:
        components: k, the number of Gaussians in the mixtures.
        separations: Δ in (a), in standard deviations of a component.
        sample_sizes: m, the number of samples per fit.
        tilt: θ in (b).
        kde_separation: Δ in (c).
        bandwidths: h in (c), in multiples of Silverman's.
        gaussian: results of (a), `[separations, sizes, repeats]`.
        realizable: results of (b), `[sizes, repeats]`.
        kde: results of (c) over all reals, `[bandwidths, sizes, repeats]`.
        kde_central: results of (c) over the central `1 - 1/m` of p, `[bandwidths, sizes, repeats]`.
    """

    components: int
    separations: list[float]
    sample_sizes: list[int]
    tilt: float
    kde_separation: float
    bandwidths: Sequence[float]
    gaussian: np.ndarray
    realizable: np.ndarray
    kde: np.ndarray
    kde_central: np.ndarray


def quantile(fits: np.ndarray, level: float = 0.5) -> np.ndarray:
    """A quantile over repeats. It is one of the observed values: interpolation with infinity would be meaningless."""
    observed: np.ndarray = np.quantile(fits, level, axis=-1, method="inverted_cdf")
    return observed


def ratio(nats: float, digits: int = 4) -> str:
    """`exp(nats)` as text that is readable at any size."""
    return "inf" if np.isinf(nats) else f"e^{nats:.0f}" if nats > 6.9 else f"{np.exp(nats):#.{digits}g}".rstrip(".")


def compare(sweep: Sweep) -> Comparison:
    """A table of the median and the quartiles of sup p/L at the smallest, a middle and the largest sample size."""
    sizes = sweep.sample_sizes
    shown = _ends_and_middle(len(sizes))
    repeats = sweep.realizable.shape[-1]
    table = Comparison(f"sup p/L of {repeats} fits: median (quartiles)", [f"m = {sizes[index]:,}" for index in shown])
    rows = [(f"(a) Δ = {separation:g}", fits) for separation, fits in zip(sweep.separations, sweep.gaussian)]
    rows.append((f"(b) θ = {sweep.tilt:g}", sweep.realizable))
    for factor, everywhere, central in zip(sweep.bandwidths, sweep.kde, sweep.kde_central):
        rows += [(f"(c) {factor:g} h_S", everywhere), (f"(c) {factor:g} h_S, central", central)]
    for label, fits in rows:
        quartiles = zip(*(quantile(fits[shown], level) for level in (0.25, 0.5, 0.75)))
        cells = [f"{ratio(middle)} ({ratio(low, 3)}-{ratio(high, 3)})" for low, middle, high in quartiles]
        table.rows.append((label, cells))
    return table


def _ends_and_middle(count: int) -> list[int]:
    return sorted({0, count // 2, count - 1})


def slope(x: Sequence[float], y: np.ndarray) -> float:
    """The slope of the least-squares line through `(log x, y)`."""
    return float(np.polyfit(np.log(x), y, 1)[0])


def infinite_samples(sweep: Sweep) -> np.ndarray:
    """`log sup p/L` of the Gaussian fitted to infinitely many samples, `[separations]`, nats."""
    mixtures = [suprema.even_mixture(sweep.components, separation) for separation in sweep.separations]
    return np.array([suprema.log_supremum(p, suprema.infinite_sample_gaussian(p)) for p in mixtures])


def verdicts(sweep: Sweep) -> list[str]:
    """One sentence per experiment, with the measured values and those of the theory."""
    sizes, separations = sweep.sample_sizes, sweep.separations
    gaussian, realizable = quantile(sweep.gaussian), quantile(sweep.realizable)
    wide = (len(separations) - 1) // 2
    limit = suprema.wide_separation_constant(sweep.components)
    fall, off = np.exp(gaussian[:, 0] - gaussian[:, -1]), np.exp(gaussian[:, -1] - infinite_samples(sweep)) - 1
    light = np.isinf(sweep.gaussian)
    shares = ", ".join(f"{share:.0%}" for share in np.isfinite(sweep.kde).mean(axis=(1, 2)))
    largest = ", ".join(ratio(nats) for nats in sweep.kde_central.max(axis=(1, 2)))
    return [
        f"(a) growth with Δ: log sup p/L has slope {slope(separations[wide:], gaussian[wide:, -1]):.3f} in log Δ from "
        f"Δ = {separations[wide]:g} on (linear growth: 1). At Δ = {separations[-1]:g} the supremum is "
        f"{np.exp(gaussian[-1, -1]) / separations[-1]:.3f} Δ (limit: {limit:.3f} Δ); the envelope Δ e^k is "
        f"{np.exp(sweep.components):.1f} Δ.",
        f"(a) convergence with m: the median at m = {sizes[0]:,} is {fall.min():.2f} to {fall.max():.2f} times that at "
        f"m = {sizes[-1]:,}, which differs from its limit (a number above 1) by {off.min():+.1%} to {off.max():+.1%}. "
        f"{light.sum()} of {light.size} fits are narrower than p's components, so that the supremum is infinite.",
        f"(b) realizable: sup p/L falls from {np.exp(realizable[0]):.3f} at m = {sizes[0]:,} to "
        f"{np.exp(realizable[-1]):.4f} at m = {sizes[-1]:,}, its logarithm like "
        f"m^{slope(sizes, np.log(realizable)):.2f} (theory: m^-0.5).",
        f"(c) kernel density, h = {', '.join(f'{factor:g}' for factor in sweep.bandwidths)} h_S: sup p/L is finite "
        f"over all reals in {shares} of the fits (those with h > 1, a component's width). Its largest value over the "
        f"central 1 - 1/m is {largest}.",
    ]


def band(axes: Axes, x: Sequence[float], fits: np.ndarray, colour: str, label: str, log: bool) -> None:
    """Plot the median and the quartiles over repeats of sup p/L, or of its logarithm (`log`)."""
    low, middle, high = (quantile(fits, level) for level in (0.25, 0.5, 0.75))
    if not log:
        low, middle, high = (np.exp(np.minimum(values, 99)) for values in (low, middle, high))  # beyond any axis
    axes.plot(x, middle, color=colour, marker="o", markersize=3, label=label)
    axes.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)


def draw_figure(sweep: Sweep, path: Path) -> None:
    """Draw sup p/L against Δ for (a), its logarithm against m for (b) beside (a), and against m for (c)."""
    sizes, separations, k = sweep.sample_sizes, sweep.separations, sweep.components
    with figure(path, [["a", "b", "c"]], (14, 4.2)) as axes:
        for index, colour in zip(_ends_and_middle(len(sizes)), COLOURS):
            band(axes["a"], separations, sweep.gaussian[:, index], colour, f"m = {sizes[index]:,}", False)
        limit = np.exp(infinite_samples(sweep))
        axes["a"].plot(separations, limit, color="black", linestyle="--", label="infinitely many samples")
        bound = [suprema.envelope(k, separation) for separation in separations]
        axes["a"].plot(separations, bound, color=GREY, linestyle=":", label="envelope Δ e^k, constant 1")
        axes["a"].set(
            xlabel="separation Δ (component standard deviations)", ylabel="sup p/L", ylim=(0.2, 2 * bound[-1])
        )
        axes["a"].set_title(f"(a) one Gaussian for {k}: linear in Δ, far below Δ e^k")

        for index, colour in ((-1, ORANGE), ((len(separations) - 1) // 2, PURPLE)):
            label = f"(a) not realizable, Δ = {separations[index]:g}"
            band(axes["b"], sizes, sweep.gaussian[index], colour, label, True)
        band(axes["b"], sizes, sweep.realizable, BLUE, f"(b) realizable, θ = {sweep.tilt:g}", True)
        constant = np.exp(np.log(quantile(sweep.realizable) * np.sqrt(sizes)).mean())
        axes["b"].plot(sizes, constant / np.sqrt(sizes), color=GREY, linestyle=":", label="rate m^(-1/2)")
        axes["b"].set(xlabel="samples m", ylabel="log sup p/L (nats)")
        axes["b"].set_title("(b) realizable: p/L tends to 1; not realizable: it levels off")

        for factor, colour, everywhere, central in zip(sweep.bandwidths, COLOURS, sweep.kde, sweep.kde_central):
            band(axes["c"], sizes, central, colour, f"h = {factor:g} Silverman", True)
            light = np.isinf(quantile(everywhere))
            axes["c"].plot(np.array(sizes)[light], quantile(central)[light], "o", color=colour, mfc="white")
        axes["c"].plot([], [], "o", color=GREY, mfc="white", label="infinite over all reals (h < 1)")
        axes["c"].set(xlabel="samples m", ylabel="log sup p/L (nats), central 1 - 1/m of p")
        axes["c"].set_title(f"(c) kernel density, Δ = {sweep.kde_separation:g}: too narrow fails to cover")
        for panel in axes.values():
            panel.set(xscale="log", yscale="log")
        axes["c"].set_ylim(top=30 * axes["c"].get_ylim()[1])  # room for the legend
        for panel in axes.values():
            panel.legend(fontsize=8)
