"""What the settings leave open (`None`), resolved from what else is known."""

from __future__ import annotations

import copy
import os
from typing import Any

from ..algorithm.samplers import Sampler
from .validation import COUNT, MORE_IS_BETTER, check_target, chooses_target

BATCHES = ("per_device_train_batch_size", "gradient_accumulation_steps")
OPEN = ("tau_max", "greater_is_better", *BATCHES)
"""Settings that stay `None` until a trainer has them, so that a copy of the settings leaves them open, too."""

RUNGS_PER_BUDGET = 10
"""Rungs that the budget of objective calls is laid out for, if no draw repeats."""
FEWEST_RUNGS = 4
"""Rungs of two draws per prompt that the budget must pay for; otherwise rungs make one."""
DRAWS_PER_RUNG = 1024
"""Proposals per rung over all prompts, without a budget; with one, per prompt, at most."""
ROWS_PER_UPDATE = 128
"""Training rows per optimizer update for draws by weight, most of which count for little: few are a noisy gradient."""
ROWS_PER_BATCH = 8
"""Rows per batch and process, as in `TrainingArguments`."""
TOKENS_PER_BATCH = 1024
"""Most tokens of a batch, padding included, that has more rows than that. Batches of short texts take their time for
the calls of each layer and not for its arithmetic; this many need some tens of MiB per layer of width 1,000."""


def proposals_per_prompt(budget: int | None, prompts: int, chain_length: int | None) -> int:
    """n, the number of proposals per prompt per rung, for `num_generations=None`.

    Args:
        budget: `max_objective_calls`.
        prompts: that a rung draws for.
        chain_length: M, the length of the chains that n divides into (1 without chains); `None` for the paper's
            `n = m³`.
    """
    draws = DRAWS_PER_RUNG if budget is None else budget // RUNGS_PER_BUDGET
    # One draw for a prompt has no error, and no run would know when it is done.
    least = 2 if budget is None or budget >= 2 * prompts * FEWEST_RUNGS else 1
    n = max(least, min(DRAWS_PER_RUNG, draws // prompts))
    if chain_length is None:
        return int((n + 0.5) ** (1 / 3)) ** 3
    return max(chain_length, n // chain_length * chain_length)


def settled(settings: Any, prompts: int) -> Any:
    """A copy of an `ALDRIFTConfig` for a trainer with so many prompts, in which nothing is left open.

    Raises:
        ValueError: for a setting that was changed to what is not allowed after the config was made.
    """
    copied = copy.copy(settings)
    if not (copied.bf16 or copied.fp16):  # Accelerate computes in what was launched, whatever the settings say
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        copied.bf16, copied.fp16 = launched == "bf16", launched == "fp16"
    copied.settle()
    copied.check()
    copied.num_generations = copied.proposals_for(min(prompts, copied.prompts_per_rung or prompts))
    return copied


def settle(settings: Any, sampler: type[Sampler]) -> list[str]:
    """Give what is `None` of `OPEN` a value.

    Args:
        settings: are changed. `fills_batches` says whether an update may also be made of fewer and larger batches
            ([`fill_batches`]): where nothing was asked for.
        sampler: theirs.

    Returns:
        The names of those that were `None`.

    Raises:
        ValueError: for several settings that each choose T, and for failures that have no cost.
    """
    check_target(settings)
    left_open = [name for name in OPEN if getattr(settings, name) is None]
    if settings.tau_max is None and not chooses_target(settings):
        settings.tau_max = 1.0
    if settings.greater_is_better is None and settings.metric_for_best_model is not None:
        settings.greater_is_better = settings.metric_for_best_model.removeprefix("eval_") in MORE_IS_BETTER
    settings.fills_batches = sampler.draws_by_weight and {*BATCHES} <= {*left_open}
    if settings.per_device_train_batch_size is None:
        settings.per_device_train_batch_size = ROWS_PER_BATCH
    if settings.gradient_accumulation_steps is None and COUNT.holds(rows := settings.per_device_train_batch_size):
        settings.gradient_accumulation_steps = rows_to_accumulate(sampler, rows)
    return left_open


def fill_batches(settings: Any, width: int) -> None:
    """Make an update's rows up of fewer and larger batches, if its texts are short.

    Args:
        settings: are changed.
        width: tokens of the longest prompt and completion together.
    """
    rows, batches = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    while batches % 2 == 0 and 2 * rows * width <= TOKENS_PER_BATCH:
        rows, batches = 2 * rows, batches // 2
    settings.per_device_train_batch_size, settings.gradient_accumulation_steps = rows, batches


def rows_to_accumulate(sampler: type[Sampler], rows: int) -> int:
    """Batches per update, for `gradient_accumulation_steps=None`.

    Args:
        sampler: the settings' sampler; one that does not draw by weight has few samples, and one batch is an update.
        rows: per batch and process. Accelerate is not yet connected, so their number is what the launcher announced.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return max(1, ROWS_PER_UPDATE // (rows * processes)) if sampler.draws_by_weight else 1


def loss_name(asked: str | None, sampler: Sampler | type[Sampler]) -> str:
    """The loss's name, for a `loss_type` of `asked`, by what kind of samples the sampler makes."""
    return asked or ("generalized_kl" if sampler.draws_by_weight else "nll")


def ladder_name(asked: str | None, tau_step: float | None, sampler: Sampler | type[Sampler]) -> str:
    """The ladder's name, for a `ladder` of `asked`: the paper's, unless the weights of all draws are at hand."""
    return asked or ("adaptive" if sampler.draws_by_weight and tau_step is None else "linear")
