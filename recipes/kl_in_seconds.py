"""How close to p_T after how many seconds, if the objective costs nothing? ALDRIFT, TRL's trainers, expert iteration.

    OMP_NUM_THREADS=1 python recipes/kl_in_seconds.py

The problem is one of recipes/benchmark.py's, by default the spanning trees of the main job; draws are free, and time is
what is short. KL(p_T‖q) is measured in the course of each run, while its clock stands still: the likeliest strings that
hold 99 % of p_T are enumerated, and all others are one event. Seconds are those of the processor. For each number of
seconds, each method has the setting that is closest by then on the first seed: a learning rate, and for ALDRIFT also
proposals and updates per rung. Runs are kept in OUTPUT_DIR/runs.jsonl.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark import PROBLEMS
from evaluation.baselines import TRL, expert_iteration, policy_gradient
from evaluation.exact_distance import ExactTarget
from evaluation.figures import figure, plot_lines
from evaluation.kept_runs import KeptRuns, Run, settings_of
from evaluation.tables import Comparison, mean_of
from problems.prior import RecipeModelConfig, make_prior
from problems.training import left_open, make_trainer
from rich.console import Console
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import TrlParser

from aldrift_hf.models.prior import base_model

METHODS = ("aldrift", "aldrift, defaults", *TRL, "expert_iteration")
KEY = ("problem", "method", "learning_rate", "proposals", "updates", "seed")
SHARE = 0.99
"""KL(p_T‖q) is measured on the likeliest strings that hold this share of p_T; all others are one event, for speed."""
SPACING = 1.2
"""Ratio of the times of two measurements, at least; the first comes at half of the first time that is compared."""
UNLIMITED = 10**6
"""Proposals, or calls, that no run reaches in its time."""


@dataclass
class SecondsArguments:
    """What is compared."""

    problem: str = field(default="florentine", metadata={"help": f"One of {', '.join(PROBLEMS)}."})
    methods: list[str] = field(default_factory=lambda: [*METHODS], metadata={"help": f"Of: {'; '.join(METHODS)}."})
    seconds: list[float] = field(
        default_factory=lambda: [5.0, 10.0, 20.0, 40.0],
        metadata={"help": "Times that are compared."},
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3], metadata={"help": "Tried for every method."}
    )
    rungs: list[str] = field(
        default_factory=lambda: ["256,15", "256,60"],
        metadata={"help": "Proposals and updates that are tried: per rung of ALDRIFT, per round of the last method."},
    )
    calls: list[int] = field(
        default_factory=lambda: [1280, 5120], metadata={"help": "Budgets that ALDRIFT's defaults are tried with."}
    )
    trl_batch_size: int = field(default=64, metadata={"help": "Proposals per update of TRL's trainers."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Random seeds; the first one tunes."})
    output_dir: str = field(default="out/kl_in_seconds", metadata={"help": "Folder that all files are written to."})


class Course(TrainerCallback):
    """KL(p_T‖q) in the course of a run.

    Args:
        target: the enumerated p_T.
        times: CPU seconds that are compared; the run ends after the last.
        by_rung: whether it is measured at the ends of epochs, which are rungs, and not after any update.

    Attributes:
        points: CPU seconds and KL(p_T‖q), nats.
    """

    def __init__(self, target: ExactTarget, times: Sequence[float], by_rung: bool) -> None:
        self.target, self.times, self.by_rung = target, times, by_rung
        self.points: list[tuple[float, float]] = []
        self.began = time.process_time()

    def look(self, model: PreTrainedModel) -> None:
        """Measure, unless it is too soon; that takes no time of the run's."""
        now = time.process_time()
        due = SPACING * self.points[-1][0] if self.points else min(self.times) / 2
        if now - self.began < due and not self.is_over:
            return
        kl = self.target.measures(base_model(model), 0, 0)["kl"]
        self.points.append((now - self.began, kl))
        self.began += time.process_time() - now

    @property
    def is_over(self) -> bool:
        """Whether the time is spent."""
        return time.process_time() - self.began > max(self.times)

    def begin(self) -> None:
        """The time begins: the prior is loaded."""
        self.began = time.process_time()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.by_rung:
            self.look(kwargs["model"])
        control.should_training_stop |= self.is_over

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        if self.by_rung:
            self.look(kwargs["model"])


