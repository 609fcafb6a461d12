"""`report.html`: a run on one page that needs no network."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..algorithm.diagnostics import MISSING_MASS_WARNING
from . import examples, figures, health, outcome
from .draw_figures import plots_of_draws
from .figure_style import PLOT_SIZE, Plot
from .numbers import with_error
from .record import MAX_PROMPTS, RunRecord, replace_file, weights_of

Picture = Callable[[Sequence[str], Sequence[float]], str]
"""`picture(completions, weights)`: HTML or SVG that shows weighted completions; the weights sum to 1.

The report shows it as it is, so it must escape what it takes from a completion. The page's policy lets it fetch nothing
and run no script.
"""

REPORT_FILE, LADDER_FILE = "report.html", "figures/ladder.png"

_FRAME = "width: 100%; height: 80vh; min-height: 400px; border: 1px solid #8888"
_HERE = Path(__file__).parent
_PIXELS_PER_INCH = 96
"""Of CSS."""
_PROMPT_START = 80
"""Number of characters of its prompt that a table shows."""


@dataclass(frozen=True)
class Report:
    """A run's report, which a notebook shows inline, in a frame: so its style does not reach the notebook's page.

    Attributes:
        record: the run.
        picture: how completions are shown, beside their text; `None` shows the text alone.
    """

    record: RunRecord
    picture: Picture | None = None

    def __repr__(self) -> str:
        return f"Report: {outcome.outcome(self.record)}"

    def _repr_html_(self) -> str:
        page = html.escape(render(self.record, self.picture))
        return f'<iframe srcdoc="{page}" sandbox="allow-scripts" title="Report" style="{_FRAME}"></iframe>'


def write_report(record: RunRecord, folder: str | Path, picture: Picture | None = None) -> None:
    """Write `report.html` and `figures/ladder.png` into a run's folder.

    The page is self-contained. Completions, prompts and names come from elsewhere and are treated as text: they are
    escaped, and the page's content security policy runs no script but ours and fetches nothing.
    """
    folder = Path(folder)
    figures.write_ladder(record, folder / LADDER_FILE)
    replace_file(folder / REPORT_FILE, [render(record, picture)])


def render(record: RunRecord, picture: Picture | None = None) -> str:
    """The page as HTML.

    Args:
        record: the run.
        picture: how completions are shown, beside their text; `None` shows the text alone.
    """
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": "{:,}".format, "decimals": _decimals, "setting": _setting, "key": json.dumps, "messages": _messages
    }  # fmt: skip
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    prompts = list({json.dumps(draw["prompt"]): draw["prompt"] for draw in record.draws}.values())
    width, height = (round(inches * _PIXELS_PER_INCH) for inches in PLOT_SIZE)
    return environment.get_template("report.html.jinja").render(
        record=record,
        title="ALDRIFT: " + " + ".join(record.settings["objective"]),
        outcome=outcome.outcome(record),
        target=outcome.target_in_words(record),
        warnings=health.run_warnings(record),
        checked=_checked(record),
        tiles=_tiles(record),
        sections=[
            ("draws", "Prior, model and target", [(plot, _data_url(plot)) for plot in plots_of_draws(record)]),
            ("ladder", "Along the ladder", [(plot, _data_url(plot)) for plot in figures.plots_along_ladder(record)]),
        ],
        plot_width=width,
        plot_height=height,
        prompts=[*map(_messages, prompts)],
        shared=_shared([*map(_messages, prompts)]),
        number_of={json.dumps(prompt): number for number, prompt in enumerate(prompts, start=1)},
        draws=record.draws,
        groups=examples.groups(record.draws) if record.draws else [],
        picture=picture,
        pictures=_pictures(record, picture) if picture and record.draws else [],
        by_prompt=record.prompt_metrics if len(record.prompt_metrics) > 1 else [],
        max_prompts=MAX_PROMPTS,
        prompt_start=_PROMPT_START,
        settings=_settings(record),
        style=(_HERE / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=f"sha256-{digest}",
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def _pictures(record: RunRecord, picture: Picture) -> list[tuple[str, str]]:
    """Of the newest draws as the model wrote them and, where they have weights, as the target has them."""
    texts = [draw["completion"] for draw in record.draws]
    weights = weights_of(record.draws)
    found = [("The model", picture(texts, [1 / len(texts)] * len(texts)))]
    return [*found, ("The target", picture(texts, (weights / weights.sum()).tolist()))] if weights.any() else found


def _data_url(plot: Plot) -> str:
    """The plot's image inside an URL."""
    return f"data:image/svg+xml;base64,{base64.b64encode(plot.svg().encode()).decode()}"


