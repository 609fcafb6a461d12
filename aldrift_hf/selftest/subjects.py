"""What is tested: a model with an adapter that differs from the prior, in a trainer of its own."""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from ..models import quiet
from ..models.adapters import cast_trained
from ..models.generation import generate, neutral_generation_config
from ..models.loading import is_adapter
from ..models.prior import base_model
from ..models.scoring import inference, sequence_logprobs
from ..models.sharding import vocabulary_size
from ..reporting.defaults import default_callbacks
from ..streams import uniforms
from ..toy import word_tokenizer
from ..trainer.config import ALDRIFTConfig
from ..trainer.trainer import ALDRIFTTrainer
from ..types import Completions, Draws
from .exact import every_completion
from .options import BATCH, Options
from .tiny import END, tiny_model

# All completions of a tiny model are known; of a whole model, some are looked at.
WORDS = ["a", "b", "c", "d"]
VOCABULARY = len(WORDS) + 2
PROMPTS = ["", "b", "a c b d c"]
WHOLE_PROMPTS = ["One", "It was a", "The quick brown fox jumps over the lazy"]
WHOLE_TEXT = """A wind came up from the south and pushed all the boats back into the harbour, where the fishermen sat
on upturned crates, mended their nets and told each other what they would have caught out there."""
LENGTH, WHOLE_LENGTH = 4, 16
NUM_DRAWS = 4000
"""Draws per prompt in the tests of frequencies."""

ROUNDING = {"float32": 5e-4, "float16": 0.02, "bfloat16": 0.1}
"""Nats, times the square root of the number of tokens, by which two computations of a log-probability may differ."""
WHOLE_ROUNDING = 4.0
"""Factor of `ROUNDING` for a model of many layers, whose logits are larger."""
MIN_MOVE = 0.3
"""Nats by which the adapter must change at least one log-probability."""

SAMPLER = "metropolis_hastings"
"""Of the trainers that do not train: their loss leaves dropout as it is in the model, so that the checks meet it."""
TARGET = {"tau_max": 2.0, "objective_range": float(LENGTH), "max_completion_length": LENGTH, "sampler": SAMPLER}
LADDER = {"tau_step": 1.0, "num_rungs": 2, "num_generations": 1024, "chain_length": 4}
RUN = {**LADDER, "updates_per_rung": 24, "per_device_train_batch_size": 64, "learning_rate": 5e-3}


