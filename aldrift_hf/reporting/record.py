"""The record of a run: its settings, the metrics of every rung and the newest draws, in memory and in three files.

In a run's output directory, `run.json` holds the settings and the results, `rungs.jsonl` one line per rung and
`draws.jsonl` one line per draw. Each file is written completely under another name and then renamed, so that a reader
never finds half a file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from torch import Tensor

from ..types import Prompts, Proposals
from .inline import run_as_html

T = TypeVar("T")

RUN_FILE, RUNGS_FILE, DRAWS_FILE = "run.json", "rungs.jsonl", "draws.jsonl"
MAX_DRAWS = 1000
"""Number of draws that are kept; of more, every second, third, … is."""
MAX_PROMPTS = 200
"""Number of prompts whose metrics are kept: those whose model is farthest from the target."""


@dataclass
class RunRecord:
    """The result of a run, `trainer.record`. [`read`] loads it from the run's output directory.

    `T` is the target's inverse temperature `tau_max`, `τ` that of a rung, `q` the model, `d` the cost, `D` its largest
    value and `Z_τ` the normalising constant of `p_τ(s) = L(s)·exp(-τ·d(s)) / Z_τ`, where `L` is the prior.

    Attributes:
        settings: what was asked for: names of the base model, the costs, `sampler`, `ladder`, `loss` and `engine`,
            ALDRIFT's own settings, of the Trainer's the learning rate, its course, batch sizes, precision and seed, and
            versions. `settings["loaded"]` is the model's revision and precision, `settings["objective_range"]` is
            `None` if it was not given. The adapter's modules are not in it.
        objective_range: D, in units of the cost: as given, or else as measured on the first rung's proposals (`None`
            before that).
        finished: whether training has ended.
        ended_by: why, as a sentence; empty before.
        metrics: metrics of the final model, named as in [`ALDRIFTTrainer.evaluate`], without prefix. Empty before the
            end, while T is not known, and if `max_objective_calls` left too few calls for it.
        tau_max: T: as given, or as it was found; `None` while it is not known.
        tau_max_error: the standard error of a T that was found; `None` for one that was given.
        log_z: the ladder's estimate of `log Z_τ` at the τ of the last rung that drew for the prompt, one per training
            prompt, nats.
        log_z_error: its standard error, likewise.
        prompt_tau: that τ, likewise; 0 for a prompt that no rung has drawn for.
        prior_row_scores: log-probabilities of a few short rows under the prior, nats, by which it is known again.
            `None` if they could not be computed.
        prior_costs: costs of the first rung's proposals (the prior's draws, if the model began as it), at most
            [`MAX_DRAWS`].
        prompt_metrics: metrics of the newest draws, one record per prompt, for the [`MAX_PROMPTS`] prompts with the
            largest `kl`: `prompt`, `objective` (mean cost), `success`, `ess`, `distinct` (shares), `log_z`, `kl`
            (KL(q‖p_τ)) and, of the final model, `missing_mass`; nats.
        rungs: one record per complete rung; means over prompts. Among them:

            - `rung` (index), `tau`, `draws` (per prompt), `objective_mean`, `objective_best`, `success` (share
              of proposals that cost `success_threshold` or less), `sample_objective_mean` (after the correction),
              `target_objective_mean` (weighted mean cost: that of `p_τ`);
            - `ess` (effective sample size as a share of the proposals), `khat`, `acceptance_rate` (of the chains),
              `log_z`, `log_z_increment`, `missing_mass`, `kl_to_prior` (KL(q‖L)), `target_kl_to_prior`
              (KL(p_τ‖L)), `kl_to_target` (KL(q‖p_τ)), all in nats where they are logarithms or divergences, per
              completion;
            - `log_z_error`, `missing_mass_error`, `kl_to_target_error`, `success_error`: standard errors of these;
            - `distinct_proposals`, `distinct_samples`, `diversity` ([`aldrift_hf.algorithm.diversity`]),
              `constant_cost` (share of prompts whose proposals all cost the same), `excluded` (share of proposals of
              prior probability 0), `completions/clipped_ratio`: shares;
            - `completions/mean_length` (tokens), `entropy` (nats per token), `loss` (mean over the rung's updates),
              `learning_rate` (the largest of them), `updates` (of the rung);
            - `proposals`, `objective_calls` (distinct completions evaluated), `num_tokens`: totals since the run began;
            - `engine/logprob_gap_mean`, `engine/logprob_gap_std`: the engine's `log q` less the scorer's, on a few
              draws of every batch, nats per completion;
            - `seconds_propose`, `seconds_score`, `seconds_objective`, `seconds_learn`: wall-clock time.
        draws: the newest draws of the model, at most [`MAX_DRAWS`], before any correction. Each has `prompt`,
            `completion`, `objective` (its cost), `log_prior`, `log_model` and, for the inverse temperature `tau`,
            `log_weight` = `log L - τ·d - log q` (nats) and `weight`, that weight as a multiple of the mean over all of
            the prompt's draws.
    """

    settings: dict[str, Any]
    objective_range: float | None = None
    finished: bool = False
    ended_by: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    tau_max: float | None = None
    tau_max_error: float | None = None
    log_z: list[float] = field(default_factory=list)
    log_z_error: list[float] = field(default_factory=list)
    prompt_tau: list[float] = field(default_factory=list)
    prior_row_scores: list[float] | None = None
    prior_costs: list[float] = field(default_factory=list)
    prompt_metrics: list[dict[str, Any]] = field(default_factory=list)
    rungs: list[dict[str, Any]] = field(default_factory=list)
    draws: list[dict[str, Any]] = field(default_factory=list)

    def take_draws(self, proposals: Proposals, prompts: Prompts, tau: float) -> None:
        """Set `draws` to these proposals (at most [`MAX_DRAWS`], evenly spaced), with their log-weights for `p_τ`."""
        columns = {
            "objective": proposals.objective,
            "log_prior": proposals.log_prior,
            "log_model": proposals.log_model,
            "log_weight": proposals.log_weight(tau),
            "weight": proposals.log_weight(tau).softmax(-1) * proposals.objective.shape[-1],
        }
        numbers: dict[str, Tensor] = {name: column.flatten() for name, column in columns.items()}
        texts = cast(list[str], proposals.texts)
        self.draws = [
            {
                "prompt": prompts.rows[int(proposals.rows[i])]["prompt"],
                "completion": texts[i],
                **{name: column[i].item() for name, column in numbers.items()},
                "tau": tau,
            }
            for i in evenly(range(len(texts)), MAX_DRAWS)
        ]

    def _repr_html_(self) -> str:
        return run_as_html(self)

    def write(self, folder: str | Path) -> None:
        """Write the three files. `draws.jsonl` is left as it is while there are no draws, as after resuming a run."""
        folder = Path(folder)
        if self.draws:
            replace_file(folder / DRAWS_FILE, map(_line, self.draws))
        replace_file(folder / RUNGS_FILE, map(_line, self.rungs))
        run = {name: value for name, value in vars(self).items() if name not in ("rungs", "draws")}
        replace_file(folder / RUN_FILE, [json.dumps(finite(run), indent=2)])

    @classmethod
    def read(cls, folder: str | Path) -> RunRecord:
        """Load what [`write`] wrote. Metrics that were NaN are left out.

        Raises:
            ValueError: if the folder is not the output directory of a run, or a file in it is damaged.
        """
        folder = Path(folder)
        missing = [name for name in (RUN_FILE, RUNGS_FILE, DRAWS_FILE) if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{folder} is not the output directory of a run: it has no {', '.join(missing)}. A run writes them "
                "when its first rung has been drawn."
            )
        run = _objects(folder / RUN_FILE, [(folder / RUN_FILE).read_bytes()])[0]
        rungs, draws = (
            _objects(folder / name, (folder / name).read_bytes().splitlines()) for name in (RUNGS_FILE, DRAWS_FILE)
        )
        try:
            metrics = _without_null(run.pop("metrics"))
            return cls(**run, metrics=metrics, rungs=[*map(_without_null, rungs)], draws=draws)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / RUN_FILE} is damaged: {error!r}") from error


def weights_of(draws: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """`[n]`, the `weight` of each draw; 0 where it is null, because no draw for the prompt has a weight."""
    return np.array([draw["weight"] or 0.0 for draw in draws])


def evenly(values: Sequence[T], most: int) -> list[T]:
    """Evenly spaced values, at most `most` of them."""
    return [*values[:: math.ceil(len(values) / most) or 1]]


def prompt_rows(proposals: Proposals, prompts: Prompts, columns: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """A record per prompt, with its `prompt` and its place in each column, `[P]`; the largest `kl` first."""
    return [
        {
            "prompt": prompts.rows[int(proposals.prompts[place])]["prompt"],
            **{name: column[place].item() for name, column in columns.items()},
        }
        for place in columns["kl"].argsort(descending=True).tolist()
    ]


def _objects(path: Path, lines: Iterable[bytes]) -> list[dict[str, Any]]:
    try:
        values = [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{path} is damaged: it holds something other than JSON objects")
    return values


def _without_null(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if value is not None}


def replace_file(path: Path, lines: Iterable[str]) -> None:
    """Write a text file under another name and rename it, so that no reader finds half of it."""
    temporary = path.with_name(f"_{path.name}")  # a push of the folder to the Hub leaves such names out
    temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(temporary, path)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(finite(row))


def finite(value: Any) -> Any:
    """The same with `null` for NaN and infinity, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [*map(finite, value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value
