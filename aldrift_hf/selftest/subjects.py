"""What is tested: a model under an adapter that was moved, in a trainer of its own."""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from .. import loading
from ..config import ALDRIFTConfig
from ..prior import base_model, keep_four_bit_weights
from ..problems.priors import word_tokenizer
from ..prompts import encode_prompt
from ..proposals import Draws, generate, neutral_generation_config, uniforms
from ..sequences import Completions, inference, sequence_logprobs
from ..trainer import ALDRIFTTrainer
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
LADDER = {"tau_step": 1.0, "num_chains": 128, "chain_length": 4}
LEARNING = {"updates_per_rung": 24, "per_device_train_batch_size": 64, "learning_rate": 1e-2}


@dataclass(eq=False)
class Subject:
    """A model under test.

    Attributes:
        options: how it is run.
        trainer: holds it, under an adapter that was moved away from the prior.
        completions: `n` of them, to be scored after each of the trainer's `P` prompts.
        before: `[P, n]`, their log-probabilities under the model as it was before it had an adapter: the prior, nats.
        make: makes the bare model anew, with a vocabulary of so many tokens; `None` where `completions` are not all
            that there are.
    """

    options: Options
    trainer: ALDRIFTTrainer
    completions: Completions
    before: Tensor
    make: Callable[[int], PreTrainedModel] | None

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

    @contextlib.contextmanager
    def running(self) -> Iterator[PreTrainedModel]:
        """The policy, in eval mode and in the precision of training."""
        with self.trainer.proposer.running(), inference(self.trainer.model):
            yield base_model(cast(nn.Module, self.trainer.model))

    @functools.cached_property
    def log_q(self) -> Tensor:
        """`[P, n]`, nats."""
        with self.running() as model:
            return _scores(model, self.prompts, self.completions)

    @functools.cached_property
    def log_prior(self) -> Tensor:
        """`[P, n]`, with the adapter off, nats."""
        with self.running(), self.trainer.proposer.prior.active(self.trainer.model) as model:
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
        with self.running() as model:
            draws = generate(model, prompts, config, uniforms((self.options.seed,), range(len(prompts)), length))
            scored = sequence_logprobs(model, prompts, draws.completions, pad_token_id=END, batch_size=BATCH)
        return draws, scored

    @functools.cached_property
    def drawn(self) -> tuple[Completions, float]:
        """Many draws; and the nats between generation's `log q` and the scorer's, as far as that can be rounding."""
        draws, scored = self.draw(DRAWS, LENGTH, [END])
        return draws.completions, min((draws.log_probs - scored).abs().max().item(), self.rounding())

    @functools.cached_property
    def runs(self) -> dict[str, Subject]:
        """The bare model after a whole run, by sampler."""
        trained = {}
        for sampler in ("metropolis_hastings", "archive"):
            model = cast(Callable[[int], PreTrainedModel], self.make)(VOCABULARY)
            args = self.options.training(sampler=sampler, **TARGET, **LADDER, **LEARNING)
            trainer = _trainer(model, args, word_tokenizer(WORDS, " "), PROMPTS)
            trainer.train()
            trained[sampler] = replace(self, trainer=trainer)
        return trained


def tiny_subject(config: PreTrainedConfig, options: Options) -> Subject:
    """A model of `config`'s family, small enough for every completion to be enumerated.

    Raises:
        NotShrunkError: if none can be made.
    """
    torch.set_num_threads(1)  # models this small spend their time on waking threads up
    load = loader(options)

    def make(vocabulary: int) -> PreTrainedModel:
        with tempfile.TemporaryDirectory(dir=options.folder) as checkpoint:
            tiny_model(config, vocabulary, options.seed).save_pretrained(checkpoint)
            return cast(PreTrainedModel, load(checkpoint))

    completions, args = every_completion(LENGTH, VOCABULARY, [END]), options.training(**TARGET)
    return _subject(options, make(VOCABULARY), word_tokenizer(WORDS, " "), args, PROMPTS, completions, make)


def whole_subject(model: PreTrainedModel | PeftModel, options: Options) -> Subject:
    """A model as it is: what can be checked without all of its completions."""
    args = options.training(max_completion_length=WHOLE_LENGTH)
    tokenizer = loading.tokenizer_of(cast(str, options.model_name_or_path), args)
    ids = cast(list[int], tokenizer(WHOLE_TEXT, add_special_tokens=False)["input_ids"])
    completions = Completions.of([ids[start : 2 * start + 1] for start in range(WHOLE_LENGTH)], END)
    return _subject(options, model, tokenizer, args, WHOLE_PROMPTS, completions, None)


def loader(options: Options) -> Callable[[str], PreTrainedModel | PeftModel]:
    """What loads a model as the trainer would, onto the device; it is asked for before there is a trainer."""
    args = options.training(model_init_kwargs=options.init_kwargs())

    def load(name: str) -> PreTrainedModel | PeftModel:
        model = loading.load_model(name, args)
        keep_four_bit_weights(model)
        return model if options.load_in_4bit else model.to(options.device)

    return load


def _subject(
    options: Options,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    args: ALDRIFTConfig,
    prompts: Sequence[str],
    completions: Completions,
    make: Callable[[int], PreTrainedModel] | None,
) -> Subject:
    token_ids = [encode_prompt(prompt, 0, tokenizer) for prompt in prompts]
    with options.autocast(), inference(model):
        before = _scores(base_model(model), token_ids, completions)
    subject = Subject(options, _trainer(model, args, tokenizer, prompts), completions, before, make)
    # Random numbers where LoRA begins with zeros, larger ones until the model's probabilities have changed.
    generator = torch.Generator().manual_seed(options.seed)
    weights = [weight for name, weight in subject.trainer.model.named_parameters() if "lora_B" in name]
    for scale in (0.01 * 2**power for power in range(10)):
        for weight in weights:
            if weight.requires_grad:  # not the prior's
                weight.data += (scale * torch.randn(weight.shape, generator=generator)).to(weight)
        with subject.running() as policy:
            if (_scores(policy, token_ids, completions) - before).abs().max() > MOVED:
                return subject
    raise ValueError("an adapter on this model does not change its probabilities")


def _trainer(
    model: PreTrainedModel | PeftModel, args: ALDRIFTConfig, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> ALDRIFTTrainer:
    """A quiet one, with LoRA on whatever takes it, and dropout in it, to be seen where it is left on."""
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        lora_dropout=0.0 if any(weight.dim() == 3 for weight in model.parameters()) else 0.1,  # not on experts
        target_modules="all-linear",
        exclude_modules=["out_proj"],  # PEFT refuses it in Mamba's family
        fan_in_fan_out=base_model(model).config.model_type == "gpt2",
    )
    peft_config = None if isinstance(model, PeftModel) else adapter
    trainer = ALDRIFTTrainer(
        model, _not_a, args, train_dataset=list(prompts), processing_class=tokenizer, peft_config=peft_config
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _not_a(prompts: list[Any], completions: list[str]) -> list[float]:
    """The cost: words that are not `a`."""
    return [float(sum(word != "a" for word in text.split())) for text in completions]


def _scores(model: PreTrainedModel, prompts: Sequence[list[int]], completions: Completions) -> Tensor:
    """`[P, n]` log-probabilities of the completions after each prompt, nats."""
    n = len(completions.length)
    return torch.stack(
        [sequence_logprobs(model, [prompt] * n, completions, pad_token_id=END, batch_size=BATCH) for prompt in prompts]
    )