@dataclass(eq=False)
class Subject:
    """A model under test.

    Attributes:
        options: how it is run.
        trainer: holds the model, with an adapter that was moved away from the prior.
        completions: `n` completions, to be scored after each of the trainer's `P` prompts.
        before: `[P, n]`, their log-probabilities while the adapter had no effect: the prior's, nats.
        make: makes another trainer of the same model, with its own vocabulary and settings; `None` where `completions`
            are not all completions there are.
        num_draws: draws per prompt in the tests of frequencies.
        generate: draws completions; see [`aldrift_hf.models.generation.generate`].
        score: computes log-probabilities; see [`aldrift_hf.models.scoring.sequence_logprobs`].
    """

    options: Options
    trainer: ALDRIFTTrainer
    completions: Completions
    before: Tensor
    make: Callable[..., ALDRIFTTrainer] | None
    num_draws: int = NUM_DRAWS
    generate: Callable[..., Draws] = generate
    score: Callable[..., Tensor] = sequence_logprobs

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids."""
        return self.trainer.run.prompts.token_ids

    def rounding(self, tokens: int | None = None) -> float:
        """Nats by which two computations of a completion's log-probability may differ.

        Args:
            tokens: length of the completion. `None`: the longest of `completions`.
        """
        per_token = ROUNDING[self.options.computes_in] * (1.0 if self.make else WHOLE_ROUNDING)
        return per_token * math.sqrt(tokens or self.completions.ids.shape[1])

    @functools.cached_property
    def log_q(self) -> Tensor:
        """`[P, n]`, log-probabilities under the policy, nats."""
        return policy_scores(self.trainer, self.completions, self.score)

    @functools.cached_property
    def log_prior(self) -> Tensor:
        """`[P, n]`, log-probabilities with the adapter off, nats."""
        rollout = self.trainer.rollout
        with running(self.trainer), rollout.prior.active(rollout.policy()) as model:
            return _scores(self.score, model, self.prompts, self.completions)

    @functools.cached_property
    def log_target(self) -> Tensor:
        """`log p_T` up to a constant for each prompt, `[P, n]`, nats."""
        texts = self.trainer.rollout.decode(self.completions)
        return self.before - self.trainer.run.tau_max * torch.tensor(_count_other_words([], texts)).double()

    def draw(self, per_prompt: int, length: int, ends: list[int], least: int = 0) -> tuple[Draws, Tensor]:
        """Draws of the policy, with the prompts in turn, and their log-probabilities by the scorer.

        Args:
            least: prompts are repeated until they have more tokens than that.
        """
        prompts = [prompt * (1 + least // len(prompt)) for prompt in self.prompts] * per_prompt
        config = neutral_generation_config(max_completion_length=length, eos_token_ids=ends, pad_token_id=END)
        with running(self.trainer) as model:
            draws = self.generate(model, prompts, config, uniforms((self.options.seed,), range(len(prompts)), length))
            scored = self.score(model, prompts, draws.completions, pad_token_id=END, batch_size=BATCH)
        return draws, scored

    @functools.cached_property
    def drawn(self) -> tuple[Completions, float]:
        """Many draws, and the largest difference between generation's and the scorer's `log q` that is rounding."""
        draws, scored = self.draw(self.num_draws, LENGTH, [END])
        return draws.completions, min((draws.log_probs - scored).abs().max().item(), self.rounding())

    @functools.cached_property
    def runs(self) -> dict[str, ALDRIFTTrainer]:
        """Trainers after a whole run, by sampler."""
        make = cast(Callable[..., ALDRIFTTrainer], self.make)
        trainers = {sampler: make(sampler=sampler, **RUN) for sampler in ("metropolis_hastings", "archive")}
        for trainer in trainers.values():
            trainer.train()
        return trainers


def tiny_subject(config: PreTrainedConfig, options: Options, num_draws: int = NUM_DRAWS) -> Subject:
    """A model of `config`'s family, so small that all its completions can be enumerated.

    Raises:
        NotShrunkError: if none can be made.
    """
    torch.set_num_threads(1)  # with models this small, several threads only wait for each other

    def make(vocabulary: int = VOCABULARY, parts: Mapping[str, Any] | None = None, **settings: Any) -> ALDRIFTTrainer:
        checkpoint = tempfile.mkdtemp(dir=options.folder)
        with quiet.late_bars():
            tiny_model(config, vocabulary, options.seed).save_pretrained(checkpoint)
        args = options.training(**{**TARGET, **settings})
        words = word_tokenizer(WORDS, " ")
        return _trainer(checkpoint, args, PROMPTS, options.adapter_dtype, processing_class=words, **(parts or {}))

    subject = _moved(options, make(), every_completion(LENGTH, VOCABULARY, [END]), make)
    subject.num_draws = num_draws
    return subject


def whole_subject(name: str, options: Options) -> Subject:
    """A model as it is, by its path or id, for the checks that do not need all its completions.

    Raises:
        OSError, ValueError, ImportError: if it cannot be loaded or trained.
    """
    args = options.training(max_completion_length=WHOLE_LENGTH, sampler=SAMPLER)
    trainer = _trainer(name, args, WHOLE_PROMPTS, options.adapter_dtype)
    ids = cast(PreTrainedTokenizerBase, trainer.processing_class)(WHOLE_TEXT, add_special_tokens=False)["input_ids"]
    ids = cast(list[int], ids)
    if len(ids) < 2 * WHOLE_LENGTH:  # a tokenizer of another language, as of molecules: arbitrary tokens
        generator = torch.Generator().manual_seed(options.seed)
        size = vocabulary_size(base_model(trainer.model))
        ids = torch.randint(size, (2 * WHOLE_LENGTH,), generator=generator).tolist()
    completions = Completions.of([ids[start : 2 * start + 1] for start in range(WHOLE_LENGTH)], END)
    return _moved(options, trainer, completions, None)


@contextlib.contextmanager
def running(trainer: ALDRIFTTrainer) -> Iterator[PreTrainedModel]:
    """The policy, in eval mode and in the precision of training."""
    rollout = trainer.rollout
    with rollout.runtime.running(True), inference(rollout.policy()):
        yield base_model(rollout.policy())


def policy_scores(
    trainer: ALDRIFTTrainer, completions: Completions, score: Callable[..., Tensor] = sequence_logprobs
) -> Tensor:
    """`[P, n]` log-probabilities of the completions after each of the trainer's prompts, nats."""
    with running(trainer) as model:
        return _scores(score, model, trainer.run.prompts.token_ids, completions)