def _checked(record: RunRecord) -> list[str]:
    """The checks behind "no warnings"."""
    model = _newest(record)
    checks = {
        "missing_mass": f"missing mass (warning above {MISSING_MASS_WARNING:g} nats)",
        "khat": f"k-hat (above {health.MAX_KHAT:g})",
        "ess": f"effective draws per prompt (below {health.MIN_EFFECTIVE_DRAWS} and {health.MIN_ESS:.0%} of all)",
        "acceptance_rate": f"acceptance rate (below {health.MIN_ACCEPTANCE_RATE:.0%})",
    }
    return [text for name, text in checks.items() if math.isfinite(model.get(name, math.nan))]


def _newest(record: RunRecord) -> dict[str, Any]:
    """The newest metrics of the model: of the final model where measured, otherwise of the last rung's proposals."""
    last = record.rungs[-1] if record.rungs else {}
    of_proposals = {"objective": last.get("objective_mean"), "distinct": last.get("distinct_proposals")}
    return {**last, **of_proposals, **record.metrics}


def _tiles(record: RunRecord) -> list[tuple[str, str, str]]:
    """Key metrics: a label, the value, and what to compare it with."""
    if not record.rungs:
        return []
    model, prior = _newest(record), record.rungs[0]
    tiles: list[tuple[str, str, Callable[[float], str], str]] = [
        ("mean cost", "objective", "{:.3g}".format, f"prior: {prior['objective_mean']:.3g}"),
        ("success", "success", "{:.1%}".format, f"{outcome.success_in_words(record)}; prior: {prior['success']:.1%}"),
        (
            "target covered",
            "missing_mass",
            lambda nats: f"{outcome.covered_share(nats):.0%}",
            f"missing mass: {with_error(model, 'missing_mass', '.2f')} nats",
        ),
        ("distinct draws", "distinct", "{:.1%}".format, f"prior: {prior['distinct_proposals']:.1%}"),
        ("diversity", "diversity", "{:.2f}".format, f"prior: {_decimals(prior.get('diversity'), '.2f')}"),
        ("effective sample size", "ess", "{:.1%}".format, f"of {model['draws']:,} draws per prompt"),
        ("k-hat", "khat", "{:.2f}".format, f"reliable up to {health.MAX_KHAT}"),
        ("acceptance rate", "acceptance_rate", "{:.1%}".format, "of the last rung's chains"),
        ("inverse temperature τ", "tau", "{:.3g}".format, f"of T = {outcome.target_temperature(record)}"),
        ("distinct objective calls", "objective_calls", "{:,}".format, f"for {model['proposals']:,} proposals"),
    ]
    return [
        (label, show(model[name]), note)
        for label, name, show, note in tiles
        if math.isfinite(model.get(name, math.nan))
    ]


def _settings(record: RunRecord) -> dict[str, Any]:
    """Settings for people to read: without fingerprints, and with D as it was measured if it was not given."""
    left_out = ("versions", "vocabulary", "prompts_fingerprint")
    settings = {name: value for name, value in record.settings.items() if name not in left_out}
    if settings.get("objective_range") is None and record.objective_range is not None:
        settings["objective_range"] = f"not set; measured: {record.objective_range:g}"
    return settings


def _messages(prompt: Any) -> list[tuple[str, str]]:
    """A prompt as `(role, text)` pairs; plain text has no role."""
    if isinstance(prompt, str):
        return [("", prompt)]
    return [(turn["role"], _content(turn)) for turn in prompt]


def _content(turn: dict[str, Any]) -> str:
    """What a message says: its text, also in parts; or what else it has, as JSON."""
    content = turn.get("content")
    if isinstance(content, list) and all(part.get("type") == "text" for part in content):
        content = "\n".join(part["text"] for part in content)
    if isinstance(content, str):
        return content
    other = content or {name: value for name, value in turn.items() if name not in ("role", "content") and value}
    return json.dumps(other, indent=1, ensure_ascii=False)


def _shared(prompts: list[list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """The messages that all prompts begin with."""
    return [first for first, *_ in itertools.takewhile(lambda turns: len({*turns}) == 1, zip(*prompts, strict=False))]


def _decimals(value: float | None, digits: str) -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, digits)


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_setting, value))
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
