"""Learn from some prompts, and work for others: how far does a model generalise, and for how many draws?

    accelerate launch recipes/many_prompts.py

A prompt is three digits to base 6, a completion four, and the cost is the distance of their digit sums
(recipes/problems/digit_sums.py). A small model, which writes random digits, is trained in full on 108 prompts; 108
others are never shown. All completions can be enumerated, so the distances from p_T to the model are exact: the mean
over prompts of KL(p_T‖q), for the prompts of training and for the others.

ALDRIFT is run with all prompts on every rung, with a random 16 per rung (--prompts_per_rung), and with its defaults.
TRL's RLOO and GRPO, whose optimum is p_T as well, get the same prior and draws. The learning rate of each method is
tuned on the first seed, over the same grid. Runs are kept in OUTPUT_DIR/runs.jsonl, and not made again.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from evaluation.baselines import TRL, policy_gradient
from evaluation.enumeration import kl_divergence
from evaluation.exact_distance import ExactTarget
from evaluation.figures import figure, plot_lines
from evaluation.kept_runs import KeptRuns, Run, settings_of
from evaluation.tables import Comparison, mean_of
from problems.digit_sums import split
from problems.prior import RecipeModelConfig, make_prior
from problems.training import RecipeConfig, left_open, make_trainer
from rich.console import Console
from transformers import PreTrainedModel
from trl import TrlParser

from aldrift_hf.models.prior import base_model

TAU_MAX = 4.0
RUNGS = 10
"""Rungs of ALDRIFT where each draws for all prompts; as many visits to each prompt where they do not."""
DEFAULTS = "aldrift, defaults"
METHODS = ("prior", "aldrift", "aldrift, some prompts per rung", *TRL, DEFAULTS)
KEY = ("method", "learning_rate", "seed", "draws")
MODEL = RecipeModelConfig(use_peft=False)


@dataclass
class ManyPromptsArguments:
    """What is compared."""

    methods: list[str] = field(default_factory=lambda: [*METHODS], metadata={"help": f"Of: {'; '.join(METHODS)}."})
    draws: int = field(default=8640, metadata={"help": "Draws of a run: 8 for each prompt on each of 10 rungs."})
    prompts_per_rung: int = field(default=16, metadata={"help": "Prompts of a rung that does not draw for all."})
    updates: int = field(default=120, metadata={"help": "Updates per epoch over the prompts."})
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-5, 1e-4, 3e-4, 1e-3, 3e-3], metadata={"help": "Tried for every method."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Random seeds; learning rates are tuned on the first one."}
    )
    generations: int = field(default=8, metadata={"help": "Draws per prompt per update of TRL's trainers."})
    prompts_per_update: int = field(default=8, metadata={"help": "Prompts per update of TRL's trainers."})
    output_dir: str = field(default="out/many_prompts", metadata={"help": "Folder that all files are written to."})

    def __post_init__(self) -> None:
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ValueError(f"--methods {', '.join(unknown)}: choose from {'; '.join(METHODS)}")


def main() -> None:
    try:
        (options,) = TrlParser(ManyPromptsArguments).parse_args_and_config()
    except ValueError as error:
        sys.exit(str(error))
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(options, folder)
    groups = {method: bench.tuned(method) for method in options.methods}
    report(groups, [*bench.kept.runs.values()], folder)


class Bench:
    """The runs."""

    def __init__(self, options: ManyPromptsArguments, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.kept = KeptRuns(folder / "runs.jsonl", KEY, settings_of(options, without=KEY))
        self.problems = dict(zip(("seen", "unseen"), split(), strict=True))
        prior, tokenizer, _ = make_prior(self.problems["seen"], MODEL)
        self.targets = {
            name: ExactTarget.of(problem, base_model(prior), tokenizer, TAU_MAX)
            for name, problem in self.problems.items()
        }

    def tuned(self, method: str) -> list[Run]:
        """One run per seed, at the learning rate with the smallest KL(p_T‖q) on the prompts of the first seed's run."""
        seeds, draws = self.options.seeds, self.options.draws
        # 0: none, or the one that is found
        rates = [0.0] if method in ("prior", DEFAULTS) else self.options.learning_rates
        first = [self.kept.get((method, rate, seeds[0], draws), self.measure) for rate in rates]
        best = min(first, key=lambda run: run["seen"])["learning_rate"]
        return [
            self.kept.get((method, best, seed, draws), self.measure)
            for seed in (seeds[:1] if method == "prior" else seeds)
        ]

    def measure(self, method: str, rate: float, seed: int, draws: int) -> dict[str, float]:
        """Train, and compare with p_T."""
        problem, began = self.problems["seen"], time.process_time()
        if method == "prior":
            model, spent = make_prior(problem, MODEL)[0], 0
        elif method in TRL:
            options = self.options
            model, _, _ = policy_gradient(
                method, problem, MODEL, tau_max=TAU_MAX, proposals=draws, generations=options.generations,
                prompts_per_update=options.prompts_per_update, learning_rate=rate, seed=seed,
            )  # fmt: skip
            spent = draws
        else:
            trainer = make_trainer(problem, self.settings(method, rate, seed, draws), MODEL)
            trainer.train()
            model, spent = trainer.model, trainer.record.rungs[-1]["proposals"]
        seconds = time.process_time() - began
        return self.distances(base_model(model)) | {"spent": spent, "cpu_seconds": seconds}

    def distances(self, model: PreTrainedModel) -> dict[str, float]:
        """KL(p_T‖q) of the prompts of training, of the others, and of the worst of these, nats."""
        kl = {
            name: [
                kl_divergence(log_p, strings.log_probs(model))
                for strings, log_p in zip(target.strings, target.log_target, strict=True)
            ]
            for name, target in self.targets.items()
        }
        return {name: float(np.mean(values)) for name, values in kl.items()} | {"worst": max(kl["unseen"])}

    def settings(self, method: str, rate: float, seed: int, draws: int) -> RecipeConfig:
        """ALDRIFT's settings."""
        shared: dict[str, Any] = {
            "output_dir": str(self.folder / "last_run"), "tau_max": TAU_MAX, "seed": seed, "save_strategy": "no",
            "report_to": "none", "disable_tqdm": True,
        }  # fmt: skip
        prompts, options = len(self.problems["seen"].prompts), self.options
        n = draws // (RUNGS * prompts)
        if method == DEFAULTS:
            return left_open(self.folder / "last_run", TAU_MAX, draws, seed)
        epoch = 1 if method == "aldrift" else -(-prompts // options.prompts_per_rung)
        rungs = RUNGS * epoch
        return RecipeConfig(
            **shared,
            tau_step=TAU_MAX / rungs,
            num_rungs=rungs,
            num_generations=n,
            chain_length=1,
            prompts_per_rung=None if epoch == 1 else options.prompts_per_rung,
            archive_window=RUNGS * epoch,
            updates_per_rung=max(1, options.updates // epoch),
            learning_rate=rate,
            lr_scheduler_type="warmup_stable_decay",
        )


def report(groups: dict[str, list[Run]], tried: list[Run], folder: Path) -> None:
    """Print and write the table, of the best learning rates, and the figure, of all that were tried."""
    seeds = [run["seed"] for run in max(groups.values(), key=len)]
    table = Comparison(
        f"KL(p_T‖q), nats, means over seeds {seeds}", ["seen prompts", "unseen", "worst unseen", "CPU s"]
    )
    for method, runs in groups.items():
        rate = runs[0]["learning_rate"]
        label = method + (f", lr {rate:g}" if rate else "") + (f", {runs[0]['spent']:,} draws" if rate else "")
        table.rows.append(
            (label, [_cell(runs, name, spec) for name, spec in
                     (("seen", ".3f"), ("unseen", ".3f"), ("worst", ".2f"), ("cpu_seconds", ".0f"))])
        )  # fmt: skip
    table.print()
    table.write_markdown(folder / "many_prompts.md")
    with figure(folder / "many_prompts.png", [["unseen"]], (6, 4.5)) as axes:
        lines = {
            method: tuple(zip(*sorted((run["learning_rate"], run["unseen"]) for run in tried
                                      if run["method"] == method and run["learning_rate"] and run["seed"] == seeds[0])))
            for method in groups
        }  # fmt: skip
        lines = {method: line for method, line in lines.items() if line}
        plot_lines(axes["unseen"], lines, "learning rate", "KL(p_T || q) of unseen prompts (nats)", log="xy")
    Console().print(f"figure and table: {folder}/many_prompts.*   every run: {folder}/runs.jsonl")


def _cell(runs: list[Run], name: str, spec: str) -> str:
    """The mean over seeds, and of distances the standard deviation."""
    return mean_of([run[name] for run in runs], spec, "" if name == "cpu_seconds" else spec)


if __name__ == "__main__":
    main()