class Bench:
    """The runs, each made once and kept in a file."""

    def __init__(self, options: SecondsArguments, model_config: RecipeModelConfig, folder: Path) -> None:
        self.options, self.model_config, self.folder = options, model_config, folder
        settings = settings_of(options, model_config, without=KEY, seconds=options.seconds)
        self.kept = KeptRuns(folder / "runs.jsonl", KEY, settings)
        self.problem, self.tau_max, _ = PROBLEMS[options.problem]
        prior, tokenizer, _ = make_prior(self.problem, model_config)
        self.target = ExactTarget.of(self.problem, base_model(prior), tokenizer, self.tau_max).likeliest(SHARE)
        self.prior_kl = self.target.measures(base_model(prior), 0, 0)["kl"]

    def run(self, method: str, rate: float, proposals: int, updates: int, seed: int) -> Run:
        """The course of one run."""
        return self.kept.get((self.options.problem, method, rate, proposals, updates, seed), self.measure)

    def settings_of(self, method: str) -> list[tuple[float, int, int]]:
        """Learning rates, proposals and updates that are tried for a method."""
        rungs = [tuple(map(int, text.split(","))) for text in self.options.rungs]
        if method == "aldrift, defaults":
            return [(0.0, calls, 0) for calls in self.options.calls]
        if method in TRL:
            rungs = [(self.options.trl_batch_size, 1)]
        return [(rate, *rung) for rate, rung in itertools.product(self.options.learning_rates, rungs)]  # type: ignore[misc]

    def measure(self, _: str, method: str, rate: float, proposals: int, updates: int, seed: int) -> dict[str, Any]:
        """Train until the time is spent."""
        course = Course(self.target, self.options.seconds, method not in TRL)
        prompts = len(self.problem.prompts)
        if method in TRL:
            policy_gradient(
                method, self.problem, self.model_config, tau_max=self.tau_max, proposals=UNLIMITED,
                generations=proposals // prompts, learning_rate=rate, seed=seed, callbacks=[course],
            )  # fmt: skip
        elif method == "expert_iteration":
            rounds = UNLIMITED // proposals
            expert_iteration(
                self.problem, self.model_config, rounds=rounds, proposals=rounds * proposals, updates=updates,
                learning_rate=rate, seed=seed, watch=course,
            )  # fmt: skip
        else:
            given = {"num_generations": proposals // prompts, "updates_per_rung": updates, "learning_rate": rate}
            calls = proposals if method == "aldrift, defaults" else UNLIMITED
            config = left_open(
                self.folder / "last_run", self.tau_max, calls, seed, **(given if method == "aldrift" else {})
            )
            trainer = make_trainer(self.problem, config, self.model_config)
            trainer.add_callback(course)
            trainer.train()
        return {"course": course.points}


def main() -> None:
    options, model_config = TrlParser((SecondsArguments, RecipeModelConfig)).parse_args_and_config()
    for given, known in (([options.problem], PROBLEMS), (options.methods, METHODS)):
        if unknown := sorted(set(given) - set(known)):
            sys.exit(f"unknown: {', '.join(unknown)}. Choose from {', '.join(known)}.")
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(options, model_config, folder)
    title = f"{options.problem}: KL(p_T‖q), nats, means over seeds {options.seeds}; rate, proposals, updates per rung"
    table = Comparison(title, [f"{limit:g} CPU s" for limit in options.seconds])
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for method in options.methods:
        best = [best_by(bench, method, limit) for limit in options.seconds]
        values = [
            [reached(bench.run(method, *setting, seed)["course"], limit, bench.prior_kl) for seed in options.seeds]
            for setting, limit in zip(best, options.seconds, strict=True)
        ]
        table.rows.append(
            (method, [f"{mean_of(row, '.3g', '.2g')} ({_words(setting)})" for row, setting in zip(values, best)])
        )
        lines[method] = (options.seconds, [statistics.mean(row) for row in values])
    table.print()
    table.write_markdown(folder / "kl_in_seconds.md")
    with figure(folder / "kl_in_seconds.png", [["kl"]], (6, 4.5)) as axes:
        plot_lines(axes["kl"], lines, "CPU seconds", "KL(p_T || q) (nats)", log="xy")
    Console().print(f"figure and table: {folder}/kl_in_seconds.*   every run: {folder}/runs.jsonl")


def best_by(bench: Bench, method: str, limit: float) -> tuple[float, int, int]:
    """The setting with the smallest KL(p_T‖q) after so many seconds, on the first seed."""
    seed = bench.options.seeds[0]
    return min(
        bench.settings_of(method),
        key=lambda setting: reached(bench.run(method, *setting, seed)["course"], limit, bench.prior_kl),
    )


def reached(course: Sequence[Sequence[float]], limit: float, prior_kl: float) -> float:
    """KL(p_T‖q) of the model that a run had after `limit` seconds: that of its last measurement, nats."""
    return next((kl for seconds, kl in reversed(course) if seconds <= limit), prior_kl)


def _words(setting: tuple[float, int, int]) -> str:
    rate, proposals, updates = setting
    return f"{rate:g}, {proposals:,}, {updates}" if rate else f"{proposals:,} calls"


if __name__ == "__main__":
    main()
