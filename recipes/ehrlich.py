"""Optimise protein-like sequences: Ehrlich functions, beside a genetic algorithm and TRL's trainers.

    accelerate launch recipes/ehrlich.py

An Ehrlich function (Stanton et al. 2024, arXiv 2407.00236; recipes/problems/ehrlich.py) asks for c motifs of k states,
each anywhere in a sequence of L states out of V, where some pairs of neighbours are banned. The prior writes feasible
sequences, and the question is an optimiser's: after how many evaluations is a sequence of value 1 found? The
functions are those that the package pytorch-holo makes for the same V, L, c, k and seed.

The cost is the logarithm of the value, scaled to [0, 1], so that p_T ∝ L · f^(T / (c log k)). ALDRIFT is run with T and
the budget alone (defaults), with the archive and maximum likelihood (archive), with chains that redraw spans, at a T of
their own (span), with such chains whose new states are uniform ones in place of the model's (uniform_span), with
TOPIFT, the paper's heuristic (top), and with TOPIFT over what the model draws and what is made of the best by mixing,
shifting and moving their parts, so far as the prior's data has all neighbours of the result (edited). Its peers: a
genetic algorithm that starts from draws of the prior, expert iteration, and TRL's RLOO and GRPO with beta = 1/T. Each
has the setting of its grid that is best on the first function and seed: that solves it first, or else comes closest,
and earliest.

METHOD+rules knows the rules that the prior's data keeps to, the length and the neighbours that occur: its prior, and so
its model, gives all other sequences probability 0, and the genetic algorithm drops such children unevaluated.

The function's random seed is the run's. Runs are kept in OUTPUT_DIR/runs.jsonl, and not made again.
"""

import itertools
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from evaluation.baselines import TRL, CountedObjective, drawing_config, drawn_texts, expert_iteration, policy_gradient
from evaluation.ehrlich import DRAWS, MeasuredEhrlich, draw, draws_measured, table
from evaluation.evolution import Oracle, genetic_algorithm
from evaluation.kept_runs import Run, TunedRuns, settings_of
from evaluation.tables import publish
from peft import PeftModel
from problems.ehrlich import holo
from problems.prior import RecipeModelConfig
from problems.training import left_open, make_trainer
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from trl import TrlParser

from aldrift_hf.algorithm.samplers import EditedTop, SpanChains
from aldrift_hf.algorithm.samplers.edited import Edit
from aldrift_hf.models.loading import tokenizer_of
from aldrift_hf.toy import completion_ids, word_tokenizer

METHODS = (
    *("defaults", "archive", "top", "span", "uniform_span", "edited"),
    *("genetic_algorithm", "expert_iteration", *TRL),
)
RULES = "+rules"
"""Ends the name of a method that knows the length, and which neighbours the prior's data has."""
SEARCH_TAU_MAX = 200.0
"""T of the span chains, which search: so steep that a chain rarely goes back."""
SEARCH: dict[str, dict[str, Any]] = {
    # Four chains, and more rungs than the budget has.
    "span": {"chain_length": 64, "num_generations": 256, "num_rungs": 400},
    # Once the chains stay where the cost is 0, hardly a move is evaluated, and the budget would never be spent.
    "uniform_span": {"num_rungs": 30},
}
"""Settings of the span chains."""
EDITED = {"num_generations": 48, "per_device_train_batch_size": 64}
"""Settings of edited."""
TRIES = 300
"""Children that are tried for an edit."""
MOST_MOVES = 256
"""States per rung of each of the two chains of uniform_span."""
TRL_BATCH = 64
"""Draws per update."""
Learned = tuple[PeftModel, PreTrainedTokenizerBase]
"""A model and its tokenizer."""


@dataclass
class EhrlichArguments:
    """What is compared."""

    functions: list[str] = field(
        default_factory=lambda: ["32-32-2-4", "32-32-4-4", "20-32-2-4"], metadata={"help": "Functions, as V-L-c-k."}
    )
    budgets: list[int] = field(
        default_factory=lambda: [5248, 10000, 5248], metadata={"help": "Evaluations of a run, for each function."}
    )
    methods: list[str] = field(
        default_factory=lambda: [*METHODS],
        metadata={"help": f"Of: {', '.join(METHODS)}; also as METHOD{RULES}, but for TRL's."},
    )
    tau_max: float = field(default=40.0, metadata={"help": "T."})
    rungs: int = field(default=20, metadata={"help": "Rungs of archive and top, and rounds of expert iteration."})
    updates: list[int] = field(
        default_factory=lambda: [20, 60],
        metadata={"help": "Updates per rung or round, tried for archive, top and expert iteration."},
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3],
        metadata={"help": "Tried for all methods that learn, but defaults, span and uniform_span."},
    )
    populations: list[int] = field(
        default_factory=lambda: [32, 128, 512],
        metadata={"help": "Parents and children per generation, tried for the genetic algorithm."},
    )
    mutations: list[float] = field(
        default_factory=lambda: [1.0, 2.0],
        metadata={"help": "States changed per child, tried for the genetic algorithm."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2, 3, 4],
        metadata={"help": "Random seeds, also of the functions; settings are chosen on the first one."},
    )
    output_dir: str = field(default="out/ehrlich", metadata={"help": "Folder that all files are written to."})


