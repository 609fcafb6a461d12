"""The model card of a run: its record in words and numbers, and code that uses the model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..algorithm.diagnostics import MISSING_MASS_WARNING
from ..algorithm.goals import GOALS
from . import health, outcome
from .numbers import with_error
from .record import RunRecord

CARD_FILE = "README.md"
FIGURE = "figures/ladder.png"
PATH_TO_BASE_MODEL = "path/to/the/base/model"
"""Stands in the card's code for a base model that is not on the Hub."""

_TEMPLATE = Path(__file__).with_name("card.md.jinja")


def write_card(record: RunRecord, folder: str | Path, repo: str | None, **details: Any) -> None:
    """Write the model card of a run into a folder.

    Args:
        record: the run so far.
        folder: the folder to write to.
        repo: the model's id on the Hub; `None` takes the name of the folder.
        details: further arguments of [`model_card`].
    """
    folder = Path(folder)
    temporary = folder / f"_{CARD_FILE}"  # a push of the folder in the background leaves such names out
    model_card(record, folder, repo or folder.absolute().name, **details).save(temporary)
    temporary.replace(folder / CARD_FILE)


def model_card(
    record: RunRecord,
    folder: str | Path,
    repo: str,
    *,
    name: str | None = None,
    base_model: str | None = None,
    tags: str | list[str] | None = None,
    **metadata: Any,
) -> ModelCard:
    """The card of a run.

    Args:
        record: the run so far.
        folder: the folder that the card will lie in. The card shows [`FIGURE`] if it is there.
        repo: the model's id on the Hub, or the name of its folder.
        name: the card's title; `None` takes the last part of `repo`.
        base_model: id of the base model (of a GGUF file: `NAMESPACE/NAME/FILE.gguf`); `None` takes the record's if that
            is an id.
        tags: tags in addition to those that follow from the record.
        metadata: further entries of the card's header, as [`huggingface_hub.ModelCardData`] takes them.
    """
    settings, loaded = record.settings, record.settings["loaded"]
    init_kwargs = {"dtype": loaded["dtype"], "revision": loaded["model_revision"]}
    init_kwargs = {name: value for name, value in init_kwargs.items() if value not in ("float32", "main")}
    adapter_name = settings["adapter_name"]
    adapter = adapter_name is not None
    place_of_base, gguf_file = _place_of_base(base_model or settings["base_model"])
    base_model = place_of_base if base_model else hub_id(place_of_base)
    prompt = record.draws[0]["prompt"] if record.draws else "text"
    card = ModelCard.from_template(
        _header(settings, base_model, [tags] if isinstance(tags, str) else tags or [], metadata),
        template_path=str(_TEMPLATE),
        name=name or repo.split("/")[-1],
        repo=repo,
        on_the_hub="/" in repo,
        what=_what(settings, base_model),
        target=_escaped(outcome.target_in_words(record)),
        prior=settings["prior"],
        outcome=_escaped(outcome.outcome(record)) if record.rungs else "",
        warnings=[*map(_escaped, health.run_warnings(record))],
        results=_results(record),
        settings=_settings(record),
        figure=FIGURE if (Path(folder) / FIGURE).is_file() else None,
        adapter=adapter,
        subfolder=None if adapter_name in (None, "default") else adapter_name,  # PEFT saves other names in a subfolder
        prior_adapter=settings["prior_adapter"],
        dtype=loaded["dtype"],
        init_kwargs=init_kwargs,
        bits=next((bits for bits in (4, 8) if f"load_in_{bits}bit" in loaded), None),
        base_model=base_model,
        base=base_model or PATH_TO_BASE_MODEL,
        gguf_file=gguf_file,
        prompt="chat" if isinstance(prompt, list) else "text" if prompt else "none",
        max_completion_length=settings["max_completion_length"],
        costs=", ".join(f"`{cost}`" for cost in settings["objective"]),
        arguments=_arguments(settings),
        max_khat=health.MAX_KHAT,
        missing_mass_warning=MISSING_MASS_WARNING,
    )
    return cast(ModelCard, card)