def _trainer(
    name: str, args: ALDRIFTConfig, prompts: Sequence[str], adapter_dtype: str | None, **kwargs: Any
) -> ALDRIFTTrainer:
    """A trainer that writes and prints nothing, with LoRA on all layers that take it unless `name` is an adapter."""
    # PEFT refuses out_proj in Mamba's family.
    lora = LoraConfig(task_type="CAUSAL_LM", lora_alpha=16, target_modules="all-linear", exclude_modules=["out_proj"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You have passed exclude_modules=.* but no modules were excluded")
        trainer = ALDRIFTTrainer(
            name,
            _count_other_words,
            args,
            train_dataset=list(prompts),
            peft_config=None if is_adapter(name, args.model_init_kwargs) else lora,
            **kwargs,
        )
    for callback in (PrinterCallback, *map(type, default_callbacks(args))):
        trainer.remove_callback(callback)
    if adapter_dtype is not None:
        cast_trained(trainer.rollout.policy(), getattr(torch, adapter_dtype))
    return trainer


def _moved(
    options: Options,
    trainer: ALDRIFTTrainer,
    completions: Completions,
    make: Callable[..., ALDRIFTTrainer] | None,
) -> Subject:
    """A subject whose adapter has random weights where LoRA begins with zeros, large enough to change probabilities."""
    before = policy_scores(trainer, completions)
    if bool(before.isnan().any()):
        raise ValueError(
            "the model's log-probabilities are NaN: its weights are damaged, or it overflows; try --dtype float32"
        )
    generator = torch.Generator().manual_seed(options.seed)
    trained = [(name, weight) for name, weight in trainer.rollout.policy().named_parameters() if weight.requires_grad]
    zeros = [weight for name, weight in trained if "lora_B" in name]
    for scale in (0.01 * 2**power for power in range(10)):
        for weight in zeros or [weight for _, weight in trained]:
            weight.data += (scale * torch.randn(weight.shape, generator=generator)).to(weight)
        if (policy_scores(trainer, completions) - before).abs().max() > MIN_MOVE:
            return Subject(options, trainer, completions, before, make)
    raise ValueError("an adapter on this model does not change its probabilities")


def _count_other_words(prompts: list[Any], completions: list[str]) -> list[float]:
    """The cost: the number of words that are not `a`."""
    return [float(sum(word != "a" for word in text.split())) for text in completions]


def _scores(
    score: Callable[..., Tensor], model: PreTrainedModel, prompts: Sequence[list[int]], completions: Completions
) -> Tensor:
    n = len(completions.length)
    return torch.stack(
        [score(model, [prompt] * n, completions, pad_token_id=END, batch_size=BATCH) for prompt in prompts]
    )
