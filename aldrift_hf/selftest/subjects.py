"""What is tested: a model under an adapter that was moved, in a trainer of its own."""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from ..models.generation import Draws, generate, neutral_generation_config
from ..models.loading import is_adapter
from ..models.prior import base_model
from ..models.scoring import inference, sequence_logprobs
from ..streams import uniforms
from ..toy import word_tokenizer
from ..trainer.config import ALDRIFTConfig
from ..trainer.trainer import ALDRIFTTrainer
from ..types import Completions
from .exact import every_completion
from .options import BATCH, Options
from .tiny import END, tiny_model

# Of a tiny model every completion is known; of a whole one, some.
WORDS = ["a", "b", "c", "d"]
VOCABULARY = len(WORDS) + 2
PROMPTS = ["", "b", "a c b d c"]
WHOLE_PROMPTS = ["One", "It was a", "The quick brown fox jumps over the lazy"]
WHOLE_TEXT = """A wind came up from the south and pushed all the boats back into the harbour, where the fishermen sat
on upturned crates, mended their nets and told each other what they would have caught out there."""
LENGTH, WHOLE_LENGTH = 4, 16
DRAWS = 4000  # a prompt

ROUNDING = {"float32": 5e-4, "float16": 0.02, "bfloat16": 0.1}
"""Nats, times the square root of a completion's tokens, by which two ways to compute its log-probability may differ."""
WHOLE_ROUNDING = 4.0
"""How much more that is in a model of many layers, whose logits are larger."""
MOVED = 0.3
"""Nats by which the adapter moves at least one log-probability."""

TARGET = {"tau_max": 2.0, "objective_range": float(LENGTH), "max_completion_length": LENGTH}
LADDER = {"tau_step": 1.0, "num_chains": 256, "chain_length": 4}
RUN = {**LADDER, "updates_per_rung": 24, "per_device_train_batch_size": 64, "learning_rate": 5e-3}


@dataclass(eq=False)
class Subject:
    """A model under test.

    Attributes:
        options: how it is run.
        trainer: holds it, under an adapter that was moved away from the prior.
        completions: `n` of them, to be scored after each of the trainer's `P` prompts.
        before: `[P, n]`, their log-probabilities when the adapter still did nothing: the prior's, nats.
        make: makes a trainer of the same model anew, with a vocabulary and settings of its own; `None` where
            `completions` are not all that there are.
    """

    options: Options
    trainer: ALDRIFTTrainer
    completions: Completions
    before: Tensor
    make: Callable[..., ALDRIFTTrainer] | None

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids."""
        return self.trainer.prompts.token_ids

    def rounding(self, tokens: int | None = None) -> float:
        """Most nats by which two ways to compute the log-probability of so many tokens may differ.

        Args:
            tokens: `None`: of the longest of `completions`.
        """
        a_token = ROUNDING[self.options.computes_in] * (1.0 if self.make else WHOLE_ROUNDING)
        return a_token * math.sqrt(tokens or self.completions.ids.shape[1])

    @functools.cached_property
    def log_q(self) -> Tensor:
        """`[P, n]`, nats."""
        return policy_scores(self.trainer, self.completions)

    @functools.cached_property
    def log_prior(self) -> Tensor:
        """`[P, n]`, with the adapter off, nats."""
        with running(self.trainer), self.trainer.proposer.prior.active(self.trainer.model) as model:
            return _scores(model, self.prompts, self.completions)

    @functools.cached_property
    def log_target(self) -> Tensor:
        """`log p_T` up to a constant, `[P, n]`, nats."""
        texts = self.trainer.proposer.decode(self.completions)
        return self.before - self.trainer.args.tau_max * torch.tensor(_not_a([], texts), dtype=torch.float64)

    def draw(self, per_prompt: int, length: int, ends: list[int]) -> tuple[Draws, Tensor]:
        """Draws of the policy, one prompt after the other in every batch, and `log q` by the scorer."""
        prompts = self.prompts * per_prompt
        config = neutral_generation_config(max_completion_length=length, eos_token_ids=ends, pad_token_id=END)
        with running(self.trainer) as model:
            draws = generate(model, prompts, config, uniforms((self.options.seed,), range(len(prompts)), length))
            scored = sequence_logprobs(model, prompts, draws.completions, pad_token_id=END, batch_size=BATCH)
        return draws, scored

    @functools.cached_property
    def drawn(self) -> tuple[Completions, float]:
        """Many draws; and the nats between generation's `log q` and the scorer's, as far as that can be rounding."""
        draws, scored = self.draw(DRAWS, LENGTH, [END])
        return draws.completions, min((draws.log_probs - scored).abs().max().item(), self.rounding())

    @functools.cached_property
    def runs(self) -> dict[str, ALDRIFTTrainer]:
        """Trainers after a whole run, by sampler."""
        make = cast(Callable[..., ALDRIFTTrainer], self.make)
        trainers = {sampler: make(sampler=sampler, **RUN) for sampler in ("metropolis_hastings", "archive")}
        for trainer in trainers.values():
            trainer.train()
        return trainers


def tiny_subject(config: PreTrainedConfig, options: Options) -> Subject:
    """A model of `config`'s family, small enough for every completion to be enumerated.

    Raises:
        NotShrunkError: if none can be made.
    """
    torch.set_num_threads(1)  # models this small spend their time on waking threads up

    def make(vocabulary: int = VOCABULARY, **settings: Any) -> ALDRIFTTrainer:
        checkpoint = tempfile.mkdtemp(dir=options.folder)
        tiny_model(config, vocabulary, options.seed).save_pretrained(checkpoint)
        return _trainer(checkpoint, options.training(**TARGET, **settings), PROMPTS, word_tokenizer(WORDS, " "))

    return _moved(options, make(), every_completion(LENGTH, VOCABULARY, [END]), make)


def whole_subject(name: str, options: Options) -> Subject:
    """A model as it is, by its path or id: what can be checked without all of its completions.

    Raises:
        OSError, ValueError, ImportError: if it cannot be loaded, or trained.
    """
    trainer = _trainer(name, options.training(max_completion_length=WHOLE_LENGTH), WHOLE_PROMPTS)
    ids = cast(Any, trainer.processing_class)(WHOLE_TEXT, add_special_tokens=False)["input_ids"]
    completions = Completions.of([ids[start : 2 * start + 1] for start in range(WHOLE_LENGTH)], END)
    return _moved(options, trainer, completions, None)


@contextlib.contextmanager
def running(trainer: ALDRIFTTrainer) -> Iterator[PreTrainedModel]:
    """The policy, in eval mode and in the precision of training."""
    with trainer.proposer.running(), inference(trainer.model):
        yield base_model(cast(nn.Module, trainer.model))


def policy_scores(trainer: ALDRIFTTrainer, completions: Completions) -> Tensor:
    """`[P, n]` log-probabilities of the completions after each of the trainer's prompts, nats."""
    with running(trainer) as model:
        return _scores(model, trainer.prompts.token_ids, completions)