class Bench(TunedRuns):
    """The runs, each made once and kept in a file."""

    def __init__(self, options: EhrlichArguments, model_config: RecipeModelConfig, folder: Path) -> None:
        self.options, self.model_config = options, model_config
        budgets, settings = dict(zip(options.functions, options.budgets)), settings_of(options, model_config)
        super().__init__(folder, "function", budgets, options.seeds, settings)

    def grid(self, method: str) -> list[str]:
        """The settings that are tried for a method, as words."""
        options, method = self.options, method.removesuffix(RULES)
        if method == "defaults":
            return [""]
        if method == "span":
            return [f"{updates} {rate:g}" for updates, rate in itertools.product((2, 10, 30), (1e-4, 3e-4))]
        if method == "uniform_span":  # learning does not help its moves, so it may be fast
            return ["30 0.001"]
        if method == "edited":
            return [f"4 {rate:g}" for rate in options.learning_rates]
        if method == "genetic_algorithm":
            return [f"{size} {rate:g}" for size, rate in itertools.product(options.populations, options.mutations)]
        if method in TRL:
            return [f"{rate:g}" for rate in options.learning_rates]
        return [f"{updates} {rate:g}" for updates, rate in itertools.product(options.updates, options.learning_rates)]

    @staticmethod
    def rank(run: Run) -> tuple[float, float, float]:
        """What a method's setting is chosen by: less is better."""
        return (np.inf if run["solved_at"] is None else run["solved_at"], -run["best"], run["rises"][-1][0])

    def measure(self, function: str, method: str, setting: str, budget: int, seed: int) -> dict[str, Any]:
        """Make a run."""
        problem = MeasuredEhrlich(*numbers_of(function), seed, rules_known=method.endswith(RULES))
        numbers, method = [*map(float, setting.split())], method.removesuffix(RULES)
        began = time.process_time()
        if method == "genetic_algorithm":
            evolve(problem, int(numbers[0]), numbers[1], budget, seed)
            learned = None
        elif method in ("defaults", "archive", "top", "edited", *SEARCH):
            learned = self.aldrift(problem, method, numbers, budget, seed)
        else:
            learned = self.peer(problem, method, numbers, budget, seed)
        measures = problem.search(budget) | {"cpu_seconds": time.process_time() - began}
        return measures if learned is None else measures | draws_measured(problem, self.texts(*learned, problem, seed))

    def aldrift(self, problem: MeasuredEhrlich, method: str, numbers: list[float], budget: int, seed: int) -> Learned:
        """ALDRIFT's model and its tokenizer: with its defaults, or with equal steps to T and maximum likelihood."""
        last, rungs = self.folder / "last_run", self.options.rungs
        shutil.rmtree(last, ignore_errors=True)  # the costs kept there would not be evaluated again
        given: dict[str, Any] = {}
        sampler = None
        learning = {"updates_per_rung": int(numbers[0]), "learning_rate": numbers[1]} if numbers else {}
        if method in SEARCH:
            given = {"sampler": "span", "loss_type": "nll", "tau_step": SEARCH_TAU_MAX / 3, **SEARCH[method]} | learning
            if method == "uniform_span":
                length = min(MOST_MOVES, budget // 2)
                given |= {"chain_length": length, "num_generations": 2 * length}
                sampler = SpanChains(length, alphabet(problem, self.model_config))
        elif method == "edited":  # a search for which T is nothing but a number
            sampler = EditedTop(state_edits(problem), newest_first=True)  # the value has few levels
            given = {"sampler": "top", "tau_step": self.options.tau_max, "num_rungs": budget, **EDITED} | learning
        elif method != "defaults":
            given = {
                "sampler": method,
                "loss_type": "nll",
                "tau_step": self.options.tau_max / rungs,
                "num_rungs": rungs,
                "num_generations": budget // rungs,
            } | learning
        tau_max = SEARCH_TAU_MAX if method in SEARCH else self.options.tau_max
        config = left_open(last, tau_max, budget, seed, **given)
        trainer = make_trainer(problem, config, self.model_config, sampler)
        trainer.train()
        return trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class

    def peer(self, problem: MeasuredEhrlich, method: str, numbers: list[float], budget: int, seed: int) -> Learned:
        """The model and tokenizer of expert iteration, or of one of TRL's trainers."""
        if method == "expert_iteration":
            model, tokenizer, _ = expert_iteration(
                problem, self.model_config, rounds=self.options.rungs, proposals=budget, updates=int(numbers[0]),
                learning_rate=numbers[1], seed=seed,
            )  # fmt: skip
        else:
            model, tokenizer, _ = policy_gradient(
                method, problem, self.model_config, tau_max=self.options.tau_max, proposals=4 * budget,
                generations=TRL_BATCH, learning_rate=numbers[0], seed=seed,
                objective=CountedObjective(problem, budget),
            )  # fmt: skip
        return model, tokenizer

    def texts(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, problem: MeasuredEhrlich, seed: int
    ) -> list[str]:
        """Draws of a final model."""
        config = drawing_config(problem, tokenizer, self.model_config)
        return drawn_texts(model, tokenizer, config, "", DRAWS, (seed, self.options.rungs, 0))


def evolve(problem: MeasuredEhrlich, population: int, mutations: float, budget: int, seed: int) -> None:
    """Run the genetic algorithm, from feasible sequences."""
    oracle = Oracle(lambda codes: problem.value_of(problem.texts(np.array([codes]))[0]), budget)
    words, pairs = problem.words, problem.neighbours

    def has_known_neighbours(codes: tuple[int, ...]) -> bool:
        return pairs.issuperset(itertools.pairwise(words[code] for code in codes))

    start = problem.function.sequences(population, problem.length, np.random.default_rng(seed))
    genetic_algorithm(
        oracle, problem.states, problem.length, population=population, mutations=mutations, seed=seed,
        start=map(tuple, start.tolist()), allowed=has_known_neighbours if problem.rules_known else None,
    )  # fmt: skip


def state_edits(problem: MeasuredEhrlich) -> Edit:
    """Children of two sequences, without neighbours that the prior's data has nowhere: each state from one of the two
    and one of them changed; or one state left out, and one put in elsewhere; or a part of the other, at another place.
    """

    def edit(texts: list[str], rng: random.Random) -> Iterator[str]:
        parents = [each for each in (text.split(problem.separator) for text in texts) if len(each) == problem.length]
        for _ in range(TRIES if len(parents) > 1 else 0):
            child = changed(*rng.sample(parents, 2), problem.words, rng)
            if problem.neighbours.issuperset(itertools.pairwise(child)):
                yield problem.separator.join(child)

    return edit


def changed(one: list[str], other: list[str], words: list[str], rng: random.Random) -> list[str]:
    """A child of two sequences of one length, which it has as well."""
    states, length = [*one], len(one)
    kind = rng.randrange(3)
    if kind == 0:
        states = [rng.choice(both) for both in zip(one, other)]
        states[rng.randrange(length)] = rng.choice(words)
    elif kind == 1:
        del states[rng.randrange(length)]
        states.insert(rng.randrange(length), rng.choice(words))
    else:
        size = rng.randint(1, max(1, length // 2))
        to, begin = (rng.randrange(length - size + 1) for _ in range(2))
        states[to : to + size] = other[begin : begin + size]
    return states


def alphabet(problem: MeasuredEhrlich, model_config: RecipeModelConfig) -> list[int]:
    """The tokens that all states are made of."""
    name = model_config.model_name_or_path
    if name is None:
        tokenizer = word_tokenizer(problem.words, problem.separator)
    else:
        tokenizer = tokenizer_of(name, {"revision": model_config.model_revision})
    (*states, _), *_ = completion_ids([problem.separator.join(problem.words)], tokenizer)  # without the end of the text
    return states


def numbers_of(function: str) -> list[int]:
    """V, L, c and k of a function."""
    return [*map(int, function.split("-"))]


def main() -> None:
    options, model_config = TrlParser((EhrlichArguments, RecipeModelConfig)).parse_args_and_config()
    known = {*METHODS, *(f"{method}{RULES}" for method in METHODS if method not in TRL)}
    if unknown := sorted({*options.methods} - known):
        sys.exit(f"--methods {', '.join(unknown)}: choose from {', '.join(METHODS)}.")
    for function in options.functions:
        if re.fullmatch(r"\d+-\d+-\d+-\d+", function) is None:
            sys.exit(f"--functions {function}: write V-L-c-k, four whole numbers, such as 32-32-2-4.")
        try:
            holo(*numbers_of(function), seed=0)
        except ValueError as error:
            sys.exit(f"--functions {function}: {error}.")
    if len(options.budgets) != len(options.functions):
        sys.exit(f"--budgets: one for each of {len(options.functions)} functions, not {len(options.budgets)}.")
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(options, model_config, folder)
    runs = {name: {method: bench.runs(name, method) for method in options.methods} for name in options.functions}
    publish([table(name, made) for name, made in runs.items()], folder / "ehrlich.md")
    draw(runs, folder / "ehrlich.png")
    Console().print(f"figure and tables: {folder}/ehrlich.*   every run: {folder}/runs.jsonl")


if __name__ == "__main__":
    main()
