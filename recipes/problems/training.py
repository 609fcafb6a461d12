"""From a problem and command-line settings to an [`aldrift_hf.ALDRIFTTrainer`]."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from transformers.trainer_utils import get_last_checkpoint

from aldrift_hf import ALDRIFTConfig, ALDRIFTTrainer
from aldrift_hf.algorithm.ladders.linear import linear_ladder
from aldrift_hf.algorithm.samplers import Sampler
from problems.prior import RecipeModelConfig, completion_limit, make_prior
from problems.text_problem import TextProblem

logger = logging.getLogger(__name__)


@dataclass
class RecipeConfig(ALDRIFTConfig):
    """ALDRIFT's settings, with defaults for the small model that is trained on the spot."""

    per_device_train_batch_size: int = field(
        default=128,
        metadata={
            "help": "Samples per batch and process. With sampler=archive, smaller batches are accumulated to 128 per "
            "update, unless gradient_accumulation_steps is set."
        },
    )
    num_generations: Optional[int] = field(default=1024, metadata={"help": "Number of proposals per prompt per rung."})
    num_rungs: Optional[int] = field(
        default=None,
        metadata={
            "help": "Number of rungs. None: as many as the linear ladder has; the adaptive one stays at tau_max "
            "until the model is close to p_T, no longer comes closer, or a budget is spent."
        },
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "High, for a small model with a small adapter."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule, over all rungs."})
    max_completion_length: Optional[int] = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Largest number of tokens per completion. None: the length of the longest of 1,000 random strings; "
            "for a model given by name, 10 %% more."
        },
    )
    per_device_generation_batch_size: Optional[int] = field(
        default=1024, metadata={"help": "Number of completions that each process generates or scores at once."}
    )

    def __post_init__(self) -> None:
        if self.ladder == "adaptive":
            self.tau_step = None  # a recipe's default step is for the linear ladder
        elif self.num_rungs is None and self.tau_step is not None:  # what recipes/README.md measured
            self.num_rungs = len(linear_ladder(self.tau_max or 1.0, self.tau_step))
        super().__post_init__()

    def settle(self) -> list[str]:
        asked = self.max_completion_length
        if asked is None:  # make_trainer sets it; the checks need a number
            self.max_completion_length = ALDRIFTConfig.max_completion_length
        left_open = super().settle()
        self.max_completion_length = asked
        return left_open


def left_open(output_dir: Path, tau_max: float, budget: int, seed: int, **given: Any) -> RecipeConfig:
    """Settings of a run with T, D and a budget of objective calls, which leaves to the trainer what it can find.

    Args:
        output_dir: a folder for the run.
        tau_max: T.
        budget: `max_objective_calls`.
        seed: random seed.
        given: settings that are not left open.
    """
    settings: dict[str, Any] = {
        **{"output_dir": str(output_dir), "tau_max": tau_max, "max_objective_calls": budget, "seed": seed},
        **{"num_generations": None, "learning_rate": None, "lr_scheduler_type": ALDRIFTConfig.lr_scheduler_type},
        **{"save_strategy": "no", "report_to": "none", "disable_tqdm": True},
    }
    return RecipeConfig(**settings | given)


def make_trainer(
    problem: TextProblem, config: ALDRIFTConfig, model_config: RecipeModelConfig, sampler: Sampler | None = None
) -> ALDRIFTTrainer:
    """A trainer for a problem, on its prior.

    Args:
        problem: the problem.
        config: the settings. An `objective_range` or `max_completion_length` of `None` is set to the problem's own.
        model_config: which model, and which adapter.
        sampler: a sampler of one's own; `None` takes the settings'.
    """
    if model_config.model_name_or_path is not None and (config.learning_rate or 0) >= 1e-3:
        logger.warning(
            f"learning_rate={config.learning_rate:g} is meant for the small model that is trained on the spot; LoRA on "
            "a pretrained model usually needs 1e-4 to 3e-4. Set --learning_rate."
        )
    model, tokenizer, peft_config = make_prior(problem, model_config)
    if config.objective_range is None:
        config.objective_range = float(problem.worst_cost)
    if config.max_completion_length is None:
        config.max_completion_length = completion_limit(problem, tokenizer, model_config)
    return ALDRIFTTrainer(
        model=model,
        objective=problem.cost,
        args=config,
        train_dataset=problem.prompts,
        processing_class=tokenizer,
        peft_config=peft_config,
        sampler=sampler,
    )


def one_of_several(config: ALDRIFTConfig, name: str, **changes: Any) -> ALDRIFTConfig:
    """The settings of one of several runs of a recipe: each has a folder and a repository of its own.

    If the recipe is resumed, the run is resumed from its own last checkpoint, or starts from scratch if it has none.

    Args:
        config: the recipe's settings.
        name: name of the run's folder in `output_dir`, and last part of the name of its repository.
        changes: settings of this run alone.
    """
    run = copy.deepcopy(config)
    run.output_dir = str(Path(str(config.output_dir)) / name)
    run.hub_model_id = f"{config.hub_model_id or Path(str(config.output_dir)).name}-{name}"
    for field_name, value in changes.items():
        setattr(run, field_name, value)
    asked = config.resume_from_checkpoint and Path(run.output_dir).is_dir()
    run.resume_from_checkpoint = get_last_checkpoint(run.output_dir) if asked else None
    return run
