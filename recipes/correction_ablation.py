"""Is the Metropolis-Hastings step needed? Three corrections on the same ladder, measured exactly at every rung.

    accelerate launch recipes/correction_ablation.py

The same prior, proposals a rung and updates a rung; only the step from proposals to samples differs:
metropolis_hastings (ALDRIFT), reweight (resampled by exp(-step d), trusting that the model is where the last rung
wanted it), and top (the m best). Every string of the problem is enumerated, so that after each rung the distance of
what was learnt, L_tau, from what was meant, p_tau, is known: KL and total variation, without sampling noise.

Every option of ALDRIFTConfig and of TRL's ModelConfig works, here and in YAML (--config FILE.yaml).
"""

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

SAMPLERS = ("metropolis_hastings", "reweight", "top")


@dataclass
class AblationArguments:
    """The problem."""

    graph: str = field(
        default="florentine-core", metadata={"help": "As in recipes/spanning_tree.py; small enough to enumerate."}
    )
    enumerate_up_to: int = field(default=50_000, metadata={"help": "Strings that may be enumerated after every rung."})


@dataclass
class AblationConfig(RecipeConfig):
    """ALDRIFT's settings, with this recipe's defaults; `sampler` is what the recipe varies."""

    output_dir: Optional[str] = field(
        default="out/correction_ablation", metadata={"help": "Where everything is written, a folder for each sampler."}
    )
    tau_max: float = field(default=6.0, metadata={"help": "T."})
    tau_step: Optional[float] = field(default=0.6, metadata={"help": "Step of the ladder."})
    num_chains: int = field(default=256, metadata={"help": "m, samples a rung."})
    chain_length: Optional[int] = field(default=6, metadata={"help": "M, proposals a sample. None: m squared."})
    updates_per_rung: Optional[int] = field(default=20, metadata={"help": "Optimizer updates a rung."})
    learning_rate: float = field(default=5e-4, metadata={"help": "High, for a small model with a small adapter."})


def main() -> None:
    parser = TrlParser((AblationArguments, AblationConfig, RecipeModelConfig))
    options, config, model_config = parser.parse_args_and_config()
    problem = enumerable_graph(options.graph, model_config, options.enumerate_up_to)
    runs: dict[str, list[dict[str, Any]]] = {}
    exact: Optional[ExactRungs] = None
    for sampler in SAMPLERS:
        run = one_of_several(config, sampler, sampler=sampler)
        trainer = make_trainer(problem, run, model_config)
        exact = ExactRungs(trainer, enumerate_strings(problem, trainer), exact and exact.log_prior)
        trainer.add_callback(exact)
        trainer.train(resume_from_checkpoint=run.resume_from_checkpoint)
        trainer.save_model()
        runs[sampler] = trainer.progress.records
    if trainer.is_world_process_zero():
        report(runs, Path(config.output_dir))


def report(runs: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """The table, the verdict and the figure."""
    rungs = min(map(len, runs.values()))  # a budget of objective calls ends them at different ones
    runs = {name: records[:rungs] for name, records in runs.items()}
    taus = [record["tau"] for record in runs[SAMPLERS[0]]]
    table = Comparison("after the updates of each rung, over all strings", list(runs))
    for key, label in (("exact_kl", "KL(p_τ || L_τ), nats"), ("exact_tv", "TV(p_τ, L_τ)")):
        for rung in range(0, len(taus), max(1, len(taus) // 5)):
            table.add(f"{label}, τ = {taus[rung]:g}", {name: records[rung][key] for name, records in runs.items()})
        table.add(f"{label}, τ = {taus[-1]:g} (last)", {name: records[-1][key] for name, records in runs.items()})
    table.add("success: mass of the trees", {name: r[-1]["exact_success"] for name, r in runs.items()}, ".3f")
    table.add("distinct share of the last samples", {name: r[-1]["distinct_samples"] for name, r in runs.items()})
    table.print()
    table.write_markdown(folder / "correction_ablation.md")
    Console().print(verdict(runs))
    with figure(folder / "correction_ablation.png", [["kl", "tv", "cost"]], (13, 4)) as axes:
        x = "inverse temperature τ (nats per unit of cost)"
        panels = {
            "kl": ("exact_kl", "KL(p_τ || L_τ) (nats)", "y"),
            "tv": ("exact_tv", "total variation of p_τ and L_τ", ""),
            "cost": ("exact_cost", "mean cost of L_τ (components beyond one)", ""),
        }
        for name, (key, label, log) in panels.items():
            lines = {sampler: (taus, [record[key] for record in records]) for sampler, records in runs.items()}
            plot_lines(axes[name], lines, x, label, log=log)
    Console().print(f"figure and table: {folder}/correction_ablation.*   rungs: {folder}/*/rungs.jsonl")


def verdict(runs: dict[str, list[dict[str, Any]]]) -> str:
    """How the error without the correction grows along the ladder, against the error with it."""
    excess = [
        without["exact_kl"] - corrected["exact_kl"]
        for without, corrected in zip(runs["reweight"], runs["metropolis_hastings"], strict=True)
    ]
    half = len(excess) // 2
    return (
        "reweight's KL above metropolis_hastings's: "
        f"{excess[0]:+.2f} nats after the first rung, {excess[half]:+.2f} half-way, {excess[-1]:+.2f} at the end"
    )


if __name__ == "__main__":
    main()
