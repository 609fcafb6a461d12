"""From a problem and a command line to a trainer: what the recipes have in common."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, cast

import numpy as np
from peft import PeftConfig, PeftModel
from problems.spanning_tree import SpanningTreeProblem, load_problem
from problems.text_problem import TextProblem
from problems.warm_up import warm_up
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, get_peft_config, get_quantization_config

from aldrift_hf.models.loading import NO_FOREIGN_CODE, own_device
from aldrift_hf.models.prior import keep_four_bit_weights
from aldrift_hf.toy import SmallPriorConfig, completion_ids, small_prior
from aldrift_hf.trainer.config import ALDRIFTConfig
from aldrift_hf.trainer.trainer import ALDRIFTTrainer
from evaluation.enumeration import Enumeration

logger = logging.getLogger(__name__)


@dataclass
class RecipeConfig(ALDRIFTConfig):
    """ALDRIFT's settings, with defaults for a small model made on the spot."""

    per_device_train_batch_size: int = field(default=128, metadata={"help": "Samples an update, a process."})
    learning_rate: float = field(default=1e-3, metadata={"help": "High, for a small model with a small adapter."})
    max_completion_length: Optional[int] = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Tokens; None: the longest of 1,000 strings, and a tenth more."}
    )
    generation_batch_size: Optional[int] = field(
        default=1024, metadata={"help": "Completions a process works on at once."}
    )

    def __post_init__(self) -> None:
        if self.ladder == "adaptive":
            self.tau_step = None  # a recipe's own step is for the linear ladder
        super().__post_init__()


@dataclass
class RecipeModelConfig(ModelConfig):
    """TRL's model settings; without a model the prior is made on the spot."""

    use_peft: bool = field(default=True, metadata={"help": "LoRA; --no_use_peft fine-tunes the small prior in full."})
    lora_target_modules: Optional[list[str]] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "LoRA target modules."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})
    prior_layers: int = field(
        default=2,
        metadata={
            "help": "Layers of the small model. Costs that look far across a string, as on large graphs, want more."
        },
    )
    prior_steps: int = field(default=800, metadata={"help": "Updates that make the prior (small model or warm-up)."})


def make_prior(
    problem: TextProblem, model_config: RecipeModelConfig
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, PeftConfig | None]:
    """The prior, its tokenizer, and the adapter that is to be trained (`None` where the prior brings its own).

    Raises:
        SystemExit: for a model by name without an adapter, which could not be warmed up.
    """
    peft_config = get_peft_config(model_config)
    steps = model_config.prior_steps
    if model_config.model_name_or_path is None:
        size = SmallPriorConfig(layers=model_config.prior_layers, steps=steps)
        model, tokenizer = small_prior(problem.words, problem.separator, problem.random_texts, size)
        if peft_config is not None:
            peft_config.fan_in_fan_out = True  # GPT-2 keeps its weights transposed
        return model, tokenizer, peft_config
    if peft_config is None:
        raise SystemExit("a model given by name is warmed up with LoRA; leave --no_use_peft out")
    name = model_config.model_name_or_path
    source = {"revision": model_config.model_revision, **NO_FOREIGN_CODE}
    tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(name, **source))
    quantization = get_quantization_config(model_config)
    model = AutoModelForCausalLM.from_pretrained(
        name,
        **source,
        dtype=model_config.dtype,
        attn_implementation=model_config.attn_implementation,
        quantization_config=quantization,
        device_map=own_device() if quantization is not None else None,
    )
    keep_four_bit_weights(model)
    peft_config.fan_in_fan_out = model.config.model_type == "gpt2"
    fitted = warm_up(
        model, tokenizer, problem.random_texts, peft_config, steps=steps, batch_size=16, learning_rate=2e-4
    )
    return fitted, tokenizer, None


def make_trainer(problem: TextProblem, config: ALDRIFTConfig, model_config: RecipeModelConfig) -> ALDRIFTTrainer:
    """A trainer on the problem's prior; D and the completions' length are the problem's, unless set.

    Args:
        problem: what is drawn and what it costs.
        config: its `objective_range` and `max_completion_length` are filled in where they are `None`.
        model_config: which model.
    """
    if model_config.model_name_or_path is not None and config.learning_rate >= 1e-3:
        logger.warning(
            f"learning_rate={config.learning_rate:g} is for the small model made on the spot; LoRA on a pretrained one "
            "usually wants 1e-4 to 3e-4 (--learning_rate)."
        )
    model, tokenizer, peft_config = make_prior(problem, model_config)
    if config.objective_range is None:
        config.objective_range = float(problem.worst_cost)
    if cast(Optional[int], config.max_completion_length) is None:
        longest = longest_completion(problem, tokenizer)
        # With one token a word all strings are as long as their words; other tokenizers have longer ones yet.
        config.max_completion_length = longest if model_config.model_name_or_path is None else longest + longest // 10
    return ALDRIFTTrainer(
        model=model,
        objective=problem.cost,
        args=config,
        train_dataset=problem.prompts,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def longest_completion(problem: TextProblem, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest of 1,000 of the problem's strings, the end-of-text token included."""
    return max(map(len, completion_ids(problem.random_texts(1000, np.random.default_rng(0)), tokenizer)))


def can_enumerate(problem: TextProblem, model_config: RecipeModelConfig, at_most: int) -> bool:
    """Whether every string can be written down: at most so many, and the small model made on the spot."""
    return model_config.model_name_or_path is None and problem.number_of_strings() <= at_most


def enumerable_graph(name: str, model_config: RecipeModelConfig, at_most: int) -> SpanningTreeProblem:
    """The graph of a recipe that needs every string, before anything is computed.

    Raises:
        SystemExit: for a name that is no graph, or a graph or a model whose strings cannot be enumerated.
    """
    try:
        problem = load_problem(name)
    except ValueError as error:
        raise SystemExit(f"--graph: {error}") from None
    if not can_enumerate(problem, model_config, at_most):
        raise SystemExit("this recipe enumerates every string: take a smaller graph, and the prior made on the spot")
    return problem


def enumerate_strings(problem: TextProblem, trainer: ALDRIFTTrainer) -> Enumeration:
    """Every string of the problem."""
    tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
    return Enumeration.of(problem.all_texts(), problem.cost_of, problem.worst_cost, tokenizer)


def one_of_several(config: ALDRIFTConfig, name: str, **changes: Any) -> ALDRIFTConfig:
    """The settings of one of a recipe's runs: a folder and a repository of its own, resumed where it was interrupted.

    Args:
        config: the recipe's settings.
        name: of the run, of its folder in `output_dir`, and the end of its repository's.
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
