"""Cluster the iris data by text: local hints are in the prior, the global fit is in the cost.

    accelerate launch recipes/clustering.py

A string assigns every flower to a cluster. The prior knows only hints: must-links (two neighbours of one species are in
one cluster) and prefer-links (close neighbours tend to be in one cluster). The cost is the within-cluster sum of
squares, relative to the best of 100 runs of k-means, which does not know the hints. ALDRIFT draws partitions that keep
all hints and fit almost as well. recipes/problems/clustering.py has the definitions.

All options of ALDRIFTConfig and of TRL's ModelConfig work, here and in YAML (--config FILE.yaml).
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from evaluation.clustering import KMEANS, compare, draw_figure, kmeans_draws
from evaluation.sentences import effort_in_words, missing_mass_in_words
from problems.clustering import ClusteringProblem
from problems.prior import RecipeModelConfig
from problems.training import RecipeConfig, make_trainer
from rich.console import Console
from trl import TrlParser

from aldrift_hf.algorithm.samplers import SAMPLERS


@dataclass
class ClusteringArguments:
    """The points, the hints, and what is compared."""

    data: str = field(default="iris", metadata={"help": "The data set: iris or wine, from scikit-learn."})
    points: int = field(default=36, metadata={"help": "Number of points, in equal shares of the species."})
    clusters: int = field(default=3, metadata={"help": "k, the number of clusters."})
    must_link_share: float = field(
        default=0.3, metadata={"help": "Share of must-links among neighbours of one species."}
    )
    draws: int = field(
        default=1024, metadata={"help": "Number of draws of the prior, the model and the chains that are compared."}
    )


@dataclass
class ClusteringConfig(RecipeConfig):
    """ALDRIFT's settings, with this recipe's defaults."""

    output_dir: Optional[str] = field(
        default="out/clustering", metadata={"help": "Folder that all files are written to."}
    )
    tau_max: float = field(default=1.5, metadata={"help": "T, in nats per 10 %% of the best known sum of squares."})
    tau_step: Optional[float] = field(default=0.05, metadata={"help": "Step of the linear ladder."})
    sampler: str = field(
        default="metropolis_hastings",
        metadata={"choices": SAMPLERS, "help": "How proposals become samples of a rung's target."},
    )
    num_generations: int = field(
        default=1024, metadata={"help": "Number of proposals per rung: those of 256 chains, each of which is a sample."}
    )
    chain_length: Optional[int] = field(
        default=4, metadata={"help": "Proposals per Metropolis-Hastings chain. None: the paper's M = m squared."}
    )
    updates_per_rung: Optional[int] = field(default=20, metadata={"help": "Optimizer updates per rung."})


def main() -> None:
    parser = TrlParser((ClusteringArguments, ClusteringConfig, RecipeModelConfig))
    options, config, model_config = parser.parse_args_and_config()
    try:
        problem = ClusteringProblem.load(options.data, options.points, options.clusters, options.must_link_share)
    except ValueError as error:
        sys.exit(f"the problem: {error}")
    trainer = make_trainer(problem, config, model_config)
    # With chains of length 1, samples are uncorrected draws of the model, which is the prior before training.
    draws = {"prior": list(trainer.sample(options.draws, chain_length=1)["completion"])}
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    draws["model"] = list(trainer.sample(options.draws, chain_length=1)["completion"])
    draws["corrected"] = list(trainer.sample(options.draws)["completion"])
    if trainer.is_world_process_zero():
        draws[KMEANS] = kmeans_draws(problem, 100)
        folder, console, rungs = Path(config.output_dir), Console(), trainer.record.rungs
        table = compare(problem, draws)
        table.print()
        table.write_markdown(folder / "clustering.md")
        console.print(effort_in_words(rungs[-1]))
        console.print(missing_mass_in_words(trainer.record.metrics))
        draw_figure(problem, draws, rungs, folder / "clustering.png")
        console.print(f"figure and table: {folder}/clustering.*   rungs: {folder}/rungs.jsonl   adapter: {folder}")
    if config.push_to_hub:
        trainer.push_to_hub()  # again, now with the figure


if __name__ == "__main__":
    main()