class _Unrecorded(ALDRIFTTrainer):
    def write_record(self) -> None:
        """Nothing: nobody reads it, and to draw a report takes longer than such a run."""


def _trainer(
    name: str, args: ALDRIFTConfig, prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> ALDRIFTTrainer:
    """A quiet one, with LoRA on whatever takes it, unless the model is an adapter already."""
    # PEFT refuses out_proj in Mamba's family.
    lora = LoraConfig(task_type="CAUSAL_LM", lora_alpha=16, target_modules="all-linear", exclude_modules=["out_proj"])
    trainer = _Unrecorded(
        name,
        _not_a,
        args,
        train_dataset=list(prompts),
        processing_class=tokenizer,
        peft_config=None if is_adapter(name, args) else lora,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _moved(
    options: Options,
    trainer: ALDRIFTTrainer,
    completions: Completions,
    make: Callable[..., ALDRIFTTrainer] | None,
) -> Subject:
    """With random numbers where LoRA begins with zeros, larger ones until the model's probabilities have changed."""
    before = policy_scores(trainer, completions)
    generator = torch.Generator().manual_seed(options.seed)
    for scale in (0.01 * 2**power for power in range(10)):
        for name, weight in cast(nn.Module, trainer.model).named_parameters():
            if weight.requires_grad and "lora_B" in name:
                weight.data += (scale * torch.randn(weight.shape, generator=generator)).to(weight)
        if (policy_scores(trainer, completions) - before).abs().max() > MOVED:
            return Subject(options, trainer, completions, before, make)
    raise ValueError("an adapter on this model does not change its probabilities")


def _not_a(prompts: list[Any], completions: list[str]) -> list[float]:
    """The cost: words that are not `a`."""
    return [float(sum(word != "a" for word in text.split())) for text in completions]


def _scores(model: PreTrainedModel, prompts: Sequence[list[int]], completions: Completions) -> Tensor:
    n = len(completions.length)
    return torch.stack(
        [sequence_logprobs(model, [prompt] * n, completions, pad_token_id=END, batch_size=BATCH) for prompt in prompts]
    )
