"""What a run leaves in its output directory for people to look at: settings, rungs, and the newest draws.

`run.json` has the settings and how far the run came, `rungs.jsonl` one line a rung, `draws.jsonl` one line a draw.
Each file is written whole and renamed: what is on disk is always a run so far.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..types import Prompts, Proposals

RUN_FILE, RUNGS_FILE, DRAWS_FILE = "run.json", "rungs.jsonl", "draws.jsonl"
FILES_OF_LINES = RUNGS_FILE, DRAWS_FILE
MOST_DRAWS = 1000
"""Draws that are written down, evenly taken from all."""


@dataclass
class RunRecord:
    """A run as its files tell it.

    Attributes:
        settings: what was asked for: the model, the target, the ladder, the sampler, how it learns; versions.
        finished: whether training has ended.
        metrics: of the final model, as [`ALDRIFTTrainer.evaluate`] names them, without prefix; empty before the end and
            where `max_objective_calls` was spent.
        log_z: the ladder's `log Z_τ` of each prompt at the last rung's `τ`, nats.
        rungs: a record of each complete rung.
        draws: the newest draws of the model, up to [`MOST_DRAWS`]: `prompt`, `completion`, `objective`, `log_prior`,
            `log_model` and, for `tau`, `log_weight`; nats.
    """

    settings: dict[str, Any]
    finished: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    log_z: list[float] = field(default_factory=list)
    rungs: list[dict[str, Any]] = field(default_factory=list)
    draws: list[dict[str, Any]] = field(default_factory=list)

    def take_draws(self, proposals: Proposals, prompts: Prompts, tau: float) -> None:
        """Keep up to [`MOST_DRAWS`] draws, with their log-weights for `p_τ`."""
        columns = {
            "objective": proposals.objective,
            "log_prior": proposals.log_prior,
            "log_model": proposals.log_model,
            "log_weight": proposals.log_weight(tau),
        }
        numbers: dict[str, Tensor] = {name: column.flatten() for name, column in columns.items()}
        step = math.ceil(len(proposals.texts) / MOST_DRAWS)
        self.draws = [
            {
                "prompt": prompts.rows[int(proposals.rows[i])]["prompt"],
                "completion": proposals.texts[i],
                **{name: column[i].item() for name, column in numbers.items()},
                "tau": tau,
            }
            for i in range(0, len(proposals.texts), step)
        ]

    def write(self, folder: str | Path) -> None:
        """Write the three files; that of the draws only where there are any, for a resumed run has none at first."""
        folder = Path(folder)
        names = ("settings", "finished", "metrics", "log_z")
        run = {name: getattr(self, name) for name in names}
        if self.draws:
            replace_file(folder / DRAWS_FILE, map(_line, self.draws))
        replace_file(folder / RUNGS_FILE, map(_line, self.rungs))
        replace_file(folder / RUN_FILE, [json.dumps(_finite(run), indent=2)])

    @classmethod
    def read(cls, folder: str | Path) -> RunRecord:
        """The inverse of [`write`]; what was NaN is missing.

        Raises:
            ValueError: if the folder is not that of a run, or a file in it is damaged.
        """
        folder = Path(folder)
        missing = [name for name in (RUN_FILE, RUNGS_FILE, DRAWS_FILE) if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{folder} is not the output directory of a run: it has no {', '.join(missing)}. They are written when "
                "the first rung begins."
            )
        run = _objects(folder / RUN_FILE, [(folder / RUN_FILE).read_bytes()])[0]
        rungs, draws = (_objects(folder / name, (folder / name).read_bytes().splitlines()) for name in FILES_OF_LINES)
        try:
            metrics = _without_missing(run.pop("metrics"))
            return cls(**run, metrics=metrics, rungs=[*map(_without_missing, rungs)], draws=draws)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / RUN_FILE} is damaged: {error!r}") from error


def _objects(path: Path, lines: Iterable[bytes]) -> list[dict[str, Any]]:
    try:
        values = [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{path} is damaged: a line of it is no JSON object")
    return values


def _without_missing(figures: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in figures.items() if value is not None}


def replace_file(path: Path, lines: Iterable[str]) -> None:
    """Write a text file whole, so that no reader ever finds half of it."""
    temporary = path.with_name(f"_{path.name}")  # a name that a push of the folder to the Hub leaves out
    temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(temporary, path)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(_finite(row))


def _finite(value: Any) -> Any:
    """With `null` in place of what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
