"""Teach a small language model to draw spanning trees of a real social network.

    accelerate launch recipes/spanning_tree.py

The prior names n-1 edges of a graph in order: a local rule, learnt from uniform draws. That the edges connect all nodes
is the global rule, and only the cost knows it: d = components - 1. ALDRIFT turns the prior L into a sampler of
p_T(s) ~ L(s) exp(-T d(s)), whose draws are spanning trees; Kirchhoff's theorem says how close it came.

Other graphs: --graph davis|tutte|karate|random:N,P|FILE.edgelist. Other models: --model_name_or_path ID_OR_PATH.
Every option of ALDRIFTConfig and of TRL's ModelConfig works, here and in YAML (--config FILE.yaml).
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import numpy as np
from evaluation.enumeration import Enumeration
from evaluation.recipe import RecipeConfig, RecipeModelConfig, can_enumerate, enumerate_strings, make_trainer
from evaluation.reports import effort_in_words, missing_mass_in_words
from evaluation.spanning_tree_report import compare, draw_figure, uncounted_trees
from problems.spanning_tree import SpanningTreeProblem, load_problem
from rich.console import Console
from trl import TrlParser

from aldrift_hf import ALDRIFTTrainer
from aldrift_hf.models.prior import base_model


@dataclass
class SpanningTreeArguments:
    """The problem."""

    graph: str = field(
        default="florentine",
        metadata={
            "help": "florentine, florentine-core, davis, tutte, karate, random:N,P, or the path of an edge list."
        },
    )
    draws: int = field(default=4096, metadata={"help": "Draws of the prior, the model and the chains to compare."})
    enumerate_up_to: int = field(
        default=50_000,
        metadata={"help": "Compare with every string where there are at most so many, and a small model."},
    )


@dataclass
class SpanningTreeConfig(RecipeConfig):
    """ALDRIFT's settings, with this recipe's defaults."""

    output_dir: Optional[str] = field(default="out/spanning_tree", metadata={"help": "Where everything is written."})
    tau_max: float = field(default=6.0, metadata={"help": "T: with 6, p_T is 98 %% trees on the default graph."})
    tau_step: Optional[float] = field(default=0.6, metadata={"help": "Step of the ladder."})
    sampler: Literal["metropolis_hastings", "archive", "top", "reweight"] = field(
        default="archive", metadata={"help": "archive comes closest here; metropolis_hastings is the paper's."}
    )
    num_chains: int = field(default=128, metadata={"help": "m; a rung draws m times M proposals."})
    chain_length: Optional[int] = field(default=4, metadata={"help": "M, proposals a chain. None: m squared."})
    learning_rate: float = field(default=3e-3, metadata={"help": "High, for a small model with a small adapter."})
    lr_scheduler_type: str = field(
        default="warmup_stable_decay", metadata={"help": "Constant, and to 0 over the last 30 %% of the updates."}
    )
    updates_per_rung: Optional[int] = field(default=100, metadata={"help": "Optimizer updates a rung."})


def main() -> None:
    parser = TrlParser((SpanningTreeArguments, SpanningTreeConfig, RecipeModelConfig))
    options, config, model_config = parser.parse_args_and_config()
    try:
        problem = load_problem(options.graph)
    except ValueError as error:
        sys.exit(f"--graph: {error}")
    trainer = make_trainer(problem, config, model_config)
    few = can_enumerate(problem, model_config, options.enumerate_up_to)
    strings = enumerate_strings(problem, trainer) if few else None
    log_probs = {} if strings is None else {"prior": strings.log_probs(base_model(trainer.model))}
    # Chains of one step are plain draws of the model, which before training is the prior.
    draws = {"prior": list(trainer.sample(options.draws, chain_length=1)["completion"])}

    result = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()

    plain = trainer.sample(options.draws, chain_length=1)
    uncounted = uncounted_trees(problem, plain["completion"], plain["log_model"])
    draws["model"] = list(plain["completion"])
    draws["corrected"] = list(trainer.sample(options.draws)["completion"])
    if strings is not None:
        log_probs["model"] = strings.log_probs(base_model(trainer.model))
        log_probs["exact p_T"] = strings.target(log_probs["prior"], config.tau_max)
        draws["exact p_T"] = strings.draw(log_probs["exact p_T"], options.draws, np.random.default_rng(config.seed))
    if trainer.is_world_process_zero():
        report(problem, draws, strings, log_probs, uncounted, trainer, result.metrics)
    if config.push_to_hub:
        trainer.push_to_hub()  # once more, with the figure


def report(
    problem: SpanningTreeProblem,
    draws: dict[str, list[str]],
    strings: Optional[Enumeration],
    log_probs: dict[str, np.ndarray],
    uncounted: float,
    trainer: ALDRIFTTrainer,
    metrics: dict[str, float],
) -> None:
    """The table, the missing mass, a few trees and the figure."""
    folder, console = Path(trainer.args.output_dir), Console()
    table = compare(problem, draws, strings, log_probs)
    table.print()
    table.write_markdown(folder / "spanning_tree.md")
    console.print(effort_in_words(trainer.progress.records[-1]))
    console.print(missing_mass_in_words(metrics.get("final_missing_mass")))
    console.print(
        f"trees: the model's draws account for {np.exp(-uncounted):.1%} of the {problem.number_of_trees():,.6g} that "
        f"Kirchhoff counts ({uncounted:.2f} nats are missing)"
    )
    for text in sorted({text for text in draws["corrected"] if problem.cost_of(text) == 0})[:3]:
        console.print(f"a tree: {text}", highlight=False)
    draw_figure(problem, draws, trainer.progress.records, folder / "spanning_tree.png")
    console.print(f"figure and table: {folder}/spanning_tree.*   rungs: {folder}/rungs.jsonl   adapter: {folder}")


if __name__ == "__main__":
    main()
