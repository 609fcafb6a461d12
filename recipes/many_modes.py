"""Several unlike molecules are known to be active: how near does one run come to every one of them?

    accelerate launch recipes/many_modes.py

The tasks are MolExp's (Thomas et al. 2025, arXiv 2501.19153; recipes/problems/many_modes.py): two to four ligands of a
target that have little in common. The score of a molecule is its similarity to the nearest one, and a run, which may
evaluate 10,000 distinct molecules, is judged by the product of the best similarities to each. The difficulty is that a
method which follows the score ends at one of them. So does p_T: the nearer the prior is to a ligand, the larger its
share, and the shares differ by many nats (the second table).

ALDRIFT is therefore run with a prompt for each ligand (prompts), after which the similarity to that one counts: one
model, one run and one budget, but a p_T for each prompt (it is spent on texts, where all others but the defaults count
molecules). With the same prompts, as a search (edited): the model learns from the best of what it draws, and of
mutations and crossovers of the best, searched for on a model of the similarities (--edits). Beside these: a genetic
algorithm on molecular graphs for each ligand, with equal shares of the budget (genetic_algorithms); and on the nearest
ligand, ALDRIFT without prompts (defaults), REINVENT's loss with sigma = T, TRL's RLOO with beta = 1/T, and the genetic
algorithm. Each has the setting of its grid that is best on the first task and seed. The prior is that of
recipes/molecules.py. Runs are kept in OUTPUT_DIR/runs.jsonl, and not made again.
"""

import itertools
import math
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from evaluation.baselines import policy_gradient
from evaluation.budgets import EvaluationBudget, Spent
from evaluation.figures import figure
from evaluation.kept_runs import Run, TunedRuns, settings_of
from evaluation.molecule_search import edited_top, evolve
from evaluation.reinvent import reinvent
from evaluation.tables import Comparison, mean_of, publish
from problems.many_modes import TASKS, ManyModesProblem, references, with_prompts
from problems.molecules import MoleculeModelConfig
from problems.training import RecipeConfig, left_open, make_trainer
from rich.console import Console
from trl import TrlParser

from aldrift_hf import EditedTop

METHODS = ("prompts", "defaults", "edited", "reinvent", "rloo", "genetic_algorithm", "genetic_algorithms")
BATCH = 64
"""Draws per update of REINVENT and RLOO."""
FIRST = 1000
"""Molecules that the genetic algorithm starts from."""
PER_RUNG, UPDATES = 48, 4
"""Of edited: proposals per prompt and updates per rung."""
LONGEST = 100
"""Of edited: tokens of a text. The prior's 1,000 random molecules, which the other methods' limit is from, have up to
63, and some ligands more."""
NEAR = 0.6
"""Similarity that is asked for."""


