"""The callbacks that an [`ALDRIFTTrainer`] installs."""

from __future__ import annotations

from rich.console import Console
from transformers import TrainerCallback, TrainingArguments

from .callbacks import RunCallback
from .console import CompletionsTable, LadderLines
from .health import HealthWarnings
from .letters import print_every_letter
from .notebook import NotebookProgress
from .progress import ProgressBars
from .writers import ModelCardWriter, RecordWriter, ReportWriter


def default_callbacks(args: TrainingArguments) -> list[RunCallback]:
    """Record, report, model card and health warnings; and what `args` ask to be shown on the console.

    `disable_tqdm=True` leaves out progress bars and lines of metrics, and `log_completions=True` adds the table of
    completions. In a notebook, bars and lines are one output that is updated. All of them act on the first process
    only, and none depends on another one.
    """
    print_every_letter()
    console = Console()  # one for all, so that lines are printed above the bars
    callbacks: list[RunCallback] = [RecordWriter(), ReportWriter(), ModelCardWriter(), HealthWarnings()]
    if not args.disable_tqdm and console.is_jupyter:
        callbacks.append(NotebookProgress())
    elif not args.disable_tqdm:
        callbacks += [ProgressBars(console), LadderLines(console)]
    if args.log_completions:
        callbacks.append(CompletionsTable(console))
    return callbacks


def with_defaults(callbacks: list[TrainerCallback], args: TrainingArguments) -> list[TrainerCallback]:
    """The default callbacks, but for those of which the user passes one of his own, and the user's."""
    own = {type(callback) for callback in callbacks}
    return [*(callback for callback in default_callbacks(args) if type(callback) not in own), *callbacks]
