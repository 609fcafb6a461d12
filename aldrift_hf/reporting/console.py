"""What a run prints on the console: a line of metrics per rung, and a table of completions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..types import Prompts, Proposals
from .callbacks import RunCallback
from .numbers import COLUMNS, cell, with_error
from .record import RunRecord

CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Control codes as they are written, so that a completion cannot steer the terminal."""

_METRICS = {
    "objective": ("mean cost {}", ".4g"),
    "success": ("success {}", ".3f"),
    "acceptance_rate": ("acceptance rate {}", ".2f"),
    "ess": ("ESS/n {}", ".2f"),
    "khat": ("k-hat {}", ".2f"),
    "missing_mass": ("missing mass {} nats", ".2f"),
    "kl": ("KL {} nats", ".2f"),
    "distinct": ("distinct {}", ".2f"),
}
"""Of an evaluation, or of corrected samples: the words, and the format of the number and of its standard error."""

_TITLES = {"sample": "samples", "final": "final model", "eval": "evaluation"}


def print_to_stderr(callbacks: Iterable[TrainerCallback]) -> None:
    """Make callbacks print to standard error, so that standard output holds results alone.

    Args:
        callbacks: the trainer's, `trainer.callback_handler.callbacks`; those without a console are left alone.
    """
    for callback in callbacks:
        if isinstance(console := getattr(callback, "console", None), Console):
            console.stderr = True


class LadderLines(RunCallback):
    """Prints a line of metrics for every rung, every evaluation and every set of samples.

    Args:
        console: the console to print to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._header_printed = False

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
            if not self._header_printed:
                self._print(" ".join(f"{header:>{width}}" for header, width, _ in COLUMNS.values()))
                self._header_printed = True
            cells = (f"{cell(logs.get(name), spec):>{width}}" for name, (_, width, spec) in COLUMNS.items())
            self._print(" ".join(cells))
        elif line := line_of(logs):
            self._print(line)

    def on_run_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        record: RunRecord,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            self._print(record.ended_by)

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def line_of(logs: dict[str, Any]) -> str | None:
    """What is logged about an evaluation, samples or the time of a run, as a line; `None` for other logs."""
    if "train_runtime" in logs:
        return f"trained in {logs['train_runtime']:,.0f} s"
    prefix = next((name.removesuffix("_objective") for name in logs if name.endswith("_objective")), None)
    if prefix is None:
        return None
    metrics = [
        words.format(with_error(logs, f"{prefix}_{name}", spec))
        for name, (words, spec) in _METRICS.items()
        if f"{prefix}_{name}" in logs
    ]
    return f"{_TITLES.get(prefix, prefix)}: {', '.join(metrics)}"


class CompletionsTable(RunCallback):
    """Prints a table of the best and of a random completion of every rung, with their costs and weights.

    Args:
        console: the console to print to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_rung_drawn(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        metrics: dict[str, Any],
        proposals: Proposals,
        prompts: Prompts,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        rung, tau, texts = metrics["rung"], metrics["tau"], cast(list[str], proposals.texts)
        best = int(proposals.objective.flatten().argmin())
        # A function of the rung: looking at a run must not change its random numbers.
        random = (rung * 7919) % len(texts)
        # As multiples of the prompt's mean: the model writes a draw of weight 1 as often as the target does.
        log_weight = proposals.log_weight(tau)
        weights = (log_weight.softmax(-1) * log_weight.shape[-1]).flatten()
        table = Table(title=f"rung {rung}, tau = {tau:g}", show_lines=True)
        for name in ("", "prompt", "completion", "cost", "weight"):
            table.add_column(name, justify="right" if name in ("cost", "weight") else "left")
        for label, i in (("best", best), ("random", random)):
            cells = [str(prompts.rows[int(proposals.rows[i])]["prompt"]), texts[i]]
            numbers = [proposals.objective.flatten()[i].item(), weights[i].item()]
            # escape(): rich would take square brackets in a completion for markup, and a terminal its control codes.
            shown = [escape(cell.translate(CONTROL)) for cell in cells]
            table.add_row(label, *shown, *(f"{number:.4g}" for number in numbers))
        self.console.print(table)
