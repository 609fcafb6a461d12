"""The prior of a problem: a small model trained on the spot, or any causal language model, after a LoRA warm-up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional, cast

import numpy as np
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config, get_quantization_config

from aldrift_hf.models.loading import load_model, tokenizer_of
from aldrift_hf.models.prior import keep_four_bit_weights
from aldrift_hf.toy import SmallPriorConfig, completion_ids, small_prior
from problems.text_problem import TextProblem
from problems.warm_up import warm_up


@dataclass
class RecipeModelConfig(ModelConfig):
    """TRL's model settings. Without `model_name_or_path` the prior is a small model trained on the spot."""

    use_peft: bool = field(
        default=True, metadata={"help": "Train a LoRA adapter; --no_use_peft fine-tunes the small model in full."}
    )
    lora_target_modules: Optional[list[str]] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "LoRA target modules."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})
    prior_layers: int = field(
        default=2,
        metadata={
            "help": "Layers of the small model. Costs that depend on distant parts of a text, as on large graphs, need "
            "more."
        },
    )
    prior_heads: int = field(
        default=4, metadata={"help": "Heads of the small model, 64 wide in all; vLLM on a CPU asks for two."}
    )
    prior_steps: int = field(
        default=800, metadata={"help": "Optimizer updates that train the small model, or the warm-up of another one."}
    )

    @property
    def small_prior(self) -> SmallPriorConfig:
        """Size and training of the small model."""
        return SmallPriorConfig(layers=self.prior_layers, heads=self.prior_heads, steps=self.prior_steps)

    @property
    def warms_up(self) -> bool:
        """Whether a model that is given by name learns the problem's local rule before it is the prior."""
        return True


def make_prior(
    problem: TextProblem, model_config: RecipeModelConfig
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, PeftConfig | None]:
    """The prior of a problem, its tokenizer, and the adapter to train.

    Args:
        problem: the problem, whose local rule the prior learns.
        model_config: which model, and which adapter.

    Returns:
        The model, its tokenizer, and the configuration of the adapter to add for training. It is `None` if the model
        was warmed up and so has one, or is to be fine-tuned in full.

    Raises:
        SystemExit: if a model is given by name without an adapter, so that it cannot be warmed up.
    """
    peft_config = get_peft_config(model_config)
    steps = model_config.prior_steps
    if model_config.model_name_or_path is None:
        model, tokenizer = small_prior(problem.words, problem.separator, problem.random_texts, model_config.small_prior)
        model = problem.prior_from(model, tokenizer)
        if peft_config is not None:
            peft_config.fan_in_fan_out = True  # GPT-2 stores its weights transposed
        return model, tokenizer, peft_config
    if peft_config is None:
        raise SystemExit("a model given by name is warmed up with LoRA: leave out --no_use_peft")
    name, revision = model_config.model_name_or_path, {"revision": model_config.model_revision}
    kwargs = {
        "dtype": model_config.dtype,
        "attn_implementation": model_config.attn_implementation,
        "quantization_config": get_quantization_config(model_config),
    }
    tokenizer = tokenizer_of(name, revision)
    given = {key: value for key, value in kwargs.items() if value is not None}
    model = cast(PreTrainedModel, load_model(name, revision | given, adapter=False))
    keep_four_bit_weights(model)
    peft_config.fan_in_fan_out = model.config.model_type == "gpt2"
    if not model_config.warms_up:
        return model, tokenizer, peft_config
    fitted = warm_up(
        model, tokenizer, problem.random_texts, peft_config, steps=steps, batch_size=16, learning_rate=2e-4
    )
    return fitted, tokenizer, None


def completion_limit(problem: TextProblem, tokenizer: PreTrainedTokenizerBase, model_config: RecipeModelConfig) -> int:
    """Most tokens of a completion, of all methods: those of the longest of 1,000 random strings, with the end-of-text
    token; and a tenth more with the tokenizer of a named model, by which some strings are longer."""
    longest = max(map(len, completion_ids(problem.random_texts(1000, np.random.default_rng(0)), tokenizer)))
    return longest if model_config.model_name_or_path is None else longest + longest // 10
