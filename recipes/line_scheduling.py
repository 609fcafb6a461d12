"""Schedule visits along a line so that no departure is missed: the experiment of TOPIFT, and what ALDRIFT adds.

    accelerate launch recipes/line_scheduling.py                  # ALDRIFT: a sampler of p_T
    accelerate launch recipes/line_scheduling.py --sampler top    # TOPIFT: the 4 best of 12 proposals, 16 times

The prior chooses a visit length for each of 10 stations, longer ones at some stations: a local preference. The cost is
the total wait for departures (aldrift_hf/problems/line_scheduling.py has the definition). TOPIFT finds schedules
without a wait, and ends with a handful of them; ALDRIFT keeps thousands, and of the preference as much as it should.
The exact p_T of the preference itself is known, and stands beside both; what the prior's model gets wrong of the
preference counts as distance, too.

Every option of ALDRIFTConfig and of TRL's ModelConfig works, here and in YAML (--config FILE.yaml).
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np
from evaluation.enumeration import text_log_probs
from evaluation.line_scheduling_report import EXACT, compare, draw_figure, first_waitless_rung, preference_in_words
from evaluation.recipe import RecipeConfig, RecipeModelConfig, make_trainer
from evaluation.reports import effort_in_words, missing_mass_in_words
from problems.line_scheduling import LineSchedulingProblem
from rich.console import Console
from trl import TrlParser

from aldrift_hf.models.prior import base_model


@dataclass
class LineArguments:
    """The line."""

    stations: int = field(default=10, metadata={"help": "K, stations to visit."})
    longest_visit: int = field(default=20, metadata={"help": "Minutes; the shortest visit is one minute."})
    travel: int = field(default=10, metadata={"help": "Minutes from a station to the next."})
    headway: int = field(default=5, metadata={"help": "Minutes between two departures."})
    phase: int = field(default=0, metadata={"help": "Departures leave at minutes that equal it modulo the headway."})
    preference: float = field(
        default=2.0, metadata={"help": "How strongly long visits are preferred at every third station; 0: not at all."}
    )
    draws: int = field(default=4096, metadata={"help": "Draws of the prior, the model and the chains to compare."})


@dataclass
class LineConfig(RecipeConfig):
    """ALDRIFT's settings, with this recipe's defaults; for --sampler top those of TOPIFT."""

    output_dir: Optional[str] = field(default="out/line_scheduling", metadata={"help": "Where everything is written."})
    tau_max: float = field(default=4.0, metadata={"help": "T: with 4, p_T is 82 %% schedules without a wait."})
    tau_step: Optional[float] = field(default=0.25, metadata={"help": "Step of the ladder."})
    num_chains: Optional[int] = field(  # type: ignore[assignment]
        default=None, metadata={"help": "m, samples a rung. None: 512; 4 with --sampler top."}
    )
    chain_length: Optional[int] = field(
        default=None, metadata={"help": "M, proposals a sample. None: 6; 3 with --sampler top (12 proposals a round)."}
    )
    updates_per_rung: Optional[int] = field(
        default=None, metadata={"help": "Optimizer updates a rung. None: 40; 10 with --sampler top."}
    )
    per_device_train_batch_size: Optional[int] = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Samples an update, a process. None: 128; 4 with --sampler top."}
    )

    def __post_init__(self) -> None:
        topift = self.sampler == "top"
        defaults = {
            "num_chains": 4 if topift else 512,
            "chain_length": 3 if topift else 6,
            "updates_per_rung": 10 if topift else 40,
            "per_device_train_batch_size": 4 if topift else 128,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()


def main() -> None:
    parser = TrlParser((LineArguments, LineConfig, RecipeModelConfig))
    options, config, model_config = parser.parse_args_and_config()
    settings = {name: value for name, value in vars(options).items() if name != "draws"}
    try:
        problem = LineSchedulingProblem(**settings)
    except ValueError as error:
        sys.exit(f"the line: {error}")
    trainer = make_trainer(problem, config, model_config)
    exact = problem.marginals(config.tau_max)
    references = problem.draw(exact, options.draws, np.random.default_rng(config.seed))

    def kl() -> float:
        """KL(exact p_T || model): a mean over exact draws, both probabilities being known."""
        log_q = text_log_probs(references, base_model(trainer.model), trainer.processing_class)
        return float(np.mean(problem.log_probs(exact, references) - log_q))

    # Chains of one step are plain draws of the model, which before training is the prior.
    draws = {"prior": list(trainer.sample(options.draws, chain_length=1)["completion"])}
    distances = {"prior": kl()}
    result = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    draws["model"] = list(trainer.sample(options.draws, chain_length=1)["completion"])
    distances["model"] = kl()
    if config.sampler != "top":
        draws["corrected"] = list(trainer.sample(options.draws)["completion"])
    draws[EXACT] = references
    if trainer.is_world_process_zero():
        folder, console, records = Path(config.output_dir), Console(), trainer.progress.records
        table = compare(problem, draws, config.tau_max, distances)
        table.print()
        table.write_markdown(folder / "line_scheduling.md")
        console.print(effort_in_words(records[-1]))
        waitless = first_waitless_rung(records)
        if waitless is not None:
            console.print(
                f"samples wait less than half a minute on average, first in rung {waitless} of {len(records)}"
            )
        if problem.favourites:
            console.print(preference_in_words(problem, draws, config.tau_max))
        console.print(missing_mass_in_words(result.metrics.get("final_missing_mass")))
        draw_figure(problem, draws, records, folder / "line_scheduling.png")
        console.print(f"figure and table: {folder}/line_scheduling.*   rungs: {folder}/rungs.jsonl   adapter: {folder}")
    if config.push_to_hub:
        trainer.push_to_hub()  # once more, with the figure


if __name__ == "__main__":
    main()
