"""What a user passes to the trainer, checked before a model is loaded."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models import kinds, loading, prior
from ..models import vocabulary as tokens
from ..models.prompts import encode_prompts
from ..types import Prompts
from .config import ALDRIFTConfig
from .data import check_dataset


@dataclass
class Inputs:
    """Tokenizer and prompts of a run, and what is known of its model.

    Attributes:
        tokenizer: makes token ids of prompts, and texts of completions.
        prompts, eval_prompts: encoded.
        context_length: most positions that the model can attend to; `None` where its config does not say.
        adapter: whether the model comes with an adapter on it.
        vocabulary: number of tokens that the model has; `None` where that is known once it is loaded.
        pad_token_id: the token that fills rows; its value has no effect.
        max_completion_length: tokens after which a completion is cut.
    """

    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    eval_prompts: Prompts
    context_length: int | None
    adapter: bool
    vocabulary: int | None
    pad_token_id: int
    max_completion_length: int

    def encode(self, dataset: Any, name: str) -> Prompts:
        """Other prompts, checked and encoded alike; `name` is for error messages."""
        return encode_prompts(
            check_dataset(dataset, name),
            self.tokenizer,
            max_completion_length=self.max_completion_length,
            context_length=self.context_length,
            vocabulary=self.vocabulary,
        )

    def eos_token_ids(self, model: PreTrainedModel) -> tuple[int, ...]:
        """The tokens that end a completion, with a check that the model, now that it is there, has all tokens needed.

        Raises:
            ValueError: for an end-of-text token or a prompt that it does not have.
        """
        ends = tokens.eos_token_ids(model, self.tokenizer)
        self.vocabulary = tokens.size_of(model)
        for prompts in (self.prompts, self.eval_prompts):
            tokens.check_prompts(prompts.token_ids, self.tokenizer, self.vocabulary)
        return ends


def check_writable(output_dir: str) -> str:
    """Create the output directory and try to write to it.

    Returns:
        Its absolute path: a cost may change the working directory.

    Raises:
        OSError: naming it and the remedy.
    """
    try:
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except (OSError, ValueError) as error:
        raise OSError(
            f"output_dir {output_dir!r} cannot be written: {error}. Choose another one, or change its permissions."
        ) from error
    return os.path.abspath(output_dir)


def check_inputs(
    args: ALDRIFTConfig,
    model: str | PreTrainedModel | PeftModel,
    peft_config: PeftConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
    train: Dataset,
    evaluation: Dataset,
) -> Inputs:
    """Check model, adapter and tokenizer against each other, and encode the prompts.

    Raises:
        ValueError, TypeError: for what cannot work, with the remedy.
    """
    kinds.check_model(model)
    if isinstance(model, str):
        loading.check_source(model, args.model_init_kwargs)
    if peft_config is not None:
        prior.check_peft_config(peft_config)
    if not isinstance(model, str) and args.model_init_kwargs is not None:
        raise ValueError("model_init_kwargs is for a model given by id or path, and this one is loaded. Drop it.")
    adapter = loading.is_adapter(model, args.model_init_kwargs)  # asked once: the Hub is asked where it is an id
    config = loading.config_of(model, args.model_init_kwargs, adapter)  # before the tokenizer: is there such a model?
    tokenizer = loading.tokenizer_of(model, args.model_init_kwargs) if tokenizer is None else tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"processing_class must be a tokenizer, got {type(tokenizer).__name__}")
    tokens.check_tokenizer(tokenizer)
    loading.check_trainable(config, args.model_init_kwargs, adapter or peft_config is not None)
    if isinstance(model, str):
        kinds.check_loadable(config, loading.mapping_of(args.model_init_kwargs))
        size = loading.vocabulary_size(config, args.model_init_kwargs)
    else:
        size = tokens.size_of(prior.base_model(model))
    # A saved adapter can bring more tokens with it: then the model is asked once it is there.
    known = None if adapter and isinstance(model, str) else size
    tokens.check_tokenizer(tokenizer, known)
    context_length = loading.context_length(config)
    prompts, *others = (
        encode_prompts(
            dataset,
            tokenizer,
            max_completion_length=args.max_completion_length,
            context_length=context_length,
            vocabulary=known,
        )
        for dataset in ([train] if evaluation is train else [train, evaluation])
    )
    best = (args.metric_for_best_model or "").removeprefix("eval_") if args.eval_strategy != "no" else ""
    if best == "missing_mass" and others and others[0].keys != prompts.keys:
        raise ValueError(
            "metric_for_best_model='missing_mass' is measured on the training prompts alone. Leave eval_dataset out, "
            "or take another metric, such as 'kl_forward'."
        )
    return Inputs(
        tokenizer=tokenizer,
        prompts=prompts,
        eval_prompts=others[0] if others else prompts,
        context_length=context_length,
        adapter=adapter,
        vocabulary=known,
        pad_token_id=tokens.pad_token_id(tokenizer, size),
        max_completion_length=args.max_completion_length,
    )
