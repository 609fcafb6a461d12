"""The run's parts, put together."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

from datasets import Dataset

from ..models import loading
from ..models.engines import Engine, EngineSettings
from ..models.prior import Prior, base_model
from ..models.slow_precision import warn_of_slow_bf16
from ..objective.objective import DEFAULT_BATCH_SIZE, Objective
from ..objective.protocol import CostFunction
from ..reporting.record import RunRecord
from ..types import Progress
from .config import ALDRIFTConfig
from .cycles import LAST_RUNG, updates_per_rung
from .inputs import Inputs
from .parts import Parts, engine_of, goal_of
from .rollout import Rollout, Runtime
from .run import Run
from .samples import RungSamples
from .settings import settings_of
from .state import RunState
from .training_rollout import TrainingRollout

SNAPSHOT_FOLDER = "_snapshots"
"""Folder in `output_dir` for models of earlier rungs that are too large for memory; the Trainer never pushes it."""


def make_objective(
    objective: CostFunction | list[CostFunction], args: ALDRIFTConfig, datasets: list[Dataset], progress: Progress
) -> Objective:
    """The objective of a run, able to take the columns of its data sets.

    Raises:
        TypeError, ValueError: for functions that cannot be called so.
    """
    made = Objective(
        objective,
        args.objective_weights,
        args.objective_range,
        batch_size=args.per_device_generation_batch_size or DEFAULT_BATCH_SIZE,
        on_error=args.objective_on_error,
        overlap=args.overlap_objective,
        output_dir=str(args.output_dir),
        cache_key=args.objective_cache_key,
        progress=progress,
    )
    for dataset in datasets:
        made.check_signature([name for name in dataset.column_names if name != "prompt"])
    return made


def make_run(
    args: ALDRIFTConfig,
    inputs: Inputs,
    parts: Parts,
    engine: Engine | None,
    prior: Prior,
    objective: Objective,
    runtime: Runtime,
    rows_per_update: int,
    can_skip: bool,
    tell: Callable[..., None],
    log: Callable[[dict[str, float]], None],
) -> Run:
    """A run at the bottom of its ladder; see [`Run`] and [`Rollout`] for the arguments.

    Args:
        rows_per_update: training rows per optimizer update, over all processes.
        can_skip: whether updates can be skipped, so that rungs can have different numbers of them.
    """
    policy, prompts, output_dir = runtime.policy(), inputs.prompts, str(args.output_dir)
    warn_of_slow_bf16(policy, args.bf16, args.device)
    eos_token_ids = inputs.eos_token_ids(base_model(policy))
    options = loading.mapping_of(args.engine_kwargs)
    for_engine = EngineSettings(args.max_completion_length, eos_token_ids, inputs.pad_token_id, options)
    engine = engine_of(args, for_engine, engine, policy)
    rollout = Rollout(args, runtime, prior, engine, objective, inputs.tokenizer, inputs.pad_token_id, eos_token_ids)
    snapshots = os.path.join(output_dir, SNAPSHOT_FOLDER)
    at_once = min(len(prompts), args.prompts_per_rung or len(prompts))
    one_pass = math.ceil(at_once * args.num_chains / rows_per_update)
    given = args.updates_per_rung or (None if parts.loss.needs_weighted_draws else one_pass)
    updates = given or updates_per_rung(at_once * args.proposals, rows_per_update)
    most = updates if given or not can_skip else LAST_RUNG * updates
    named: dict[str, Any] = {**vars(parts), "engine": engine}
    return Run(
        args=args,
        prompts=prompts,
        rollout=rollout,
        on_prompts=TrainingRollout(rollout, prompts, snapshots, prior.is_start),
        objective=objective,
        **vars(parts),
        goal=goal_of(args),
        eos_token_ids=eos_token_ids,
        samples=RungSamples(most * rows_per_update, prompts.token_ids),
        updates_per_rung=most,
        ordinary_updates=updates,
        record=RunRecord(
            settings_of(args, policy, prior, objective.names, prompts, inputs.tokenizer, **named),
            prior_row_scores=None if prior.row_scores is None else prior.row_scores.tolist(),
        ),
        tell=tell,
        log=log,
        state=RunState.start(len(prompts), args.tau_max, args.objective_range),
    )
