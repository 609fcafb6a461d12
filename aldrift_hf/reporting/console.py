"""What is printed for people to look at while a run goes on."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..types import Prompts, Proposals

_COLUMNS = {
    "rung": ("rung", 4, "d"),
    "tau": ("tau", 5, ".3g"),
    "objective_mean": ("cost", 6, ".3g"),
    "objective_best": ("best", 4, ".3g"),
    "success": ("success", 7, ".3f"),
    "acceptance_rate": ("accept", 6, ".2f"),
    "ess": ("ESS/n", 5, ".2f"),
    "khat": ("k-hat", 5, ".2f"),
    "missing_mass": ("missing", 7, ".2f"),
    "distinct_proposals": ("distinct", 8, ".2f"),
    "sft_loss": ("loss", 6, ".2g"),
    "objective_calls": ("calls", 6, "d"),
}
"""Of a rung's record: what stands above a column, its width, its format. With a space between, 80 characters."""

_FIGURES = {
    "objective": "mean cost {:.4g}",
    "success": "success {:.3f}",
    "acceptance_rate": "accepted {:.2f}",
    "ess": "ESS/n {:.2f}",
    "khat": "k-hat {:.2f}",
    "missing_mass": "missing mass {:.2f} nats",
    "kl": "KL {:.2f} nats",
    "distinct": "distinct {:.2f}",
}
"""Of an evaluation or of corrected draws."""

_TITLES = {"sample": "draws", "final": "final model", "eval": "evaluation"}


class LadderLines(TrainerCallback):
    """A line of figures for every rung, and one for every evaluation and set of draws."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.header_printed = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or not state.is_world_process_zero:
            return
        if "rung" in logs:
            if not self.header_printed:
                self._print(" ".join(f"{label:>{width}}" for label, width, _ in _COLUMNS.values()))
                self.header_printed = True
            cells = (_cell(logs.get(key), width, spec) for key, (_, width, spec) in _COLUMNS.items())
            self._print(" ".join(cells))
        elif "train_runtime" in logs:
            self._print(f"trained in {logs['train_runtime']:,.0f} s")
        elif prefix := next((key.removesuffix("_objective") for key in logs if key.endswith("_objective")), None):
            figures = [
                text.format(logs[f"{prefix}_{key}"]) for key, text in _FIGURES.items() if f"{prefix}_{key}" in logs
            ]
            self._print(f"{_TITLES.get(prefix, prefix)}: {', '.join(figures)}")

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _cell(value: float | None, width: int, spec: str) -> str:
    return f"{'-' if value is None or not math.isfinite(value) else format(value, spec):>{width}}"


def print_completions(
    console: Console, proposals: Proposals, log_weight: Tensor, prompts: Prompts, rung: int, tau: float
) -> None:
    """The best and a random completion of a rung with their costs and weights, as a table.

    Args:
        console: where to.
        proposals: the rung's.
        log_weight: theirs at `tau`, `[P, n]`, nats.
        prompts: whose rows they answer.
        rung: its index.
        tau: its inverse temperature.
    """
    best = int(proposals.objective.flatten().argmin())
    # By the rung, not by chance: looking at a run must not change its random numbers.
    any_one = (rung * 7919) % len(proposals.texts)
    # A weight of 1 is that of a draw which is as likely under the target as under the model.
    weights = (log_weight.softmax(-1) * log_weight.shape[-1]).flatten()
    table = Table(title=f"rung {rung}, tau = {tau:g}", show_lines=True)
    for name in ("", "prompt", "completion", "cost", "weight"):
        table.add_column(name, justify="right" if name in ("cost", "weight") else "left")
    for label, i in (("best", best), ("random", any_one)):
        cells = [str(prompts.rows[int(proposals.rows[i])]["prompt"]), proposals.texts[i]]
        numbers = [proposals.objective.flatten()[i].item(), weights[i].item()]
        # escape(): a completion may hold what rich takes for markup.
        table.add_row(label, *map(escape, cells), *(f"{number:.4g}" for number in numbers))
    console.print(table)
