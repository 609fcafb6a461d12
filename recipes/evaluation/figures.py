"""Parts of the recipes' figures, in the style of a run's own figures: axes with names and units."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import networkx as nx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from aldrift_hf.reporting.figure_style import BLUE, GREEN, GREY, ORANGE, PALETTE, styled


@contextmanager
def figure(path: str | Path, mosaic: Any, size: tuple[float, float]) -> Iterator[dict[str, Axes]]:
    """A context that yields the axes of a figure, and saves it at the end.

    Args:
        path: the PNG file.
        mosaic: layout and names of the axes, as in `matplotlib.figure.Figure.subplot_mosaic`.
        size: width and height, in inches.
    """
    with styled():
        sheet = Figure(size, layout="constrained")
        yield sheet.subplot_mosaic(mosaic)
        sheet.savefig(path, dpi=150)


def plot_along_ladder(axes: Axes, records: list[dict[str, Any]], curves: dict[str, str], what: str) -> None:
    """Plot metrics of the rungs against `τ`.

    Args:
        axes: the axes to draw on.
        records: the records of the rungs.
        curves: the metrics, as `{name: label}`. Metrics that are NaN or missing on all rungs are left out.
        what: label of the y-axis.
    """
    tau = [record["tau"] for record in records]
    lines = {label: (tau, [record.get(key, np.nan) for record in records]) for key, label in curves.items()}
    lines = {label: line for label, line in lines.items() if not np.isnan(line[1]).all()}
    plot_lines(axes, lines, "inverse temperature τ (nats per unit of cost)", what)


def plot_lines(axes: Axes, lines: dict[str, tuple[Any, Any]], x: str, y: str, *, log: str = "") -> None:
    """Plot lines, with a legend if there are several.

    Args:
        axes: the axes to draw on.
        lines: the lines, as `{label: (x values, y values)}`.
        x, y: labels of the axes, with units.
        log: which axes are logarithmic: `"x"`, `"y"`, `"xy"` or none.
    """
    for (label, (across, up)), colour in zip(lines.items(), itertools.cycle(PALETTE)):
        axes.plot(across, up, color=colour, marker=".", label=label)
    axes.set(xlabel=x, ylabel=y)
    if "x" in log:
        axes.set_xscale("log")
        ticks = sorted({float(value) for across, _ in lines.values() for value in across})
        if len(ticks) > 8:  # measured values rather than a few settings: ticks at round numbers
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        else:
            axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    if "y" in log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    if len(lines) > 1:
        axes.legend()


def plot_shares(axes: Axes, shares: np.ndarray, title: str, rows: str, columns: str) -> None:
    """Plot a matrix of shares as a heat map, from dark (0) to bright (the largest). Rows and columns count from 1."""
    axes.imshow(
        shares,
        aspect="auto",
        cmap="cividis",
        vmin=0.0,
        extent=(0.5, shares.shape[1] + 0.5, shares.shape[0] + 0.5, 0.5),
    )
    axes.set(title=title, xlabel=columns, ylabel=rows)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))


def plot_edge_marginals(axes: Axes, graph: nx.Graph, learned: dict[tuple[str, str], float], exact: np.ndarray) -> None:
    """Plot a graph. Edges that more of the drawn trees contain are wider and darker.

    If there are at most 40 edges, each is labelled with its `learned|exact` shares in per cent.

    Args:
        axes: the axes to draw on.
        graph: the graph.
        learned: the share of drawn trees that contain each edge.
        exact: the same for all spanning trees, in the order of `learned`.
    """
    layout = nx.kamada_kawai_layout(graph)
    values = np.array(list(learned.values()))
    nx.draw_networkx_edges(
        graph,
        layout,
        ax=axes,
        edgelist=list(learned),
        width=list(0.5 + 4 * values),
        edge_color=list(values),
        edge_cmap=matplotlib.colormaps["cividis_r"],
        edge_vmin=0,
        edge_vmax=1,
    )
    nx.draw_networkx_nodes(graph, layout, ax=axes, node_size=25, node_color=GREY)
    if graph.number_of_edges() <= 40:
        nx.draw_networkx_labels(graph, layout, ax=axes, font_size=7, verticalalignment="bottom")
        nx.draw_networkx_edge_labels(
            graph,
            layout,
            ax=axes,
            edge_labels={
                edge: f"{100 * a:.0f}|{100 * b:.0f}" for (edge, a), b in zip(learned.items(), exact, strict=True)
            },
            font_size=6,
        )
    axes.set_title("share of trees that contain each edge: learned | exact, in %")
    axes.axis("off")


def plot_marginals(axes: Axes, learned: dict[str, np.ndarray], exact: np.ndarray) -> None:
    """Plot learned against exact edge marginals, with one colour per source of draws, and the diagonal."""
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
    for (label, values), colour in zip(learned.items(), (ORANGE, BLUE, GREEN), strict=False):
        axes.scatter(exact, values, s=14, color=colour, label=label)
    axes.set(xlabel="exact edge marginal (Kirchhoff)", ylabel="edge marginal of drawn trees", title="edge marginals")
    if learned:
        axes.legend()
