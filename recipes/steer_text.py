"""Steer a real chat model, SmolLM2-135M-Instruct, on four tasks, and measure how far each model is from p_T.

    python recipes/steer_text.py --make_gold                    # gold of all tasks: hours on one core
    python recipes/steer_text.py --make_gold --tasks tone       # of one: 25 minutes
    python recipes/steer_text.py                                # what the gold says

The tasks (recipes/problems/steering.py): *tone*, a restaurant review that is not full of praise; *word*, a text with a
rare word; *keywords*, short sentences with two given words, for 16 prompts; *instruction*, 16 prompts with an
instruction that a checker of IFEval decides.

Gold is made once and kept beside this file (recipes/gold/TASK.json): draws of the prior L with log L and cost. Weighted
by exp(-T·d), they are draws of p_T. So the mean cost under p_T, log Z and the distance KL(p_T‖q) of any model q are
means over gold, with standard errors. An interrupted --make_gold goes on from the file when it is run again.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np
from evaluation import gold as golden
from evaluation.drawing_gold import GoldMaker
from evaluation.gold import Gold
from evaluation.tables import Comparison
from problems.real_model import HUB_ID, real_model
from problems.steering import TASKS
from rich.console import Console
from trl import TrlParser

from aldrift_hf.models.loading import load_model, tokenizer_of
from aldrift_hf.reporting.progress import ProgressBars

GOLD = Path(__file__).parent / "gold"


@dataclass
class SteerArguments:
    """What is made and measured."""

    tasks: list[str] = field(default_factory=lambda: [*TASKS], metadata={"help": f"Tasks: {', '.join(TASKS)}."})
    make_gold: bool = field(default=False, metadata={"help": "Draw until each task's file has --draws draws."})
    draws: int = field(default=2048, metadata={"help": "Draws of the prior per task, over all of its prompts."})
    block: int = field(
        default=128, metadata={"help": "Draws that are made at once, over all prompts; the file grows by as many."}
    )
    seed: int = field(default=0, metadata={"help": "Random seed of the draws."})
    gold_dir: str = field(default=str(GOLD), metadata={"help": "Folder of the gold."})
    model_name_or_path: Optional[str] = field(
        default=None,
        metadata={"help": f"The prior, in fp32. None: {HUB_ID}, made from a package on PyPI where it is not cached."},
    )

    def __post_init__(self) -> None:
        if unknown := sorted({*self.tasks} - {*TASKS}):
            raise ValueError(f"--tasks {' '.join(unknown)}: choose from {', '.join(TASKS)}")
        for name in ("draws", "block"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1")


def main() -> None:
    try:
        (options,) = TrlParser(SteerArguments).parse_args_and_config()
    except ValueError as error:
        sys.exit(str(error))
    paths = {name: Path(options.gold_dir) / f"{name}.json" for name in options.tasks}
    if options.make_gold:
        make_gold(options, paths)
    missing = [str(path) for path in paths.values() if not path.exists()]
    if missing:
        sys.exit(f"there is no {' and no '.join(missing)}: make it with --make_gold, or leave the task out of --tasks")
    describe({name: Gold.read(path) for name, path in paths.items()}).print()


def make_gold(options: SteerArguments, paths: dict[str, Path]) -> None:
    """Draw what the files lack."""
    tasks = {name: TASKS[name]() for name in paths}
    for name, task in tasks.items():
        if options.draws < 2 * len(task.rows):
            sys.exit(f"--draws must be at least {2 * len(task.rows)} for {name}: two for each of its prompts")
    given = options.model_name_or_path
    try:
        name = given or str(real_model())
        tokenizer, model = tokenizer_of(name, None), load_model(name, None, adapter=False)
    except (OSError, ValueError) as error:
        # Where there is a Hub, the model need not come from the package.
        sys.exit(f"--model_name_or_path {given}: {error}" if given else f"{error}; or --model_name_or_path {HUB_ID}")
    progress = ProgressBars(Console()).progress
    for name, path in paths.items():
        try:
            GoldMaker(tasks[name], model, tokenizer, options.seed).make(path, options.draws, options.block, progress)
        except ValueError as error:
            sys.exit(str(error))


def describe(golds: dict[str, Gold]) -> Comparison:
    """What gold says of the priors and of p_T."""
    table = Comparison("gold: draws of the prior, and what they say of p_T", [*golds])
    rows: dict[str, dict[str, float]] = {}
    for name, gold in golds.items():
        cost, tau = gold.by_prompt(gold.cost), TASKS[name]().tau_max
        ess, solved = golden.effective_sample_size(cost, tau), (cost == 0).mean(-1)
        figures = {
            "T": tau,
            "prompts": cost.shape[0],
            "draws per prompt": cost.shape[1],
            "mean cost under the prior": golden.mean_cost(cost, 0.0),
            "mean cost under p_T": golden.mean_cost(cost, tau),
            "log Z, nats": golden.log_z(cost, tau),
            "KL(p_T‖L), nats": golden.kl_from_prior(cost, tau),
            "ESS per prompt": np.mean(ess),
            "ESS per prompt, least": np.min(ess),
            "share of cost 0 under the prior": solved.mean(),
            "share of cost 0 under the prior, least of a prompt": solved.min(),
        }
        for label, figure in figures.items():
            value, error = figure if isinstance(figure, tuple) else (figure, None)
            rows.setdefault(label, {})[name] = float(value)
            if error is not None:
                rows.setdefault(f"{label}, ± standard error", {})[name] = error
    for label, cells in rows.items():
        table.add(label, cells, ".3f" if "cost" in label or "nats" in label else ".4g")
    return table


if __name__ == "__main__":
    main()
