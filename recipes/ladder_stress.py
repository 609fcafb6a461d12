"""How large may a step of the ladder be? Steps of 1/D, 2/D, … up to T at once, until coverage breaks.

    accelerate launch recipes/ladder_stress.py

One run of ALDRIFT on the spanning-tree problem for each step, all with the same total of proposals and of updates,
dealt out evenly to their rungs: a ladder of few rungs has many samples on each. Every string is enumerated, so that the
final distance to p_T is exact; beside it what a run can see of itself: acceptance rate, k-hat, missing mass.

Every option of ALDRIFTConfig and of TRL's ModelConfig works, here and in YAML (--config FILE.yaml).
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from evaluation.exact_rungs import ExactRungs
from evaluation.figures import figure, plot_lines
from evaluation.recipe import (
    RecipeConfig,
    RecipeModelConfig,
    enumerable_graph,
    enumerate_strings,
    make_trainer,
    one_of_several,
)
from evaluation.tables import Comparison
from rich.console import Console
from trl import TrlParser


@dataclass
class StressArguments:
    """The problem and the steps."""

    graph: str = field(
        default="florentine", metadata={"help": "As in recipes/spanning_tree.py; small enough to enumerate."}
    )
    steps: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 48], metadata={"help": "Steps of the ladder, in units of 1/D."}
    )
    proposals: int = field(default=9_216, metadata={"help": "Proposals of a run, dealt out to its rungs."})
    updates: int = field(default=288, metadata={"help": "Optimizer updates of a run, dealt out to its rungs."})
    broken_kl: float = field(default=1.0, metadata={"help": "Nats of KL(p_T || model) from which coverage is broken."})
    enumerate_up_to: int = field(default=50_000, metadata={"help": "Strings that may be enumerated."})


@dataclass
class StressConfig(RecipeConfig):
    """ALDRIFT's settings, with this recipe's defaults; step, chains and updates a rung are what the recipe varies."""

    output_dir: Optional[str] = field(
        default="out/ladder_stress", metadata={"help": "Where everything is written, a folder for each step."}
    )
    tau_max: float = field(default=6.0, metadata={"help": "T."})
    chain_length: Optional[int] = field(default=5, metadata={"help": "M, proposals a chain."})
    learning_rate: float = field(default=5e-4, metadata={"help": "High, for a small model with a small adapter."})


def main() -> None:
    parser = TrlParser((StressArguments, StressConfig, RecipeModelConfig))
    options, config, model_config = parser.parse_args_and_config()
    problem = enumerable_graph(options.graph, model_config, options.enumerate_up_to)
    if not options.steps or min(options.steps) < 1:
        sys.exit(f"--steps: whole numbers of at least 1, in units of 1/D; got {options.steps}")
    if config.ladder != "linear":
        sys.exit("--ladder: the steps are what this recipe varies, leave it linear")
    runs: dict[int, dict[str, Any]] = {}
    exact: Optional[ExactRungs] = None
    for step in sorted(set(options.steps)):
        tau_step = min(step / problem.worst_cost, config.tau_max)
        rungs = max(1, math.ceil(config.tau_max / tau_step - 1e-9))
        run = one_of_several(
            config,
            f"step-{step}",
            tau_step=tau_step,
            num_chains=max(1, options.proposals // rungs // config.steps_per_chain),
            updates_per_rung=max(1, options.updates // rungs),
        )
        trainer = make_trainer(problem, run, model_config)
        exact = ExactRungs(trainer, enumerate_strings(problem, trainer), exact and exact.log_prior)
        result = trainer.train(resume_from_checkpoint=run.resume_from_checkpoint)
        trainer.save_model()
        records = trainer.progress.records
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
    """The table, the breaking point and the figure."""
    names = {step: f"{step}/D" for step in runs}
    table = Comparison(f"steps of the ladder, D = {worst_cost:g}", list(names.values()))
    rows = [
        ("step", "step Δτ, nats per component", "g"),
        ("rungs", "rungs", "d"),
        ("samples", "samples a rung", ",d"),
        ("exact_kl", "KL(p_T || model), nats, exact", ".2f"),
        ("exact_tv", "TV(p_T, model), exact", ".2f"),
        ("exact_coverage", "log sup p_T / model, nats, exact", ".2f"),
        ("exact_success", "success: mass of the trees, exact", ".3f"),
        ("missing_mass", "missing mass at the end, nats", ".2f"),
        ("largest_missing_mass", "missing mass, largest of the rungs, nats", ".2f"),
        ("acceptance_rate", "acceptance rate, smallest of the rungs", ".2f"),
        ("ess", "ESS / n, smallest of the rungs", ".3f"),
        ("khat", "k-hat, largest of the rungs", ".2f"),
    ]
    for key, label, spec in rows:
        table.add(label, {names[step]: run[key] for step, run in runs.items()}, spec)
    table.print()
    table.write_markdown(folder / "ladder_stress.md")
    Console().print(verdict(runs, names, broken_kl))
    draw(runs, folder / "ladder_stress.png")
    Console().print(f"figure and table: {folder}/ladder_stress.*   rungs: {folder}/*/rungs.jsonl")


def verdict(runs: dict[int, dict[str, Any]], names: dict[int, str], broken_kl: float) -> str:
    """The best step, and where coverage breaks on either side of it."""
    best = min(runs, key=lambda step: runs[step]["exact_kl"])
    broken = [step for step, run in runs.items() if run["exact_kl"] > broken_kl]
    too_fine = ", ".join(names[step] for step in broken if step < best) or "none"
    too_coarse = ", ".join(names[step] for step in broken if step > best) or "none"
    return (
        f"closest to p_T: steps of {names[best]}. KL above {broken_kl:g} nats: of the larger steps {too_coarse}; of "
        f"the smaller ones, with fewer samples a rung, {too_fine}"
    )


def draw(runs: dict[int, dict[str, Any]], path: Path) -> None:
    """Distances, and what a run sees of itself, against the step."""
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
    units = {"distance": "nats, exact", "inside": "nats, estimated", "weights": "share, or shape of the weights' tail"}
    with figure(path, [list(panels)], (13, 4)) as axes:
        for name, curves in panels.items():
            lines = {label: (steps, [run[key] for run in runs.values()]) for key, label in curves.items()}
            plot_lines(axes[name], lines, "step of the ladder Δτ (nats per component)", units[name], log="x")


if __name__ == "__main__":
    main()
