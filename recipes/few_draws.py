"""Does log Z of few draws mislead? With 4 to 16 draws per prompt per rung: its bias, its error, and what they cost.

    python recipes/few_draws.py

The problem is that of recipes/many_prompts.py: 108 prompts to train on, 108 others, all completions enumerated, T = 4.
log Z of a prompt is the log of the mean weight of its draws so far, which is low on average: by half of its squared
standard error. Each run is made with that estimate, with half of the squared error added, and with the exact log Z,
which no run can know: what it gains is all that a better estimate could gain. Runs are kept in OUTPUT_DIR/runs.jsonl.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluation.exact_distance import ExactTarget
from evaluation.kept_runs import KeptRuns, settings_of
from evaluation.tables import Comparison, mean_of
from many_prompts import MODEL, RUNGS, TAU_MAX
from problems.digit_sums import split
from problems.prior import make_prior
from problems.training import RecipeConfig, make_trainer
from torch import Tensor
from trl import TrlParser

from aldrift_hf.algorithm.ladders.base import LadderState
from aldrift_hf.algorithm.samplers import ArchiveSampler
from aldrift_hf.models.prior import base_model
from aldrift_hf.types import Proposals

ESTIMATES = ("mean weight", "less its bias", "exact")
KEY = ("estimate", "draws", "seed", "learning_rate")


@dataclass
class FewDrawsArguments:
    """What is compared."""

    draws: list[int] = field(default_factory=lambda: [4, 8, 16], metadata={"help": "Draws per prompt per rung."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Random seeds."})
    updates: int = field(default=120, metadata={"help": "Updates per rung."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate."})
    output_dir: str = field(default="out/few_draws", metadata={"help": "Folder that all files are written to."})


class Estimating(ArchiveSampler):
    """The archive with a log Z of choice, whose distance from the exact one is kept.

    Args:
        window: as the archive's.
        estimate: one of `ESTIMATES`.
        exact: `exact(tau) -> [P]`, log Z of all prompts, nats.

    Attributes:
        errors: of each rung, the estimate less the exact log Z, and its standard error; `[P]` each, nats.
    """

    def __init__(self, window: int, estimate: str, exact: Callable[[float], Tensor]) -> None:
        super().__init__(window)
        self.estimate, self.exact = estimate, exact
        self.errors: list[tuple[Tensor, Tensor]] = []

    def log_z(self, pool: Proposals, state: LadderState, tau: float) -> Tensor:
        exact, error = self.exact(tau), self.influence(pool, state, tau).error()
        found = super().log_z(pool, state, tau) + (error.square() / 2 if self.estimate == ESTIMATES[1] else 0)
        self.errors.append((found - exact, error))
        return exact if self.estimate == ESTIMATES[2] else found


class Bench:
    """The runs, each made once and kept in a file."""

    def __init__(self, options: FewDrawsArguments, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.kept = KeptRuns(folder / "runs.jsonl", KEY, settings_of(options, without=KEY))
        prior, tokenizer, _ = make_prior(split()[0], MODEL)
        self.targets = [ExactTarget.of(problem, base_model(prior), tokenizer, TAU_MAX) for problem in split()]
        strings = self.targets[0].strings
        log_prior = np.stack([every.log_probs(base_model(prior)) for every in strings])
        cost = np.stack([np.append(every.cost, every.worst_cost) for every in strings])
        self.log_prior, self.cost = torch.from_numpy(log_prior), torch.from_numpy(cost)

    def exact(self, tau: float) -> Tensor:
        """log Z of the prompts of training, `[P]`, nats."""
        return (self.log_prior - tau * self.cost).logsumexp(-1)

    def measure(self, estimate: str, draws: int, seed: int, learning_rate: float) -> dict[str, float]:
        """Train; how far log Z was from the exact one on each rung, and KL(p_T‖q) at the end."""
        settings: dict[str, Any] = {
            "output_dir": str(self.folder / "last_run"), "tau_max": TAU_MAX, "seed": seed, "save_strategy": "no",
            "report_to": "none", "disable_tqdm": True, "num_rungs": RUNGS, "tau_step": TAU_MAX / RUNGS,
            "num_generations": draws, "chain_length": 1, "updates_per_rung": self.options.updates,
            "learning_rate": learning_rate, "lr_scheduler_type": "warmup_stable_decay",
        }  # fmt: skip
        began = time.process_time()
        sampler = Estimating(RUNGS, estimate, self.exact)
        trainer = make_trainer(split()[0], RecipeConfig(**settings), MODEL, sampler=sampler)
        trainer.train()
        seconds = time.process_time() - began
        found: dict[str, float] = {"cpu_seconds": seconds}
        for rung, (off, error) in enumerate(sampler.errors[:RUNGS], start=1):
            figures = {"bias": off.mean(), "rms": off.square().mean().sqrt(), "stated": error.square().mean().sqrt()}
            found |= {f"{name}_{rung}": float(value) for name, value in figures.items()}
        for name, target in zip(("seen", "unseen"), self.targets, strict=True):
            found[name] = target.measures(base_model(trainer.model), 0, seed)["kl"]
        return found


def main() -> None:
    (options,) = TrlParser(FewDrawsArguments).parse_args_and_config()
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(options, folder)
    rungs = [1, RUNGS // 2, RUNGS]
    columns = [f"{name}, rung {rung}" for rung in rungs for name in ("bias", "error", "stated")]
    table = Comparison(f"log Z and KL, nats, means over seeds {options.seeds}", [*columns, "KL seen", "KL unseen"])
    names = [f"{name}_{rung}" for rung in rungs for name in ("bias", "rms", "stated")]
    for draws in options.draws:
        for estimate in ESTIMATES:
            keys = [(estimate, draws, seed, options.learning_rate) for seed in options.seeds]
            runs = [bench.kept.get(key, bench.measure) for key in keys]
            cells = (
                [mean_of([run[name] for run in runs], ".3f") for name in names]
                if estimate != ESTIMATES[2]
                else [""] * len(names)
            )
            distances = [mean_of([run[name] for run in runs], ".3f", ".3f") for name in ("seen", "unseen")]
            table.rows.append((f"{draws} draws, {estimate}", [*cells, *distances]))
    table.print()
    table.write_markdown(folder / "few_draws.md")


if __name__ == "__main__":
    main()
