"""How large may a step of the ladder be? Steps of 1/D, 2/D, … up to T in one step, until coverage breaks.

    accelerate launch recipes/ladder_stress.py

There is one run of ALDRIFT on the spanning-tree problem per step. All runs have the same total numbers of proposals and
updates, divided equally among their rungs: a ladder with few rungs has many samples per rung. All strings are
enumerated, so the final distance to p_T is exact. It is compared with the diagnostics that need no enumeration:
acceptance rate, k-hat and missing mass.

All options of ALDRIFTConfig and of TRL's ModelConfig work, here and in YAML (--config FILE.yaml).
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from evaluation.enumeration import enumerable_graph, enumerate_strings
from evaluation.exact_rungs import ExactRungs
from evaluation.figures import figure, plot_lines
from evaluation.tables import Comparison
from problems.prior import RecipeModelConfig
from problems.training import RecipeConfig, make_trainer, one_of_several
from rich.console import Console
from trl import TrlParser

from aldrift_hf.algorithm.samplers import SAMPLERS


@dataclass
class StressArguments:
    """The problem and the steps."""

    graph: str = field(
        default="florentine",
        metadata={"help": "The graph, as in recipes/spanning_tree.py; its strings are enumerated."},
    )
    steps: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 48],
        metadata={"help": "Steps of the ladder that are compared, in units of 1/D."},
    )
    proposals: int = field(default=9_216, metadata={"help": "Number of proposals per run, divided among its rungs."})
    updates: int = field(
        default=288, metadata={"help": "Number of optimizer updates per run, divided among its rungs."}
    )
    broken_kl: float = field(
        default=1.0, metadata={"help": "KL(p_T || model) in nats above which coverage counts as broken."}
    )
    enumerate_up_to: int = field(default=50_000, metadata={"help": "Largest number of strings that may be enumerated."})


@dataclass
class StressConfig(RecipeConfig):
    """ALDRIFT's settings, with this recipe's defaults.

    The recipe varies `tau_step`, `num_generations` and `updates_per_rung`.
    """

    output_dir: Optional[str] = field(
        default="out/ladder_stress",
        metadata={"help": "Folder that all files are written to, with a subfolder per step."},
    )
    tau_max: float = field(default=6.0, metadata={"help": "T, in nats per component."})
    sampler: str = field(
        default="metropolis_hastings",
        metadata={"choices": SAMPLERS, "help": "How proposals become samples of a rung's target."},
    )
    chain_length: Optional[int] = field(default=5, metadata={"help": "Number of proposals per sample."})
    learning_rate: float = field(default=5e-4, metadata={"help": "High, for a small model with a small adapter."})

    def __post_init__(self) -> None:
        if self.chain_length is not None:
            self.num_generations = self.chain_length  # of one chain; the recipe sets the number of chains for each step
        super().__post_init__()


def main() -> None:
    parser = TrlParser((StressArguments, StressConfig, RecipeModelConfig))
    options, config, model_config = parser.parse_args_and_config()
    problem = enumerable_graph(options.graph, model_config, options.enumerate_up_to)
    if not options.steps or min(options.steps) < 1:
        sys.exit(f"--steps must be whole numbers of at least 1, in units of 1/D; got {options.steps}")
    if config.ladder not in (None, "linear"):
        sys.exit("--ladder must be linear: this recipe varies its steps")
    length = config.steps_per_chain
    runs: dict[int, dict[str, Any]] = {}
    exact: Optional[ExactRungs] = None
    for step in sorted(set(options.steps)):
        tau_step = min(step / problem.worst_cost, config.tau_max)
        rungs = max(1, math.ceil(config.tau_max / tau_step - 1e-9))
        run = one_of_several(
            config,
            f"step-{step}",
            tau_step=tau_step,
            num_rungs=rungs,
            num_generations=max(1, options.proposals // rungs // length) * length,
            chain_length=length,
            updates_per_rung=max(1, options.updates // rungs),
        )
        trainer = make_trainer(problem, run, model_config)
        exact = ExactRungs(trainer, enumerate_strings(problem, trainer), exact and exact.log_prior)
        result = trainer.train(resume_from_checkpoint=run.resume_from_checkpoint)
        trainer.save_model()
        records = trainer.record.rungs
        runs[step] = {
            "step": tau_step,
            "rungs": rungs,
            "samples": run.num_chains,
            **exact.measure(config.tau_max),
            "missing_mass": result.metrics.get("final_missing_mass", math.nan),
            "largest_missing_mass": max(record["missing_mass"] for record in records),
            "acceptance_rate": min(record["acceptance_rate"] for record in records),
            "khat": max((r["khat"] for r in records if not math.isnan(r["khat"])), default=math.nan),
            "ess": min(record["ess"] for record in records),
        }
    if trainer.is_world_process_zero():
        report(runs, problem.worst_cost, options.broken_kl, Path(config.output_dir))


def report(runs: dict[int, dict[str, Any]], worst_cost: float, broken_kl: float, folder: Path) -> None:
    """Print and write the table, the main result in a sentence, and the figure."""
    names = {step: f"{step}/D" for step in runs}
    table = Comparison(f"steps of the ladder, D = {worst_cost:g}", list(names.values()))
    rows = [
        ("step", "step Δτ, nats per component", "g"),
        ("rungs", "rungs", "d"),
        ("samples", "samples per rung", ",d"),
        ("exact_kl", "KL(p_T || model), nats, exact", ".2f"),
        ("exact_tv", "TV(p_T, model), exact", ".2f"),
        ("exact_coverage", "log sup p_T / model, nats, exact", ".2f"),
        ("exact_success", "success: probability of a tree, exact", ".3f"),
        ("missing_mass", "missing mass at the end, nats", ".2f"),
        ("largest_missing_mass", "missing mass, largest of any rung, nats", ".2f"),
        ("acceptance_rate", "acceptance rate, smallest of any rung", ".2f"),
        ("ess", "ESS / n, smallest of any rung", ".3f"),
        ("khat", "k-hat, largest of any rung", ".2f"),
    ]
    for key, label, spec in rows:
        table.add(label, {names[step]: run[key] for step, run in runs.items()}, spec)
    table.print()
    table.write_markdown(folder / "ladder_stress.md")
    Console().print(verdict(runs, names, broken_kl))
    draw(runs, folder / "ladder_stress.png")
    Console().print(f"figure and table: {folder}/ladder_stress.*   rungs: {folder}/*/rungs.jsonl")


def verdict(runs: dict[int, dict[str, Any]], names: dict[int, str], broken_kl: float) -> str:
    """The best step, and the smaller and larger ones for which coverage breaks."""
    best = min(runs, key=lambda step: runs[step]["exact_kl"])
    broken = [step for step, run in runs.items() if run["exact_kl"] > broken_kl]
    too_fine = ", ".join(names[step] for step in broken if step < best) or "none"
    too_coarse = ", ".join(names[step] for step in broken if step > best) or "none"
    return (
        f"closest to p_T: steps of {names[best]}. Steps with a KL above {broken_kl:g} nats: larger ones: {too_coarse}; "
        f"smaller ones, with fewer samples per rung: {too_fine}"
    )


def draw(runs: dict[int, dict[str, Any]], path: Path) -> None:
    """Plot the exact distances and the diagnostics against the step."""
    steps = [run["step"] for run in runs.values()]
    panels = {
        "distance": {"exact_kl": "KL(p_T || model)", "exact_coverage": "log sup p_T / model"},
        "inside": {"missing_mass": "missing mass, end", "largest_missing_mass": "missing mass, worst rung"},
        "weights": {
            "acceptance_rate": "acceptance rate (smallest)",
            "ess": "ESS / n (smallest)",
            "khat": "k-hat (largest)",
        },
    }
    units = {
        "distance": "nats, exact",
        "inside": "nats, estimated",
        "weights": "share, or shape of the tail of the weights",
    }
    with figure(path, [list(panels)], (13, 4)) as axes:
        for name, curves in panels.items():
            lines = {label: (steps, [run[key] for run in runs.values()]) for key, label in curves.items()}
            plot_lines(axes[name], lines, "step of the ladder Δτ (nats per component)", units[name], log="x")


if __name__ == "__main__":
    main()
