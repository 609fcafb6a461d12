"""Checks of the settings, before anything is loaded.

ALDRIFT's own settings are checked by their annotations (`huggingface_hub.dataclasses`) and against each other. Those of
`TrainingArguments` are `transformers`' to check; only what would silently break a rung is refused here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, fields
from typing import Annotated, Any, NamedTuple, Protocol, Union, get_args, get_origin, get_type_hints

from huggingface_hub.dataclasses import type_validator
from transformers import TrainingArguments

from ..algorithm.goals import GOALS
from ..algorithm.ladders import LADDERS, Ladder, LadderState
from ..algorithm.ladders.base import LadderSettings
from ..algorithm.losses import LOSSES, Loss
from ..algorithm.samplers import SAMPLERS, Sampler

MAX_COUNT = 2**31 - 1
"""The largest number of anything that is counted; a typing error rather than a wish above it."""


class Rule(NamedTuple):
    """What a value of the right type must also be: in words, and as a test."""

    wanted: str
    holds: Callable[[Any], bool]

    def __repr__(self) -> str:  # in the documentation's signatures
        return repr(self.wanted)


def _is_mapping(value: Any) -> bool:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return False
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


COUNT = Rule(f"between 1 and {MAX_COUNT:,}", lambda value: 1 <= value <= MAX_COUNT)

Count = Annotated[int, COUNT]
WindowSize = Annotated[int, Rule(f"between 2 and {MAX_COUNT:,}", lambda value: 2 <= value <= MAX_COUNT)]
Positive = Annotated[float, Rule("positive and finite", lambda value: 0 < value < math.inf)]
NotNegative = Annotated[float, Rule("at least 0 and finite", lambda value: 0 <= value < math.inf)]
Share = Annotated[float, Rule("greater than 0 and less than 1", lambda value: 0 < value < 1)]
Weights = Annotated[
    list[float], Rule("finite and at least 0", lambda weights: all(0 <= weight < math.inf for weight in weights))
]
Kwargs = Annotated[  # a Union, because HfArgumentParser cannot read X | Y on Python 3.10
    Union[dict[str, Any], str],  # noqa: UP007
    Rule("a mapping, or the JSON text of one", _is_mapping),
]

METRICS = (
    *("objective", "objective_best", "success", "distinct", "ess", "khat", "log_z", "kl", "kl_forward"),
    "missing_mass",
)
"""What [`ALDRIFTTrainer.evaluate`] measures; `metric_for_best_model` is one of these."""
MORE_IS_BETTER = ("success", "distinct", "ess")

_SILENT_BREAKAGE = {
    "auto_find_batch_size": "changes the number of updates in the middle of a rung. Set per_device_train_batch_size.",
    "dataloader_persistent_workers": "keeps serving the first rung's samples on every later rung. Leave it off.",
    "ignore_data_skip": "makes a resumed run learn from the samples of a rung's beginning twice. Leave it off.",
    "label_smoothing_factor": "changes the distribution that the loss is minimised by. Leave it at 0.",
    "neftune_noise_alpha": "adds noise to the embeddings, so that log q in training is not the one that is scored. "
    "Leave it out.",
    "remove_unused_columns": "removes columns that the loss needs. Leave it off.",
    "bf16_full_eval": "casts the trained model's weights whenever it is evaluated. Use bf16=True (autocast).",
    "fp16_full_eval": "casts the trained model's weights whenever it is evaluated. Use fp16=True (autocast).",
}
"""Settings of `TrainingArguments` that must be off, and why: with them on, nothing fails and the result is wrong."""


# ---- One setting at a time -------------------------------------------------------------------------------------------


def own_fields(settings: type[Any]) -> list[Field[Any]]:
    """The fields that a class of settings has beyond those of `TrainingArguments`."""
    inherited = {field.name for field in fields(TrainingArguments)}
    return [field for field in fields(settings) if field.name not in inherited]


def check_fields(settings: TrainingArguments, declared_by: type[Any]) -> None:
    """Check the type and the range of each of ALDRIFT's own settings.

    Args:
        settings: the settings.
        declared_by: the class whose annotations count: not that of `settings`, which may be a user's subclass.

    Raises:
        ValueError: with the setting's name, what is allowed, what was given, and the help text.
    """
    hints = get_type_hints(declared_by, include_extras=True)
    for field in own_fields(declared_by):
        value, (hint, optional, rules) = getattr(settings, field.name), _allowed(field, hints[field.name])
        if value is None and optional:
            continue
        try:
            type_validator(field.name, _numbers_as_floats(value, hint), hint)
            wanted = next((rule.wanted for rule in rules if not rule.holds(value)), None)
        except (TypeError, OverflowError):
            kind = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
            wanted = f"of type {kind.replace('typing.', '')}"
        if wanted is not None:
            explanation = field.metadata["help"].replace("%%", "%")
            raise ValueError(f"{field.name} must be {wanted}, got {value!r}. {field.name}: {explanation}")


def _allowed(field: Field[Any], hint: Any) -> tuple[Any, bool, list[Rule]]:
    """What a field's values may be: their type, whether `None` is allowed too, and further rules."""
    optional = type(None) in get_args(hint)
    if optional:
        (hint,) = (kind for kind in get_args(hint) if kind is not type(None))
    hint, *rules = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if "choices" in field.metadata:
        choices: Collection[str] = field.metadata["choices"]
        rules.append(Rule(f"one of {', '.join(choices)}", lambda value: value in choices))
    return hint, optional, rules


