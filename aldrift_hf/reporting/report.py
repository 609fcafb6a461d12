"""`report.html`: a run on one page that needs no network, for people to look at."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..algorithm.diagnostics import MISSING_MASS_WARNING
from . import figures, health
from .record import RunRecord, replace_file

REPORT_FILE, LADDER_FILE = "report.html", "figures/ladder.png"

logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_SECONDS_BETWEEN = 60.0
"""Between two reports of a run under way: one takes about a second to draw."""
_BEGINNING = 80
"""Characters of a prompt that the table repeats beside each of its draws."""


def write_report(record: RunRecord, folder: str | Path) -> None:
    """Write `report.html` and `figures/ladder.png` into a run's folder.

    The page is whole in itself. What is not ours in it (completions, prompts, names) is text and stays text: it is
    escaped, and the page's own policy lets no script but ours run and nothing be fetched.
    """
    folder = Path(folder)
    figures.write_ladder(record, folder / LADDER_FILE)
    replace_file(folder / REPORT_FILE, [render(record)])


class LiveReport:
    """The report of a run under way: once a minute, and at the end."""

    def __init__(self) -> None:
        self._written = time.monotonic()

    def update(self, record: RunRecord, folder: str | Path) -> None:
        """Write the report if it is time to; that it cannot be drawn is no reason for a run to end."""
        if not record.finished and time.monotonic() - self._written < _SECONDS_BETWEEN:
            return
        try:
            write_report(record, folder)
        except Exception:
            logger.warning(f"{Path(folder) / REPORT_FILE} could not be written; the run goes on", exc_info=True)
        self._written = time.monotonic()


def render(record: RunRecord) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": "{:,}".format, "decimals": _decimals, "setting": _setting}
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    prompts = list({json.dumps(draw["prompt"]): draw["prompt"] for draw in record.draws}.values())
    return environment.get_template("report.html.jinja").render(
        record=record,
        title="ALDRIFT: " + " + ".join(record.settings["objective"]),
        outcome=health.outcome(record),
        target=health.target_in_words(record),
        warnings=health.warnings(record),
        looked_at=_looked_at(record),
        tiles=_tiles(record),
        plots=[(plot, plot.svg()) for plot in figures.plots(record)],
        prompts=[_messages(prompt) for prompt in prompts],
        number_of={json.dumps(prompt): number for number, prompt in enumerate(prompts, start=1)},
        draws=[(draw, json.dumps(draw["prompt"])) for draw in record.draws],
        beginning=_BEGINNING,
        style=(_HERE / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=f"sha256-{digest}",
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def _looked_at(record: RunRecord) -> list[str]:
    """What no warnings means, for a run that has got somewhere."""
    model = _newest(record)
    checks = {
        "missing_mass": f"missing mass (warned of above {MISSING_MASS_WARNING:g} nats)",
        "khat": f"k-hat (above {health.KHAT_WARNING:g})",
        "ess": f"effective draws a prompt and rung (below {health.FEW_DRAWS})",
        "acceptance_rate": f"acceptance rate (below {health.LOW_ACCEPTANCE:.0%})",
    }
    return [text for key, text in checks.items() if math.isfinite(model.get(key, math.nan))]


def _newest(record: RunRecord) -> dict[str, Any]:
    """What is known of the model: of the final one where it was measured, otherwise of the last rung's."""
    last = record.rungs[-1] if record.rungs else {}
    its_draws = {"objective": last.get("objective_mean"), "distinct": last.get("distinct_proposals")}
    return {**last, **its_draws, **record.metrics}


def _tiles(record: RunRecord) -> list[tuple[str, str, str]]:
    """Key figures: a label, the value, and what to hold it against."""
    if not record.rungs:
        return []
    model, prior, settings = _newest(record), record.rungs[0], record.settings
    draws = settings["num_chains"] * settings["chain_length"]
    figures_of_run: list[tuple[str, str, Callable[[float], str], str]] = [
        ("mean cost", "objective", "{:.3g}".format, f"prior: {prior['objective_mean']:.3g}"),
        ("success", "success", "{:.1%}".format, f"prior: {prior['success']:.1%}"),
        (
            "of the target reached",
            "missing_mass",
            lambda nats: f"{health.covered(nats):.0%}",
            f"missing mass: {model.get('missing_mass', math.nan):.2f} nats",
        ),
        ("distinct draws", "distinct", "{:.1%}".format, f"prior: {prior['distinct_proposals']:.1%}"),
        ("effective sample size", "ess", "{:.1%}".format, f"of {draws:,} draws a prompt"),
        ("k-hat", "khat", "{:.2f}".format, f"reliable up to {health.KHAT_WARNING}"),
        ("accepted by chains", "acceptance_rate", "{:.1%}".format, "on the last rung"),
        ("inverse temperature τ", "tau", "{:.3g}".format, f"of T = {settings['tau_max']:g}, rung {len(record.rungs)}"),
        ("distinct objective calls", "objective_calls", "{:,}".format, f"for {model['proposals']:,} proposals"),
    ]
    return [
        (label, in_words(model[key]), note)
        for label, key, in_words, note in figures_of_run
        if math.isfinite(model.get(key, math.nan))
    ]


def _messages(prompt: Any) -> list[tuple[str, str]]:
    """A prompt as `(role, text)`; plain text has no role."""
    if isinstance(prompt, str):
        return [("", prompt)]
    return [
        (turn["role"], turn["content"] if isinstance(turn["content"], str) else json.dumps(turn["content"], indent=1))
        for turn in prompt
    ]


def _decimals(value: float | None, digits: str) -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, digits)


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_setting, value))
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
