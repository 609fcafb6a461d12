"""Steer a real chat model, SmolLM2-135M-Instruct, on four tasks, and measure how far each model is from p_T.

    python recipes/steer_text.py --make_gold                    # gold of all tasks: hours on one core
    python recipes/steer_text.py --make_gold --tasks tone       # of one: 25 minutes
    python recipes/steer_text.py                                # what the gold says, and the runs that are there
    python recipes/steer_text.py --run aldrift rloo --tasks tone --calls 2048 --learning_rates 5e-5 1e-4 2e-4

The tasks (recipes/problems/steering.py): *tone*, a restaurant review that is not full of praise; *word*, a text with a
rare word; *keywords*, short sentences with two given words, for 16 prompts; *instruction*, 16 prompts with an
instruction that a checker of IFEval decides.

Gold is made once and kept beside this file (recipes/gold/TASK.json): draws of the prior L with log L and cost. Weighted
by exp(-T·d), they are draws of p_T. So the mean cost under p_T, log Z and the distance KL(p_T‖q) of any model q are
means over gold, with standard errors. An interrupted --make_gold goes on from the file when it is run again.

--run compares methods with the same prior, adapter, calls and learning rates: aldrift; TRL's rloo and grpo, with
beta = 1/T; expert_iteration; dpg (distributional policy gradients); and, without learning, rejection and suffix_mh.
Each run has a process of its own, and its result is kept in --output_dir: run the command again to go on where it was
interrupted, or to see the tables of all results. At its end there is a table per task, and a figure.
"""

import functools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
import yaml
from evaluation import gold as golden
from evaluation import steering_runs, steering_table
from evaluation.drawing_gold import GoldMaker
from evaluation.gold import Gold
from evaluation.steering_setting import METHODS, PRECISIONS
from evaluation.tables import Comparison, publish
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
        metadata={"help": f"The prior. None: {HUB_ID}, made from a package on PyPI where it is not cached."},
    )
    run: list[str] = field(
        default_factory=list,
        metadata={"help": f"Methods to run, each at every learning rate: {', '.join(METHODS)}. Results are kept."},
    )
    calls: list[int] = field(
        default_factory=lambda: [2048], metadata={"help": "Completions whose cost a run evaluates, over all prompts."}
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [5e-5, 1e-4, 2e-4],
        metadata={"help": "Learning rates, constant; tables show each method's best by KL(p_T‖q) of the first seed."},
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Random seeds of the runs."})
    aldrift: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Settings of ALDRIFTConfig for the method aldrift, as NAME=VALUE: loss_type=nll sampler=reweight "
            "num_rungs=8. Tables have a row for each set of them."
        },
    )
    batch_size: int = field(default=32, metadata={"help": "Completions per update, of all methods."})
    lora: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Settings of LoraConfig for all methods that learn, as NAME=VALUE: r=1 lora_bias=true "
            "target_modules=[o_proj,down_proj] layers_to_transform=[10,11]. Default: rank 16, α 32, all linear layers."
        },
    )
    precision: str = field(
        default="fp32",
        metadata={
            "choices": [*PRECISIONS],
            "help": f"Precision in --run: {'; '.join(f'{name}, {text}' for name, text in PRECISIONS.items())}.",
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute layers again in the backward pass: less memory, a third more time."}
    )
    keep: float = field(default=0.25, metadata={"help": "Share of the draws that expert iteration learns from."})
    chain_length: int = field(default=32, metadata={"help": "Draws per chain of suffix_mh."})
    fresh_draws: int = field(
        default=256, metadata={"help": "Draws of a trained model that it is measured on, over all prompts."}
    )
    gold_share: float = field(
        default=0.99,
        metadata={
            "help": "A trained model scores the gold draws that carry this share of each prompt's weight under p_T; "
            "for the others the average of log q - log L is taken."
        },
    )
    threads: int = field(default=1, metadata={"help": "Threads of a run's process."})
    keep_models: bool = field(default=False, metadata={"help": "Keep the trained adapters beside the results."})
    output_dir: str = field(default="out/steer_text", metadata={"help": "Folder of results, tables and figure."})

    def __post_init__(self) -> None:
        for option, given, known in (("tasks", self.tasks, TASKS), ("run", self.run, METHODS)):
            if unknown := sorted({*given} - {*known}):
                raise ValueError(f"--{option} {' '.join(unknown)}: choose from {', '.join(known)}")
        for name in ("draws", "block", "batch_size", "chain_length", "fresh_draws", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1")
        if not 0 < self.keep <= 1:
            raise ValueError("--keep must be a share: above 0, and at most 1")
        if not 0.9 <= self.gold_share <= 1:
            raise ValueError("--gold_share must be from 0.9 to 1: KL(p_T‖q) would be that of a few draws")
        if any(calls % self.batch_size or calls < 2 * self.batch_size for calls in self.calls):
            raise ValueError(f"--calls must be multiples of --batch_size {self.batch_size}, and at least two of them")
        if any(rate <= 0 for rate in self.learning_rates):
            raise ValueError("--learning_rates must be above 0")
        for option in ("aldrift", "lora"):
            if wrong := [item for item in getattr(self, option) if "=" not in item]:
                raise ValueError(f"--{option} {' '.join(wrong)}: write settings as NAME=VALUE")


def named(items: list[str]) -> dict[str, Any]:
    """Settings that are given as NAME=VALUE."""
    return {name: number(value) for name, _, value in (item.partition("=") for item in items)}


def number(text: str) -> Any:
    """A value as YAML reads it; also 1e-4, which YAML takes for text."""
    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except ValueError:
        return yaml.safe_load(text)


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
    golds = {name: Gold.read(path) for name, path in paths.items()}
    describe(golds).print()
    failures = run(options) if options.run else []
    compare(golds, Path(options.output_dir))
    if failures:
        sys.exit("\n".join(failures))


def run(options: SteerArguments) -> list[str]:
    """Make the runs asked for that are not there; a line for each that failed."""
    shared = ("precision", "threads", "batch_size", "gradient_checkpointing", "fresh_draws")
    shared += ("gold_share", "keep", "chain_length")
    try:
        settings = steering_runs.grid(
            options.run,
            options.tasks,
            options.learning_rates,
            options.calls,
            options.seeds,
            named(options.aldrift),
            named(options.lora),
            model=options.model_name_or_path or str(real_model()),
            **{name: getattr(options, name) for name in shared},
        )
        folders = (Path(options.output_dir), Path(options.gold_dir))
        return steering_runs.make(settings, *folders, options.keep_models, functools.partial(print, flush=True))
    except (OSError, ValueError) as error:
        sys.exit(str(error))


def compare(golds: dict[str, Gold], folder: Path) -> None:
    """Print and write the tables and the figure of all results that are there."""
    try:
        found = {name: steering_runs.results(folder, [name]) for name in golds}
    except ValueError as error:
        sys.exit(str(error))
    found = {name: results for name, results in found.items() if results}
    if not found:
        return
    tau = {name: TASKS[name]().tau_max for name in found}
    tables = [
        table
        for name, results in found.items()
        for table in steering_table.tables(name, results, golds[name], tau[name])
    ]
    publish(tables, folder / "steer_text.md")
    steering_table.draw(folder / "steer_text.png", found, golds, tau)
    print(f"figure and tables: {folder}/steer_text.*")


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
