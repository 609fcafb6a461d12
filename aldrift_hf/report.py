"""What is printed for people to look at while a run goes on."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

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



