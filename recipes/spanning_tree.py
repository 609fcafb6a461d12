"""Train a small language model to draw spanning trees of a real social network.

    accelerate launch recipes/spanning_tree.py

The prior names n-1 edges of a graph in a fixed order: a local rule, learned from uniform draws. The global rule, that
the edges connect all nodes, is known only to the cost: d = components - 1. ALDRIFT turns the prior L into a sampler of
p_T(s) ~ L(s) exp(-T d(s)), whose draws are spanning trees. Kirchhoff's theorem tells how close the sampler came.

Other graphs: --graph davis|tutte|karate|random:N,P|FILE.edgelist. Other models: --model_name_or_path ID_OR_PATH.
All options of ALDRIFTConfig and of TRL's ModelConfig work, here and in YAML (--config FILE.yaml).
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np
from evaluation.enumeration import Enumeration, can_enumerate, enumerate_strings
from evaluation.sentences import effort_in_words, missing_mass_in_words
from evaluation.spanning_tree import compare, draw_figure, uncounted_trees
from problems.prior import RecipeModelConfig
from problems.spanning_tree import SpanningTreeProblem, load_problem
from problems.training import RecipeConfig, make_trainer
from rich.console import Console
from trl import TrlParser

from aldrift_hf import ALDRIFTTrainer
from aldrift_hf.models.prior import base_model


@dataclass
class SpanningTreeArguments:
    """The problem, and what is compared."""

    graph: str = field(
        default="florentine",
        metadata={
            "help": "The graph: florentine, florentine-core, davis, tutte, karate, random:N,P, or the path of an edge "
            "list."
        },
    )
    draws: int = field(
        default=4096, metadata={"help": "Number of draws of the prior, the model and the chains that are compared."}
    )
    enumerate_up_to: int = field(
        default=50_000,
        metadata={"help": "Enumerate all strings, for exact distances, if there are at most this many."},
    )


@dataclass
class SpanningTreeConfig(RecipeConfig):
    """ALDRIFT's settings, with this recipe's defaults."""

    output_dir: Optional[str] = field(
        default="out/spanning_tree", metadata={"help": "Folder that all files are written to."}
    )
    tau_max: float = field(
        default=6.0, metadata={"help": "T. With 6, 98 %% of p_T are spanning trees of the default graph."}
    )
    tau_step: Optional[float] = field(default=0.6, metadata={"help": "Step of the linear ladder."})
    num_generations: int = field(default=512, metadata={"help": "Number of proposals per rung."})
    chain_length: Optional[int] = field(
        default=4, metadata={"help": "Proposals per Metropolis-Hastings chain. None: the paper's M = m squared."}
    )
    learning_rate: float = field(default=3e-3, metadata={"help": "High, for a small model with a small adapter."})
    lr_scheduler_type: str = field(
        default="warmup_stable_decay",
        metadata={"help": "The learning rate is constant, and falls to 0 over the last 30 %% of the updates."},
    )
    updates_per_rung: Optional[int] = field(default=100, metadata={"help": "Optimizer updates per rung."})


def main() -> None:
    parser = TrlParser((SpanningTreeArguments, SpanningTreeConfig, RecipeModelConfig))
    options, config, model_config = parser.parse_args_and_config()
    try:
        problem = load_problem(options.graph)
    except ValueError as error:
        sys.exit(f"--graph: {error}")
    trainer = make_trainer(problem, config, model_config)
    enumerable = can_enumerate(problem, model_config, options.enumerate_up_to)
    strings = enumerate_strings(problem, trainer) if enumerable else None
    log_probs = {} if strings is None else {"prior": strings.log_probs(base_model(trainer.model))}
    # With chains of length 1, samples are uncorrected draws of the model, which is the prior before training.
    draws = {"prior": list(trainer.sample(options.draws, chain_length=1)["completion"])}

    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()

    uncorrected = trainer.sample(options.draws, chain_length=1)
    uncounted = uncounted_trees(problem, uncorrected["completion"], uncorrected["log_model"])
    draws["model"] = list(uncorrected["completion"])
    draws["corrected"] = list(trainer.sample(options.draws)["completion"])
    if strings is not None:
        log_probs["model"] = strings.log_probs(base_model(trainer.model))
        log_probs["exact p_T"] = strings.target(log_probs["prior"], config.tau_max)
        draws["exact p_T"] = strings.draw(log_probs["exact p_T"], options.draws, np.random.default_rng(config.seed))
    if trainer.is_world_process_zero():
        report(problem, draws, strings, log_probs, uncounted, trainer)
    if config.push_to_hub:
        trainer.push_to_hub()  # again, now with the figure


def report(
    problem: SpanningTreeProblem,
    draws: dict[str, list[str]],
    strings: Optional[Enumeration],
    log_probs: dict[str, np.ndarray],
    uncounted: float,
    trainer: ALDRIFTTrainer,
) -> None:
    """Print and write the table, the missing mass, a few trees and the figure."""
    folder, console, rungs = Path(trainer.args.output_dir), Console(), trainer.record.rungs
    table = compare(problem, draws, strings, log_probs)
    table.print()
    table.write_markdown(folder / "spanning_tree.md")
    console.print(effort_in_words(rungs[-1]))
    console.print(missing_mass_in_words(trainer.record.metrics))
    console.print(
        f"trees: the model's draws cover {np.exp(-uncounted):.1%} of the {problem.number_of_trees():,.6g} spanning "
        f"trees that Kirchhoff's theorem counts ({uncounted:.2f} nats are missing)"
    )
    for text in sorted({text for text in draws["corrected"] if problem.cost_of(text) == 0})[:3]:
        console.print(f"a tree: {text}", highlight=False)
    draw_figure(problem, draws, rungs, folder / "spanning_tree.png")
    console.print(f"figure and table: {folder}/spanning_tree.*   rungs: {folder}/rungs.jsonl   adapter: {folder}")


if __name__ == "__main__":
    main()