def _numbers_as_floats(value: Any, hint: Any) -> Any:
    """A whole number is good for a float (PEP 484), which `type_validator` does not know."""
    if hint is float and type(value) is int:
        return float(value)
    if hint == list[float] and isinstance(value, list):
        return [_numbers_as_floats(each, float) for each in value]
    return value


# ---- T ---------------------------------------------------------------------------------------------------------------


def chooses_target(settings: Any) -> bool:
    """Whether T is to be found (of `ALDRIFTConfig`)."""
    return any(getattr(settings, name) is not None for name in GOALS)


def check_target(settings: Any) -> None:
    """Check that T is given in one way at most, and D where failures cost it.

    Raises:
        ValueError: with the settings that contradict each other.
    """
    given = [name for name in ("tau_max", *GOALS) if getattr(settings, name) is not None]
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} each choose T, the inverse temperature of the target. Set one of them."
        )
    if settings.objective_on_error == "worst" and settings.objective_range is None:
        raise ValueError(
            "objective_on_error='worst' gives failures the cost objective_range, which is not set. Set it."
        )


# ---- Settings that must fit each other -------------------------------------------------------------------------------


def name_of(part: Any, registry: Mapping[str, type[Any]]) -> str:
    """A part's name in its registry; the name of its class where it is the user's own.

    Args:
        part: a sampler, ladder, loss or engine, or the class of one.
        registry: names of the built-in classes.
    """
    kind = part if isinstance(part, type) else type(part)
    return next((name for name, registered in registry.items() if registered is kind), kind.__name__)


class PartsSettings(LadderSettings, Protocol):
    """The settings that must fit the algorithm's parts (of `ALDRIFTConfig`)."""

    objective_range: float | None
    pareto_smoothing: bool
    chain_length: int | None

    @property
    def steps_per_chain(self) -> int:
        """M, proposals per chain."""
        ...

    @property
    def num_chains(self) -> int:
        """m, chains per prompt per rung."""
        ...


def check_parts(
    settings: PartsSettings, sampler: Sampler | type[Sampler], ladder: Ladder | type[Ladder], loss: Loss | type[Loss]
) -> None:
    """Check that sampler, ladder and loss work together, and the sampler's chains with the number of proposals.

    Args:
        settings: the settings.
        sampler, ladder, loss: those of the run: classes, or instances of the user's own.

    Raises:
        ValueError: with the settings that contradict each other, and which of them to change.
    """
    if sampler.uses_chains:
        _check_chains(settings, getattr(sampler, "chain_length", None))
        if sampler.redraws and settings.steps_per_chain == 1:
            raise ValueError(
                f"chain_length=1 leaves the chains of sampler={name_of(sampler, SAMPLERS)!r} without a move, and so "
                "nothing would be corrected. Set chain_length to at least 2."
            )
    if loss.needs_weighted_draws and not sampler.draws_by_weight:
        raise ValueError(
            f"loss_type={name_of(loss, LOSSES)!r} needs samples drawn in proportion to known weights, and "
            f"sampler={name_of(sampler, SAMPLERS)!r} does not draw by weight. Use sampler='archive', or "
            "loss_type='nll'."
        )
    if chooses_target(settings) and not sampler.corrects:
        raise ValueError(
            f"{', '.join(GOALS)} find T from the weights, and sampler={name_of(sampler, SAMPLERS)!r} has none. Set "
            "tau_max, or use sampler='archive' or 'metropolis_hastings'."
        )
    if ladder.uses_weights and not sampler.corrects:
        raise ValueError(
            f"ladder={name_of(ladder, LADDERS)!r} takes its steps by the weights, and "
            f"sampler={name_of(sampler, SAMPLERS)!r} has none. Use ladder='linear', or sampler='archive' or "
            "'metropolis_hastings'."
        )


