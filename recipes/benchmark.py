"""How close to p_T for how many objective calls? ALDRIFT's samplers, TRL's trainers and expert iteration.

    accelerate launch recipes/benchmark.py

All methods run in one process, with the same priors, costs and numbers of proposals. The learning rate of each method
is tuned on the first seed, over the same grid; "defaults" is ALDRIFT with T, D and a budget of objective calls, and
nothing tuned. The problems can be enumerated, so the distances from p_T to the models are exact. The optimum of TRL's
RLOO, which maximises E[-d] - KL/T, is p_T as well, and GRPO's nearly. They are also run with a multiple of the largest
budget (--longer) that takes them as much time as the archive. Every run is kept in OUTPUT_DIR/runs.jsonl and not
repeated.

The whole benchmark takes long (see recipes/README.md); run parts of it with --problems, --methods, --budgets, --seeds
and --learning_rates.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.baselines import TRL, expert_iteration, policy_gradient
from evaluation.benchmark import report
from evaluation.exact_distance import ExactTarget
from evaluation.kept_runs import KeptRuns, Run, settings_of
from problems.line_scheduling import LineSchedulingProblem
from problems.prior import RecipeModelConfig, make_prior
from problems.round_trips import RoundTripProblem
from problems.spanning_tree import load_problem
from problems.training import RecipeConfig, left_open, make_trainer
from transformers import PreTrainedTokenizerBase
from trl import TrlParser

from aldrift_hf.algorithm.samplers import SAMPLERS
from aldrift_hf.models.prior import base_model

PROBLEMS = {  # the problem, T, and by what share the cost of a solution may exceed the lowest cost
    "florentine": (load_problem("florentine"), 6.0, 0.0),
    "line": (LineSchedulingProblem(stations=4, longest_visit=12, headway=3), 4.0, 0.0),
    "trips": (RoundTripProblem(), 4.0, 0.05),
}
DEFAULTS = "defaults"
"""ALDRIFT with T, D and a budget of objective calls alone: everything else is left to the trainer."""
METHODS = ("prior", "top", "reweight", "metropolis_hastings", "archive", DEFAULTS, *TRL, "expert_iteration")
KEY = ("problem", "method", "budget", "learning_rate", "seed")


@dataclass
class BenchmarkArguments:
    """What is compared."""

    problems: list[str] = field(
        default_factory=lambda: [*PROBLEMS], metadata={"help": f"Problems: {', '.join(PROBLEMS)}."}
    )
    methods: list[str] = field(default_factory=lambda: [*METHODS], metadata={"help": f"Methods: {', '.join(METHODS)}."})
    budgets: list[int] = field(default_factory=lambda: [1280, 5120], metadata={"help": "Numbers of proposals per run."})
    longer: int = field(
        default=3, metadata={"help": "TRL's trainers are also run with the largest budget times this number."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Random seeds; learning rates are tuned on the first one."}
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3, 1e-2],
        metadata={"help": "Learning rates that are tried for every method."},
    )
    updates: int = field(
        default=60, metadata={"help": "Optimizer updates per rung, and per round of expert iteration."}
    )
    trl_batch_size: int = field(default=64, metadata={"help": "Proposals per update of TRL's trainers."})
    trl_schedule: str = field(
        default="constant", metadata={"help": "Course of their learning rate: constant, or linear (to 0), say."}
    )
    draws: int = field(default=4096, metadata={"help": "Number of draws among which distinct solutions are counted."})
    output_dir: str = field(default="out/benchmark", metadata={"help": "Folder that all files are written to."})


def main() -> None:
    options, model_config = TrlParser((BenchmarkArguments, RecipeModelConfig)).parse_args_and_config()
    for given, known in ((options.problems, PROBLEMS), (options.methods, METHODS)):
        if unknown := sorted(set(given) - set(known)):
            sys.exit(f"unknown: {', '.join(unknown)}. Choose from {', '.join(known)}.")
    prompts = max(len(PROBLEMS[name][0].prompts) for name in options.problems)
    least = max(options.trl_batch_size, prompts * rungs(0))
    if min(options.budgets) < least:
        sys.exit(
            f"--budgets {min(options.budgets)}: choose at least {least}, for an update of TRL's trainers and a rung."
        )
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(options, model_config, folder / "runs.jsonl")
    groups = {
        problem: [bench.tuned(problem, method, budget) for method, budget in asked_of(options)]
        for problem in options.problems
    }
    report(groups, folder)


def asked_of(options: BenchmarkArguments) -> list[tuple[str, int]]:
    """The methods and budgets to run, in the order of the table."""
    longest = options.longer * max(options.budgets)
    return [
        (method, budget)
        for method in options.methods
        for budget in ([0] if method == "prior" else [*options.budgets, *([longest] if method in TRL else [])])
    ]


class Bench:
    """The runs of the benchmark, each made once and kept in a file."""

    def __init__(self, options: BenchmarkArguments, model_config: RecipeModelConfig, path: Path) -> None:
        self.options, self.model_config = options, model_config
        self.kept = KeptRuns(path, KEY, settings_of(options, model_config, without=("longer",)))
        self.targets: dict[str, ExactTarget] = {}

    def tuned(self, problem: str, method: str, budget: int) -> list[dict[str, Any]]:
        """One run per seed, at the learning rate with the smallest KL(p_T‖q) on the first seed."""
        first, rates = self.options.seeds[0], self.options.learning_rates
        if method in ("prior", DEFAULTS):
            seeds = [first] if method == "prior" else self.options.seeds
            return [self.run(problem, method, budget, 0.0, seed) for seed in seeds]
        # A longer run has the learning rate of the largest budget.
        usual = min(budget, max(self.options.budgets))
        best = min((self.run(problem, method, usual, rate, first) for rate in rates), key=lambda run: run["kl"])
        return [self.run(problem, method, budget, best["learning_rate"], seed) for seed in self.options.seeds]

    def run(self, *key: Any) -> Run:
        """The measures of one run."""
        return self.kept.get(key, self.measure)

    def measure(self, name: str, method: str, budget: int, rate: float, seed: int) -> dict[str, float]:
        """Train, and compare the model with the enumerated p_T; means over prompts."""
        problem, tau_max, _ = PROBLEMS[name]
        proposals, calls, began = budget, 0, time.perf_counter()
        if method == "prior":
            model, tokenizer, _ = make_prior(problem, self.model_config)
        elif method in (*SAMPLERS, DEFAULTS):
            settings = (
                left_open(self.kept.path.parent / "last_run", tau_max, budget, seed)
                if method == DEFAULTS
                else self.settings(name, method, budget, rate, seed)
            )
            trainer = make_trainer(problem, settings, self.model_config)
            trainer.train()
            model, tokenizer, calls = trainer.model, trainer.processing_class, trainer.objective_calls
            proposals = trainer.record.rungs[-1]["proposals"]
        elif method in TRL:
            model, tokenizer, calls = policy_gradient(
                method, problem, self.model_config, tau_max=tau_max, proposals=budget,
                generations=self.options.trl_batch_size // len(problem.prompts), learning_rate=rate, seed=seed,
                schedule=self.options.trl_schedule,
            )  # fmt: skip
        else:
            model, tokenizer, calls = expert_iteration(
                problem, self.model_config, rounds=rungs(budget), proposals=budget, updates=self.options.updates,
                learning_rate=rate, seed=seed,
            )  # fmt: skip
        seconds = time.perf_counter() - began
        measures = self.target(name, tokenizer).measures(base_model(model), self.options.draws, seed)
        if method in (*SAMPLERS, DEFAULTS):
            drawn = trainer.sample(self.options.draws // len(problem.prompts), chain_length=4)
            measures["corrected_tv"] = self.target(name, tokenizer).tv_of_draws(drawn["prompt"], drawn["completion"])
        return measures | {"proposals": proposals, "calls": calls, "seconds": seconds}

    def target(self, name: str, tokenizer: PreTrainedTokenizerBase) -> ExactTarget:
        """The p_T of a problem, enumerated once."""
        if name not in self.targets:
            problem, tau_max, slack = PROBLEMS[name]
            prior = base_model(make_prior(problem, self.model_config)[0])
            self.targets[name] = ExactTarget.of(problem, prior, tokenizer, tau_max, slack)
        return self.targets[name]

    def settings(self, problem: str, sampler: str, budget: int, rate: float, seed: int) -> RecipeConfig:
        """ALDRIFT's settings: equal steps up to T, with the same updates per rung for every sampler."""
        _, tau_max, _ = PROBLEMS[problem]
        prompts = len(PROBLEMS[problem][0].prompts)
        return RecipeConfig(
            output_dir=str(self.kept.path.parent / "last_run"),
            sampler=sampler,
            tau_max=tau_max,
            tau_step=tau_max / rungs(budget),
            num_rungs=rungs(budget),
            num_generations=budget // (rungs(budget) * prompts * 4) * 4,
            chain_length=4,
            updates_per_rung=self.options.updates,
            learning_rate=rate,
            lr_scheduler_type="warmup_stable_decay",
            seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )


def rungs(budget: int) -> int:
    """The number of rungs, or rounds of expert iteration: at least 5; 10 for 5,120 proposals or more."""
    return max(5, min(10, budget // 512))


if __name__ == "__main__":
    main()
