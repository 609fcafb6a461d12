"""The algorithm's parts: those that the settings name, or instances of the user's own."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from ..algorithm.goals import Goal, KLBudget, TargetCost, TargetSuccess
from ..algorithm.ladders import LADDERS, Ladder
from ..algorithm.losses import LOSSES, Loss
from ..algorithm.samplers import SAMPLERS, Sampler
from ..models.engines import ENGINES, Engine, EngineSettings
from .config import ALDRIFTConfig
from .open_settings import ladder_name, loss_name
from .validation import check_parts, name_of

Part = TypeVar("Part")


@dataclass(frozen=True)
class Parts:
    """Sampler, ladder and loss of a run."""

    sampler: Sampler
    ladder: Ladder
    loss: Loss


def parts_of(
    args: ALDRIFTConfig, sampler: Sampler | None, ladder: Ladder | None, loss: Loss | None, engine: Engine | None
) -> Parts:
    """The parts of a run.

    Args:
        args: its settings, which name the parts that are not given.
        sampler, ladder, loss: instances; `None` takes the one that `args` names.
        engine: likewise; it must suit the sampler.

    Raises:
        TypeError: for an instance of the wrong class.
        ValueError: for parts that do not go together.
    """
    sampler = SAMPLERS[args.sampler].from_settings(args) if sampler is None else _checked("sampler", sampler, Sampler)
    if ladder is None:
        ladder = LADDERS[ladder_name(args.ladder, args.tau_step, sampler)].from_settings(args)
    ladder = _checked("ladder", ladder, Ladder)
    loss = LOSSES[loss_name(args.loss_type, sampler)]() if loss is None else _checked("loss", loss, Loss)
    check_parts(args, sampler, ladder, loss)
    if sampler.redraws:
        check_continues(ENGINES[args.engine] if engine is None else _checked("engine", engine, Engine), "sampler")
    return Parts(sampler, ladder, loss)


def goal_of(args: ALDRIFTConfig) -> Goal | None:
    """What T is chosen for; `None` where it is given."""
    if args.target_cost is not None:
        return TargetCost(args.target_cost)
    if args.target_success is not None:
        return TargetSuccess(args.target_success, args.success_threshold)
    return None if args.kl_budget is None else KLBudget(args.kl_budget)


def engine_of(args: ALDRIFTConfig, settings: EngineSettings, engine: Engine | None, policy: nn.Module) -> Engine:
    """The engine of a run: the instance given, or the one that `args` names.

    Raises:
        TypeError: for an instance of the wrong class.
        ValueError: for one that cannot draw with this policy.
    """
    engine = ENGINES[args.engine].from_settings(settings) if engine is None else _checked("engine", engine, Engine)
    engine.check(policy)
    return engine


def check_continues(engine: Engine | type[Engine], asked_by: str) -> None:
    """Check that an engine can continue texts.

    Args:
        engine: the engine, or its class.
        asked_by: what asks for it: `"sampler"` or `"correction"`.

    Raises:
        ValueError: if it cannot.
    """
    if "limits" not in inspect.signature(engine.generate).parameters:
        raise ValueError(
            f"this {asked_by} continues texts, and generate() of {name_of(engine, {})} has no argument `limits` to "
            f"end them in time. Add it (see aldrift_hf.models.engines.Engine), or choose another {asked_by}."
        )


def _checked(name: str, part: Part, wanted: type) -> Part:
    if not isinstance(part, wanted):
        raise TypeError(
            f"{name} must be an instance of a subclass of aldrift_hf.{wanted.__name__}, got {type(part).__name__}. To "
            f"take one by name, set it in ALDRIFTConfig."
        )
    return part