def hub_id(name: str | None) -> str | None:
    """The name if it is an id on the Hub; `None` for a folder on this machine, or for no name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if name is None or os.path.exists(name) else name


def _place_of_base(name: str | None) -> tuple[str | None, str | None]:
    """The base model's id or folder and, where it is a GGUF file, the file's name in it."""
    if name is None or not name.lower().endswith(".gguf") or os.path.isdir(name):
        return name, None
    return os.path.dirname(name) or os.curdir, os.path.basename(name)


def _header(
    settings: dict[str, Any], base_model: str | None, tags: list[str], metadata: dict[str, Any]
) -> ModelCardData:
    adapter = settings["adapter_name"] is not None
    own_tags = ["aldrift", "peft", settings["tuning"].split()[0].lower()] if adapter else ["aldrift"]
    header = ModelCardData(
        base_model=base_model,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*own_tags, *tags],
        **metadata,
    )
    if base_model:
        header["base_model_relation"] = "adapter" if adapter else "finetune"
    return header


def _what(settings: dict[str, Any], base_model: str | None) -> str:
    base = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"a {settings['architecture']}"
    if settings["adapter_name"] is None:
        return f"This model is {base}, fine-tuned in all parameters to sample a target distribution p_T."
    return f"This {settings['tuning']} turns {base} into a model that samples a target distribution p_T."


def _results(record: RunRecord) -> str:
    """A table: metrics of the prior, from the first rung, and of the final model or else of the last rung's."""
    if not record.rungs:
        return ""
    prior, last = record.rungs[0], record.rungs[-1]
    model = record.metrics or {**last, "objective": last["objective_mean"], "distinct": last["distinct_proposals"]}
    rows = [
        ("mean cost", f"{prior['objective_mean']:.4g}", with_error(model, "objective", ".4g")),
        (f"draws {outcome.success_in_words(record)}", f"{prior['success']:.1%}", with_error(model, "success", ".1%")),
        ("distinct draws", f"{prior['distinct_proposals']:.1%}", with_error(model, "distinct", ".1%")),
        ("effective sample size", "", with_error(model, "ess", ".2f")),
        ("k-hat", "", with_error(model, "khat", ".2f")),
        ("KL(model‖p_T), nats", "", with_error(model, "kl", ".2f")),
        ("missing mass, nats", "", with_error(model, "missing_mass", ".2f")),
    ]
    return _table(("", "prior", "model"), rows)


def _settings(record: RunRecord) -> str:
    settings = record.settings
    updates = f"{settings['updates_per_rung']} updates per rung"
    if settings["updates_per_rung"] is None:
        made = [rung["updates"] for rung in record.rungs]
        updates = f"{min(made)} to {max(made)} updates per rung" if made else "a number of updates that is found"
    rows = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * settings["processes"]
    table = [
        ("inverse temperature T", outcome.target_temperature(record)),
        ("largest cost D", "not measured yet" if record.objective_range is None else f"{record.objective_range:g}"),
        ("ladder", _ladder(settings)),
        ("sampler", f"`{settings['sampler']}`, {settings['num_generations']:,} proposals per prompt per rung"),
        ("cost", ", ".join(f"`{name}`" for name in settings["objective"])),
        ("prompts", str(settings["prompts"])),
        ("longest completion", f"{settings['max_completion_length']} tokens"),
        (
            "training",
            f"loss `{settings['loss']}`, {updates}, {rows} rows per update, learning rate {_learning_rate(record)}",
        ),
        ("seed", str(settings["seed"])),
        ("versions", ", ".join(f"{name} {number}" for name, number in settings["versions"].items())),
    ]
    if record.rungs:
        last = record.rungs[-1]
        effort = f"{last['proposals']:,} proposals, {last['objective_calls']:,} distinct objective calls"
        table.insert(3, ("rungs", f"{len(record.rungs)}, up to inverse temperature {last['tau']:g}: {effort}"))
    return _table(("", ""), table)


def _ladder(settings: dict[str, Any]) -> str:
    step = "1/D" if settings["tau_step"] is None else f"{settings['tau_step']:g}"
    details = {
        "linear": f", steps of {step}",
        "adaptive": f", effective sample size above {settings['ess_threshold']:.0%}",
    }
    return f"{settings['ladder']}{details.get(settings['ladder'], '')}"


def _arguments(settings: dict[str, Any]) -> str:
    names = ("tau_max", *GOALS, "num_generations", "chain_length", "max_completion_length", "objective_weights")
    given = [name for name in names if settings[name] is not None] + ["success_threshold"] * (
        settings["success_threshold"] > 0
    )
    return ", ".join(f"{name}={settings[name]!r}" for name in given)


def _learning_rate(record: RunRecord) -> str:
    """The one that was set or found; before the first rung is learned, what is known of it."""
    asked = record.settings["learning_rate"]
    if asked is None and record.rungs and "learning_rate" in record.rungs[-1]:
        return f"{record.rungs[-1]['learning_rate']:.2g}, found by the first updates"
    return "of the optimizer passed, or found by the first updates" if asked is None else f"{asked:g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Text in which a cost may be named `<lambda>`, which Markdown would take for an HTML tag."""
    return text.replace("<", "\\<")
