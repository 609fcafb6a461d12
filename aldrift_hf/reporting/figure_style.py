"""The style of a run's figures, and a small plot in it.

The process's own matplotlib settings are left alone: no backend is chosen, and the style applies only while drawing.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
        set_margins(figure, 1, 1, title=0.0)
        self.draw(figure.add_subplot())
        return figure

    def svg(self) -> str:
        """The plot as an SVG document with a transparent ground, in colours for a light page."""
        file = io.StringIO()
        with styled():
            self.figure().savefig(file, format="svg", transparent=True, metadata={"Date": None})
        return file.getvalue()


def set_margins(figure: Figure, rows: int, columns: int, title: float) -> None:
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