@dataclass
class ManyModesArguments:
    """What is compared."""

    tasks: list[str] = field(default_factory=lambda: [*TASKS], metadata={"help": f"Of: {', '.join(TASKS)}."})
    methods: list[str] = field(default_factory=lambda: [*METHODS], metadata={"help": f"Of: {', '.join(METHODS)}."})
    budget: int = field(default=10_000, metadata={"help": "Distinct molecules that a run evaluates, at most."})
    tau_maxes: list[float] = field(
        default_factory=lambda: [60.0, 300.0], metadata={"help": "Tried for T, and for REINVENT's sigma."}
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3], metadata={"help": "Tried for edited, REINVENT and RLOO."}
    )
    replayed: list[int] = field(
        default_factory=lambda: [0, 24], metadata={"help": "Best molecules per update, tried for REINVENT's replay."}
    )
    offspring: list[int] = field(
        default_factory=lambda: [5, 50], metadata={"help": "Children per generation, tried for the genetic algorithms."}
    )
    edits: list[int] = field(
        default_factory=lambda: [10],
        metadata={
            "help": "Edits made for each molecule that is evaluated, tried for edited. Of more than one, a Gaussian "
            "process on fingerprints says which."
        },
    )
    prompt_steps: int = field(
        default=400, metadata={"help": "Optimizer updates by which the prior learns to write the same after a prompt."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Random seeds; settings are chosen on the first one."}
    )
    output_dir: str = field(default="out/many_modes", metadata={"help": "Folder that all files are written to."})


class Bench(TunedRuns):
    """The runs, each made once and kept in a file."""

    def __init__(self, options: ManyModesArguments, model_config: MoleculeModelConfig, folder: Path) -> None:
        self.options, self.model_config = options, model_config
        settings = settings_of(options, model_config, without=("budget",))
        super().__init__(folder, "task", dict.fromkeys(options.tasks, options.budget), options.seeds, settings)

    def grid(self, method: str) -> list[str]:
        """The settings that are tried for a method, as words."""
        options = self.options
        tried: dict[str, list[list[Any]]] = {
            **{name: [options.tau_maxes] for name in ("prompts", "defaults")},
            "edited": [options.learning_rates, options.edits],
            "reinvent": [options.tau_maxes, options.learning_rates, options.replayed],
            "rloo": [options.tau_maxes, options.learning_rates],
            **{name: [options.offspring] for name in ("genetic_algorithm", "genetic_algorithms")},
        }
        return [" ".join(f"{number:g}" for number in numbers) for numbers in itertools.product(*tried[method])]

    @staticmethod
    def rank(run: Run) -> float:
        """What a method's setting is chosen by: less is better."""
        return -float(run["product"])

    def measure(self, task: str, method: str, setting: str, budget: int, seed: int) -> dict[str, Any]:
        """Make a run."""
        problem = ManyModesProblem(references(task), prompted=method in ("prompts", "edited"))
        numbers = [*map(float, setting.split())]
        began, extra = time.process_time(), dict[str, Any]()
        if method == "genetic_algorithm":
            evolve(problem, FIRST, int(numbers[0]), budget, seed)
        elif method == "genetic_algorithms":
            for place, reference in enumerate(problem.references):
                alone, share = ManyModesProblem((reference,)), budget // len(problem.references)
                evolve(alone, FIRST, int(numbers[0]), share, seed + 1000 * place)  # with first molecules of its own
                for molecule in alone.found:
                    problem.similarities(molecule)
        elif method in ("prompts", "defaults"):
            extra = self.aldrift(problem, left_open(self.last_run(), numbers[0], budget, seed))
        elif method == "edited":
            self.aldrift(problem, self.edited(numbers[0], budget, seed), edited_top(int(numbers[1])))
        elif method == "reinvent":
            reinvent(
                problem, self.model_config, EvaluationBudget(problem, budget), tau_max=numbers[0], proposals=4 * budget,
                batch=BATCH, learning_rate=numbers[1], replayed=int(numbers[2]), seed=seed,
            )  # fmt: skip
        else:
            policy_gradient(
                method, problem, self.model_config, tau_max=numbers[0], proposals=4 * budget, generations=BATCH,
                learning_rate=numbers[1], seed=seed, objective=EvaluationBudget(problem, budget),
            )  # fmt: skip
        spent = {"calls": len(problem.found), "cpu_seconds": time.process_time() - began}
        best = problem.best(budget)
        return {"best": best, "product": math.prod(best), "draws": self.nearest(problem)} | spent | extra

    def last_run(self) -> Path:
        """The folder of a run, empty: costs kept there would not be evaluated again."""
        last = self.folder / "last_run"
        shutil.rmtree(last, ignore_errors=True)
        return last

    def edited(self, learning_rate: float, budget: int, seed: int) -> RecipeConfig:
        """Settings of a search, for which T is nothing but a number; it ends with the budget."""
        return left_open(
            self.last_run(), 1.0, budget, seed, sampler="top", tau_step=1.0, num_rungs=budget, max_objective_calls=None,
            num_generations=PER_RUNG, updates_per_rung=UPDATES, per_device_train_batch_size=BATCH,
            learning_rate=learning_rate, max_completion_length=LONGEST,
        )  # fmt: skip

    def aldrift(
        self, problem: ManyModesProblem, config: RecipeConfig, sampler: EditedTop | None = None
    ) -> dict[str, Any]:
        """Run ALDRIFT; by its log Z of each prompt, the share of each reference in a p_T without prompts."""
        model_config = self.model_config
        if problem.prompted:
            model_config = with_prompts(problem, model_config, self.options.prompt_steps)
        trainer = make_trainer(problem, config, model_config, sampler)
        trainer.add_callback(Spent(problem, self.options.budget))
        trainer.train()
        figures = {"ended_by": trainer.record.ended_by, "ess": trainer.record.rungs[-1]["ess"]}
        # Of prompts that have not reached T it would be another distribution's.
        reached = all(tau == config.tau_max for tau in trainer.record.prompt_tau)
        return figures | ({"log_z": trainer.record.log_z} if problem.prompted and reached else {})

    def nearest(self, problem: ManyModesProblem) -> list[int]:
        """Of the molecules that were evaluated, how many are nearest to each reference."""
        counts = Counter(int(np.argmax(row)) for row in problem.found.values())
        return [counts[place] for place in range(len(problem.references))]


def similarities(task: str, made: dict[str, list[Run]]) -> Comparison:
    """A task: a row per method, with the best similarity to each reference."""
    (first, *_) = made.values()
    count = len(references(task))
    columns = [*(f"to {place + 1}" for place in range(count)), "product", f"seeds with all ≥ {NEAR:g}"]
    comparison = Comparison(f"{task}: seeds {[run['seed'] for run in first]}", [*columns, "molecules", "CPU seconds"])
    for method, runs in made.items():
        cells = [mean_of([run["best"][place] for run in runs], ".2f", ".2f") for place in range(count)]
        cells.append(mean_of([run["product"] for run in runs], ".3f", ".3f"))
        cells.append(f"{sum(min(run['best']) >= NEAR for run in runs)} of {len(runs)}")
        cells += [mean_of([run[measure] for run in runs], ",.0f") for measure in ("calls", "cpu_seconds")]
        comparison.rows.append((f"{method} {runs[0]['setting']}", cells))
    return comparison


def shares(made: dict[str, dict[str, list[Run]]]) -> Comparison:
    """The shares of the references in a p_T without prompts, which the prompts' log Z tell; first seed."""
    most = max(len(references(task)) for task in made)
    comparison = Comparison("p_T without prompts: log Z of each reference alone, nats", [*map(str, range(1, most + 1))])
    for task, by_method in made.items():
        run = by_method["prompts"][0]
        known = [f"{value:.1f}" for value in run.get("log_z", [])]
        comparison.rows.append((f"{task}, T = {run['setting']}", [*known, *[""] * (most - len(known))]))
    return comparison


def draw(made: dict[str, dict[str, list[Run]]], path: Path) -> None:
    """The best similarity to each reference, a panel per task: the mean over seeds."""
    with figure(path, [[*made]], (4.0 * len(made), 3.2)) as axes:
        for task, by_method in made.items():
            for place, (method, runs) in enumerate(by_method.items()):
                best = np.mean([run["best"] for run in runs], axis=0)
                across = np.arange(1, len(best) + 1) + 0.15 * (place - (len(by_method) - 1) / 2)
                axes[task].bar(across, best, width=0.14, label=method)
            axes[task].axhline(NEAR, linewidth=0.7)
            axes[task].set_title(task, fontsize=8)
            axes[task].set_xlabel("reference")
            axes[task].set_xticks(range(1, len(best) + 1))
            axes[task].set_ylabel("best similarity")
        axes[task].legend(fontsize=6)


def main() -> None:
    options, model_config = TrlParser((ManyModesArguments, MoleculeModelConfig)).parse_args_and_config()
    for name, given, known in (("methods", options.methods, METHODS), ("tasks", options.tasks, TASKS)):
        if unknown := sorted({*given} - {*known}):
            sys.exit(f"--{name} {', '.join(unknown)}: choose from {', '.join(known)}.")
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for task in options.tasks:
            references(task)
    except OSError as error:
        sys.exit(str(error))
    bench = Bench(options, model_config, folder)
    runs = {task: {method: bench.runs(task, method) for method in options.methods} for task in options.tasks}
    tables = [similarities(task, made) for task, made in runs.items()]
    publish([*tables, shares(runs)] if "prompts" in options.methods else tables, folder / "many_modes.md")
    draw(runs, folder / "many_modes.png")
    Console().print(f"tables and figure: {folder}/many_modes.*   every run: {folder}/runs.jsonl")


if __name__ == "__main__":
    main()
