"""Schedule visits along a line so that there is no waiting for departures: the paper's experiment for TOPIFT.

    accelerate launch recipes/line_scheduling.py                  # ALDRIFT: a sampler of p_T
    accelerate launch recipes/line_scheduling.py --sampler top    # TOPIFT: the 4 best of 12 proposals, 16 times

The prior chooses the length of a visit to each of 10 stations, with a local preference for longer visits at some of
them. The cost is the total time spent waiting for departures (recipes/problems/line_scheduling.py has the definition).
TOPIFT finds schedules without waiting, but ends with a handful of them. ALDRIFT keeps thousands, and as much of the
preference as p_T does. Both are compared with the exact p_T of the preference as defined, so errors of the prior, which
learned the preference from samples, count as distance, too.

All options of ALDRIFTConfig and of TRL's ModelConfig work, here and in YAML (--config FILE.yaml).
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np
from evaluation.enumeration import text_log_probs
from evaluation.line_scheduling import EXACT, compare, draw_figure, first_waitless_rung, preference_in_words
from evaluation.sentences import effort_in_words, missing_mass_in_words
from problems.line_scheduling import LineSchedulingProblem
from problems.prior import RecipeModelConfig
from problems.training import RecipeConfig, make_trainer
from rich.console import Console
from trl import TrlParser

from aldrift_hf.algorithm.samplers import SAMPLERS
from aldrift_hf.models.prior import base_model


@dataclass
class LineArguments:
    """The line, and what is compared."""

    stations: int = field(default=10, metadata={"help": "K, the number of stations."})
    longest_visit: int = field(
        default=20, metadata={"help": "The longest visit in minutes; the shortest is one minute."}
    )
    travel: int = field(default=10, metadata={"help": "Minutes from one station to the next."})
    headway: int = field(default=5, metadata={"help": "Minutes between two departures."})
    phase: int = field(
        default=0, metadata={"help": "Departures are in the minutes that equal this number modulo the headway."}
    )
    preference: float = field(
        default=2.0,
        metadata={"help": "Strength of the preference for long visits at every third station; 0: no preference."},
    )
    draws: int = field(
        default=4096, metadata={"help": "Number of draws of the prior, the model and the chains that are compared."}
    )


@dataclass
class LineConfig(RecipeConfig):
    """ALDRIFT's settings, with this recipe's defaults. Some depend on the sampler: TOPIFT needs little data."""

    output_dir: Optional[str] = field(
        default="out/line_scheduling", metadata={"help": "Folder that all files are written to."}
    )
    tau_max: float = field(default=4.0, metadata={"help": "T. With 4, 82 %% of p_T are schedules without waiting."})
    tau_step: Optional[float] = field(default=0.25, metadata={"help": "Step of the linear ladder."})
    sampler: str = field(
        default="metropolis_hastings",
        metadata={"choices": SAMPLERS, "help": "How proposals become samples of a rung's target; top is TOPIFT."},
    )
    num_generations: Optional[int] = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Number of proposals per rung. None: 3,072; 12 with --sampler top."}
    )
    chain_length: Optional[int] = field(
        default=None, metadata={"help": "Number of proposals per sample. None: 6; 3 with --sampler top."}
    )
    updates_per_rung: Optional[int] = field(
        default=None, metadata={"help": "Optimizer updates per rung. None: 40; 10 with --sampler top."}
    )
    per_device_train_batch_size: Optional[int] = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Samples per update and process. None: 128; 4 with --sampler top."}
    )

    def __post_init__(self) -> None:
        topift = self.sampler == "top"
        defaults = {
            "num_generations": 12 if topift else 3072,
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
        """KL(exact p_T || model), estimated by a mean over exact draws, whose probabilities are known under both."""
        log_q = text_log_probs(references, base_model(trainer.model), trainer.processing_class)
        return float(np.mean(problem.log_probs(exact, references) - log_q))

    # With chains of length 1, samples are uncorrected draws of the model, which is the prior before training.
    draws = {"prior": list(trainer.sample(options.draws, chain_length=1)["completion"])}
    distances = {"prior": kl()}
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    draws["model"] = list(trainer.sample(options.draws, chain_length=1)["completion"])
    distances["model"] = kl()
    if config.sampler != "top":
        draws["corrected"] = list(trainer.sample(options.draws)["completion"])
    draws[EXACT] = references
    if trainer.is_world_process_zero():
        folder, console, rungs = Path(config.output_dir), Console(), trainer.record.rungs
        table = compare(problem, draws, config.tau_max, distances)
        table.print()
        table.write_markdown(folder / "line_scheduling.md")
        console.print(effort_in_words(rungs[-1]))
        waitless = first_waitless_rung(rungs)
        if waitless is not None:
            console.print(
                f"the samples first wait less than half a minute on average in rung {waitless} of {len(rungs)}"
            )
        if problem.favourites:
            console.print(preference_in_words(problem, draws, config.tau_max))
        console.print(missing_mass_in_words(trainer.record.metrics))
        draw_figure(problem, draws, rungs, folder / "line_scheduling.png")
        console.print(f"figure and table: {folder}/line_scheduling.*   rungs: {folder}/rungs.jsonl   adapter: {folder}")
    if config.push_to_hub:
        trainer.push_to_hub()  # again, now with the figure


if __name__ == "__main__":
    main()
