"""Cluster iris by writing: local hints in the prior, the global fit in the cost, k-means beside it.

    accelerate launch recipes/clustering.py

A string assigns every flower to a cluster. The prior knows hints alone: must-links (two neighbours are of one species)
and prefer-links (close neighbours tend to be in one cluster). The cost is the within-cluster sum of squares above the
best that 100 runs of k-means find. ALDRIFT draws partitions that keep all hints and fit nearly as well; k-means fits
without knowing of hints. aldrift_hf/problems/clustering.py has the definitions.

Every option of ALDRIFTConfig and of TRL's ModelConfig works, here and in YAML (--config FILE.yaml).
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from evaluation.clustering_report import KMEANS, compare, draw_figure, kmeans_draws
from evaluation.recipe import RecipeConfig, RecipeModelConfig, make_trainer
from evaluation.reports import effort_in_words, missing_mass_in_words
from problems.clustering import ClusteringProblem
from rich.console import Console
from trl import TrlParser


@dataclass
class ClusteringArguments:
    """The points and the hints."""

    data: str = field(default="iris", metadata={"help": "iris or wine, from scikit-learn."})
    points: int = field(default=36, metadata={"help": "How many of its points, evenly over its kinds."})
    clusters: int = field(default=3, metadata={"help": "k."})
    must_link_share: float = field(
        default=0.3, metadata={"help": "Share of the neighbours of one species that are must-links."}
    )
    draws: int = field(default=1024, metadata={"help": "Draws of the prior, the model and the chains to compare."})


@dataclass
class ClusteringConfig(RecipeConfig):
    """ALDRIFT's settings, with this recipe's defaults."""

    output_dir: Optional[str] = field(default="out/clustering", metadata={"help": "Where everything is written."})
    tau_max: float = field(default=1.5, metadata={"help": "T, nats per tenth of the best known sum of squares."})
    tau_step: Optional[float] = field(default=0.05, metadata={"help": "Step of the ladder."})
    num_chains: int = field(default=256, metadata={"help": "m, chains (and so samples) a rung."})
    chain_length: Optional[int] = field(default=4, metadata={"help": "M, proposals a chain. None: m squared."})
    updates_per_rung: Optional[int] = field(default=20, metadata={"help": "Optimizer updates a rung."})


def main() -> None:
    parser = TrlParser((ClusteringArguments, ClusteringConfig, RecipeModelConfig))
    options, config, model_config = parser.parse_args_and_config()
    try:
        problem = ClusteringProblem.load(options.data, options.points, options.clusters, options.must_link_share)
    except ValueError as error:
        sys.exit(f"the problem: {error}")
    trainer = make_trainer(problem, config, model_config)
    # Chains of one step are plain draws of the model, which before training is the prior.
    draws = {"prior": list(trainer.sample(options.draws, chain_length=1)["completion"])}
    result = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    draws["model"] = list(trainer.sample(options.draws, chain_length=1)["completion"])
    draws["corrected"] = list(trainer.sample(options.draws)["completion"])
    if trainer.is_world_process_zero():
        draws[KMEANS] = kmeans_draws(problem, 100)
        folder, console, records = Path(config.output_dir), Console(), trainer.progress.records
        table = compare(problem, draws)
        table.print()
        table.write_markdown(folder / "clustering.md")
        console.print(effort_in_words(records[-1]))
        console.print(missing_mass_in_words(result.metrics.get("final_missing_mass")))
        draw_figure(problem, draws, records, folder / "clustering.png")
        console.print(f"figure and table: {folder}/clustering.*   rungs: {folder}/rungs.jsonl   adapter: {folder}")
    if config.push_to_hub:
        trainer.push_to_hub()  # once more, with the figure


if __name__ == "__main__":
    main()
