"""The model card of a run: what its record holds, in words and numbers, and code that uses the model."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..algorithm.diagnostics import MISSING_MASS_WARNING
from . import health
from .record import RunRecord

TEMPLATE = Path(__file__).with_name("card.md.jinja")
FIGURE = "figures/ladder.png"
NOT_ON_THE_HUB = "path/to/the/base/model"
"""What stands in the card's code for a base model that has no id."""


def model_card(
    record: RunRecord,
    folder: str | Path,
    repo: str,
    *,
    name: str | None = None,
    base_model: str | None = None,
    tags: list[str] | None = None,
    **metadata: Any,
) -> ModelCard:
    """The card of a run.

    Args:
        record: the run so far.
        folder: where the card will lie; [`FIGURE`] is shown where it lies there, too.
        repo: the model's id on the Hub, or else the name of its folder.
        name: the card's title; `None` takes the last part of `repo`.
        base_model: id of the base model; `None` takes the record's where that is an id, and no path.
        tags: beside those that follow from the record.
        metadata: further entries of the card's header, as [`huggingface_hub.ModelCardData`] takes them.
    """
    settings = record.settings
    adapter = settings["tuning"] != "all parameters"
    base_model = base_model or hub_id(settings["base_model"])
    header = ModelCardData(
        base_model=base_model,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["aldrift", *(["peft", settings["tuning"].split()[0].lower()] if adapter else []), *(tags or [])],
        **metadata,
    )
    if base_model:
        header["base_model_relation"] = "adapter" if adapter else "finetune"
    prompt = record.draws[0]["prompt"] if record.draws else "text"
    card = ModelCard.from_template(
        header,
        template_path=str(TEMPLATE),
        name=name or repo.split("/")[-1],
        repo=repo,
        on_the_hub="/" in repo,
        what=_what(settings, base_model),
        target=_prose(health.target_in_words(record)),
        prior=settings["prior"],
        outcome=_prose(health.outcome(record)) if record.rungs else "",
        warnings=[*map(_prose, health.warnings(record))],
        results=_results(record),
        settings=_settings(record),
        figure=FIGURE if (Path(folder) / FIGURE).is_file() else None,
        adapter=adapter,
        frozen_adapter=settings["prior"] != "the base model",
        four_bit="4 bits" in settings["tuning"],
        base_model=base_model,
        base=base_model or NOT_ON_THE_HUB,
        prompt="chat" if isinstance(prompt, list) else "text" if prompt else "none",
        max_completion_length=settings["max_completion_length"],
        costs=", ".join(f"`{name}`" for name in settings["objective"]),
        arguments=_arguments(settings),
        khat_warning=health.KHAT_WARNING,
        missing_mass_warning=MISSING_MASS_WARNING,
    )
    return cast(ModelCard, card)


def hub_id(name: str | None) -> str | None:
    """The name where it is an id on the Hub; `None` for a folder of this machine, or for no name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if name is None or os.path.exists(name) else name


def _what(settings: dict[str, Any], base_model: str | None) -> str:
    known = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"a {settings['architecture']}"
    if settings["tuning"] == "all parameters":
        return f"This model is {known}, fine-tuned in all parameters to draw from a target p_T."
    return f"This {settings['tuning']} turns {known} into a model that draws from a target p_T."


def _results(record: RunRecord) -> str:
    """A table: the prior's figures on the first rung, and the final model's, or of that which drew the last rung."""
    if not record.rungs:
        return ""
    prior, last = record.rungs[0], record.rungs[-1]
    model = record.metrics or {**last, "objective": last["objective_mean"], "distinct": last["distinct_proposals"]}
    rows = [
        ("mean cost", f"{prior['objective_mean']:.4g}", _number(model, "objective", ".4g")),
        ("draws as good as any seen", f"{prior['success']:.1%}", _number(model, "success", ".1%")),
        ("distinct draws", f"{prior['distinct_proposals']:.1%}", _number(model, "distinct", ".1%")),
        ("effective sample size", "", _number(model, "ess", ".2f")),
        ("k-hat", "", _number(model, "khat", ".2f")),
        ("KL(model‖p_T), nats", "", _number(model, "kl", ".2f")),
        ("missing mass, nats", "", _number(model, "missing_mass", ".2f")),
    ]
    return _table(("", "prior", "model"), rows)


def _settings(record: RunRecord) -> str:
    asked = record.settings
    ladder = f"{asked['ladder']}, "
    if asked["ladder"] == "adaptive":
        ladder += f"effective sample size above {asked['ess_threshold']:.0%}"
    else:
        ladder += "steps of 1/D" if asked["tau_step"] is None else f"steps of {asked['tau_step']:g}"
    updates = "one pass" if asked["updates_per_rung"] is None else f"{asked['updates_per_rung']} updates"
    rows = asked["per_device_train_batch_size"] * asked["gradient_accumulation_steps"] * asked["processes"]
    table = [
        ("inverse temperature T", f"{asked['tau_max']:g}"),
        ("largest cost D", "not set" if asked["objective_range"] is None else f"{asked['objective_range']:g}"),
        ("ladder", ladder),
        ("sampler", f"`{asked['sampler']}`: {asked['num_chains']} chains of {asked['chain_length']} proposals"),
        ("cost", ", ".join(f"`{name}`" for name in asked["objective"])),
        ("prompts", str(asked["prompts"])),
        ("longest completion", f"{asked['max_completion_length']} tokens"),
        ("learning", f"{updates} a rung, {rows} rows each, learning rate {asked['learning_rate']:g}"),
        ("seed", str(asked["seed"])),
        ("versions", ", ".join(f"{name} {number}" for name, number in asked["versions"].items())),
    ]
    if record.rungs:
        last = record.rungs[-1]
        effort = f"{last['proposals']:,} proposals, {last['objective_calls']:,} distinct objective calls"
        table.insert(3, ("rungs", f"{len(record.rungs)}, up to inverse temperature {last['tau']:g}: {effort}"))
    return _table(("", ""), table)


def _arguments(settings: dict[str, Any]) -> str:
    names = ("tau_max", "num_chains", "chain_length", "max_completion_length", "objective_weights")
    return ", ".join(f"{name}={settings[name]!r}" for name in names if settings[name] is not None)


def _number(figures: dict[str, float], name: str, form: str) -> str:
    return f"{figures[name]:{form}}" if math.isfinite(figures.get(name, math.nan)) else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _prose(text: str) -> str:
    """Text with a cost's name in it that may be `<lambda>`, which a page would take for markup."""
    return text.replace("<", "\\<")
