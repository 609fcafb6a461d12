"""What is printed for people to look at while a run goes on."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from .prompts import Prompts
from .rungs import Proposals


def print_completions(proposals: Proposals, log_weight: Tensor, prompts: Prompts, rung: int, tau: float) -> None:
    """The best and a random completion of a rung with their costs and log-weights, as a table."""
    best = int(proposals.objective.flatten().argmin())
    # By the rung, not by chance: looking at a run must not change its random numbers.
    any_one = (rung * 7919) % len(proposals.texts)
    table = Table(title=f"rung {rung}, tau = {tau:g}", show_lines=True)
    for name in ("", "prompt", "completion", "cost", "log-weight"):
        table.add_column(name, justify="right" if name in ("cost", "log-weight") else "left")
    for label, i in (("best", best), ("random", any_one)):
        cells = [str(prompts.rows[int(proposals.rows[i])]["prompt"]), proposals.texts[i]]
        numbers = [proposals.objective.flatten()[i].item(), log_weight.flatten()[i].item()]
        # escape(): a completion may hold what rich takes for markup.
        table.add_row(label, *map(escape, cells), *(f"{number:.4g}" for number in numbers))
    Console().print(table)


_COLUMNS = {
    "rung": ("rung", "d"),
    "tau": ("tau", ".3g"),
    "objective_mean": ("mean cost", ".3f"),
    "objective_best": ("best", ".3g"),
    "success": ("success", ".3f"),
    "acceptance_rate": ("accepted", ".2f"),
    "ess": ("ESS/n", ".2f"),
    "khat": ("k-hat", ".2f"),
    "missing_mass": ("missing mass", ".2f"),
    "distinct_proposals": ("distinct", ".2f"),
    "sft_loss": ("loss", ".2g"),
    "objective_calls": ("calls", "d"),
}


class LadderProgress(ProgressCallback):
    """The Trainer's progress bar over all updates, with a line of figures for every rung above it."""

    def __init__(self) -> None:
        super().__init__()
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
                tqdm.write("  ".join(f"{label:>{_width(label)}}" for label, _ in _COLUMNS.values()))
                self.header_printed = True
            cells = [
                f"{format(logs[key], spec) if key in logs else '-':>{_width(label)}}"
                for key, (label, spec) in _COLUMNS.items()
            ]
            tqdm.write("  ".join(cells))
        elif "loss" not in logs:  # an evaluation's or the run's last figures; the loss of single updates is for files
            figures = {key: format(value, ".4g") for key, value in logs.items() if isinstance(value, (int, float))}
            tqdm.write("  ".join(f"{key} {value}" for key, value in figures.items()))


def _width(label: str) -> int:
    return max(len(label), 6)