def check_settings_of_parts(settings: PartsSettings, sampler: type[Sampler], ladder: type[Ladder]) -> None:
    """Check the settings that only some samplers and ladders read.

    Raises:
        ValueError: for a setting that has no effect, or that makes a ladder of too many rungs; with the remedy.
    """
    if settings.pareto_smoothing and not sampler.draws_by_weight:
        raise ValueError(
            "pareto_smoothing smooths the weights that samples are drawn by, and "
            f"sampler={name_of(sampler, SAMPLERS)!r} does not draw by weight. Leave it off, or use sampler='archive'."
        )
    if settings.tau_step is not None and not ladder.takes_step:
        raise ValueError(
            f"tau_step={settings.tau_step} has no meaning for ladder={name_of(ladder, LADDERS)!r}, which finds its own "
            "steps. Leave tau_step out, or use ladder='linear'."
        )
    if ladder.takes_step and (settings.tau_step or settings.objective_range):
        start = LadderState.start(1, settings.tau_max, settings.objective_range)
        ladder.from_settings(settings).num_rungs(start)  # raises for too many


def _check_chains(settings: PartsSettings, own: int | None) -> None:
    """Check that n is a multiple of M: of the settings', and of that of a sampler of the user's own."""
    n = settings.proposals
    for steps in (settings.steps_per_chain, own or 1):
        if n % steps == 0:
            continue
        wanted, near = f"a multiple of chain_length={steps}", max(1, n // steps) * steps
        if own != steps and settings.chain_length is None:
            wanted, near = "a cube with chain_length=None, the paper's M = m²", round(n ** (1 / 3)) ** 3
        raise ValueError(
            f"num_generations must be {wanted}, so that a rung's proposals divide into chains of equal length; got "
            f"{n}. Set it to {near}, or change chain_length{' of the sampler' * (own == steps)}."
        )


# ---- Settings of TrainingArguments -----------------------------------------------------------------------------------


def check_trainer_settings(settings: TrainingArguments) -> None:
    """Refuse settings of `TrainingArguments` that would silently break a rung or change what is learned.

    Raises:
        ValueError: with the setting's name, what it would do, and what to set in its place.
    """
    if settings.num_train_epochs != TrainingArguments.num_train_epochs:
        raise ValueError(
            f"num_train_epochs={settings.num_train_epochs!r} has no meaning here: one epoch is one rung of the ladder. "
            "Set num_rungs, the number of rungs, or leave it out: the run then ends by itself."
        )
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):  # the length of a rung is made of them
        value = getattr(settings, name)
        if type(value) is not int or not COUNT.holds(value):
            raise ValueError(f"{name} must be a whole number {COUNT.wanted}, got {value!r}")
    for name, effect in _SILENT_BREAKAGE.items():
        if getattr(settings, name):
            raise ValueError(f"{name}={getattr(settings, name)!r} {effect}")
    if settings.world_size > 1 and not settings.average_tokens_across_devices:
        raise ValueError(
            "average_tokens_across_devices=False lets each process divide its loss by the tokens of its own rows, so "
            "that what is learned depends on the number of processes. Leave it on."
        )
    if settings.accelerator_config.split_batches:
        raise ValueError(
            "accelerator_config: split_batches=True changes the number of updates per rung. Leave it off, and divide "
            "per_device_train_batch_size by the number of processes."
        )
    metric = settings.metric_for_best_model
    if metric is not None and settings.eval_strategy != "no" and chooses_target(settings):
        raise ValueError(
            f"metric_for_best_model={metric!r} has no value before T is found ({', '.join(GOALS)}). Set tau_max, or "
            "leave it out."
        )
    if metric is not None and settings.eval_strategy != "no" and metric.removeprefix("eval_") not in METRICS:
        left_out = " (transformers' default)" if metric == "loss" and settings.load_best_model_at_end else ""
        raise ValueError(
            f"metric_for_best_model must be one of {', '.join(METRICS)}, which evaluate() measures, such as 'kl'; got "
            f"{metric!r}{left_out}"
        )
