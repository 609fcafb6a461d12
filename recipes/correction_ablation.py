"""Is the Metropolis-Hastings step needed? Three samplers on the same ladder, measured exactly after every rung.

    accelerate launch recipes/correction_ablation.py

Prior, number of proposals per rung and number of updates per rung are the same. Only the step from proposals to samples
differs: metropolis_hastings (ALDRIFT), reweight (resampling by exp(-step d), as if the model were exactly the last
rung's target), and top (the proposals of lowest cost). All strings of the problem are enumerated, so after each rung
the distance of the model L_tau from the rung's target p_tau is known exactly: KL divergence and total variation.

All options of ALDRIFTConfig and of TRL's ModelConfig work, here and in YAML (--config FILE.yaml).
"""

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

SAMPLERS = ("metropolis_hastings", "reweight", "top")


@dataclass
class AblationArguments:
    """The problem."""

    graph: str = field(
        default="florentine-core",
        metadata={"help": "The graph, as in recipes/spanning_tree.py; its strings are enumerated."},
    )
    enumerate_up_to: int = field(default=50_000, metadata={"help": "Largest number of strings that may be enumerated."})


@dataclass
class AblationConfig(RecipeConfig):
    """ALDRIFT's settings, with this recipe's defaults. The recipe varies `sampler`."""

    output_dir: Optional[str] = field(
        default="out/correction_ablation",
        metadata={"help": "Folder that all files are written to, with a subfolder per sampler."},
    )
    tau_max: float = field(default=6.0, metadata={"help": "T, in nats per component."})
    tau_step: Optional[float] = field(default=0.6, metadata={"help": "Step of the linear ladder."})
    num_generations: int = field(
        default=1536, metadata={"help": "Number of proposals per rung, for num_generations / chain_length samples."}
    )
    chain_length: Optional[int] = field(
        default=6, metadata={"help": "Number of proposals per sample. None: the paper's M = m squared."}
    )
    updates_per_rung: Optional[int] = field(default=20, metadata={"help": "Optimizer updates per rung."})
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
        runs[sampler] = trainer.record.rungs
    if trainer.is_world_process_zero():
        report(runs, Path(config.output_dir))


def report(runs: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Print and write the table, the main result in a sentence, and the figure."""
    rungs = min(map(len, runs.values()))  # a limit on objective calls may end the runs at different rungs
    runs = {name: records[:rungs] for name, records in runs.items()}
    taus = [record["tau"] for record in runs[SAMPLERS[0]]]
    table = Comparison("after the updates of a rung, over all strings", list(runs))
    for key, label in (("exact_kl", "KL(p_τ || L_τ), nats"), ("exact_tv", "TV(p_τ, L_τ)")):
        for rung in range(0, len(taus), max(1, len(taus) // 5)):
            table.add(f"{label}, τ = {taus[rung]:g}", {name: records[rung][key] for name, records in runs.items()})
        table.add(f"{label}, τ = {taus[-1]:g} (last)", {name: records[-1][key] for name, records in runs.items()})
    table.add("success: probability of a tree", {name: r[-1]["exact_success"] for name, r in runs.items()}, ".3f")
    table.add(
        "share of distinct samples in the last rung", {name: r[-1]["distinct_samples"] for name, r in runs.items()}
    )
    table.print()
    table.write_markdown(folder / "correction_ablation.md")
    Console().print(verdict(runs))
    with figure(folder / "correction_ablation.png", [["kl", "tv", "cost"]], (13, 4)) as axes:
        x = "inverse temperature τ (nats per unit of cost)"
        panels = {
            "kl": ("exact_kl", "KL(p_τ || L_τ) (nats)", "y"),
            "tv": ("exact_tv", "total variation of p_τ and L_τ", ""),
            "cost": ("exact_cost", "mean cost of L_τ (components - 1)", ""),
        }
        for name, (key, label, log) in panels.items():
            lines = {sampler: (taus, [record[key] for record in records]) for sampler, records in runs.items()}
            plot_lines(axes[name], lines, x, label, log=log)
    Console().print(f"figure and table: {folder}/correction_ablation.*   rungs: {folder}/*/rungs.jsonl")


def verdict(runs: dict[str, list[dict[str, Any]]]) -> str:
    """How much more the error grows along the ladder without the correction than with it."""
    excess = [
        without["exact_kl"] - corrected["exact_kl"]
        for without, corrected in zip(runs["reweight"], runs["metropolis_hastings"], strict=True)
    ]
    half = len(excess) // 2
    return (
        "KL of reweight minus KL of metropolis_hastings: "
        f"{excess[0]:+.2f} nats after the first rung, {excess[half]:+.2f} halfway, {excess[-1]:+.2f} at the end"
    )


if __name__ == "__main__":
    main()
