"""What a rung cannot do without, done bare, and its time: `generate`, two forward passes, plain optimizer steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from aldrift_hf.models.prior import base_model
from aldrift_hf.models.scoring import inference
from aldrift_hf.toy import word_tokenizer

END = 0  # the token that ends a text; word_tokenizer's first


def _llama(**sizes: int) -> Callable[[int], PreTrainedConfig]:
    return lambda vocabulary: LlamaConfig(vocab_size=vocabulary, bos_token_id=END, eos_token_id=END, **sizes)


@dataclass(frozen=True)
class Size:
    """A model with random weights: what it computes is of no interest, how long it takes is the same.

    Attributes:
        config: makes the architecture for a size of vocabulary.
        vocabulary: tokens.
        dtype: of the weights.
        rows: completions generated at once.
    """

    config: Callable[[int], PreTrainedConfig]
    vocabulary: int
    dtype: torch.dtype
    rows: int


SIZES = {
    "tiny": Size(
        lambda vocabulary: GPT2Config(
            vocab_size=vocabulary, n_embd=64, n_layer=2, n_head=4, bos_token_id=END, eos_token_id=END
        ),
        512,
        torch.float32,
        512,
    ),
    "small": Size(
        _llama(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4
        ),
        8_192,
        torch.float32,
        128,
    ),
    # A narrow model with a vocabulary as large as they come: for the memory of scoring alone.
    "wide": Size(
        _llama(
            hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4
        ),
        128_256,
        torch.float32,
        64,
    ),
    # The shape of a well-known one of 1.2 billion parameters.
    "1b": Size(
        _llama(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
        128_256,
        torch.bfloat16,
        256,
    ),
}


def make_model(size: Size, length: int, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Random weights, and an output bias under which a completion ends after `length` tokens on average."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(size.config(size.vocabulary), dtype=size.dtype)
        width = model.config.get_text_config().hidden_size
        model.lm_head = nn.Linear(width, size.vocabulary, dtype=size.dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)  # logits near 0: every token but the last one is about as likely
        model.lm_head.bias.zero_()
        model.lm_head.bias[END] = torch.tensor((size.vocabulary - 1) / (length - 1)).log()
    words = [f"w{number}" for number in range(size.vocabulary - 2)]
    return model.eval(), word_tokenizer(words, " ")


class BareRung:
    """The parts of a rung with nothing around them, on a model of its own.

    Args:
        model: a copy of the one that the trainer trains.
        peft_config: its adapter.
        proposals, rows: how many completions in all, and at once.
        length: most tokens of a completion.
        updates, batch: of learning.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        peft_config: LoraConfig,
        proposals: int,
        rows: int,
        length: int,
        updates: int,
        batch: int,
    ) -> None:
        torch.manual_seed(0)
        self.policy: PeftModel = cast(PeftModel, get_peft_model(model, peft_config))
        self.proposals, self.rows, self.length, self.updates, self.batch = proposals, rows, length, updates, batch
        trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.device = next(self.policy.parameters()).device

    def seconds(self) -> dict[str, float]:
        """Of each part, in the order of a rung."""
        taken: dict[str, float] = {}
        with timed(self.device, taken, "generate"), inference(self.policy):
            drawn = [self._generate() for _ in range(0, self.proposals, self.rows)]
        with timed(self.device, taken, "forward, prior"), inference(self.policy), self.policy.disable_adapter():
            self._score(drawn)
        with timed(self.device, taken, "forward, policy"), inference(self.policy):
            self._score(drawn)
        with timed(self.device, taken, "updates"):
            self._learn(torch.cat(drawn))
        return taken

    def _generate(self) -> Tensor:
        config = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=self.length, eos_token_id=END, pad_token_id=END
        )
        start = torch.full((self.rows, 1), END, device=self.device)
        policy = cast(Any, base_model(self.policy))
        ids = policy.generate(start, attention_mask=torch.ones_like(start), generation_config=config)
        return torch.cat([ids, ids.new_full((len(ids), self.length + 1 - ids.shape[1]), END)], dim=1)

    def _score(self, drawn: list[Tensor]) -> None:
        for ids in drawn:
            for part in torch.split(ids, max(1, 2**14 // ids.shape[1])):
                base_model(self.policy)(input_ids=part, use_cache=False)

    def _learn(self, ids: Tensor) -> None:
        self.policy.train()
        for update in range(self.updates):
            rows = ids[torch.arange(update * self.batch, (update + 1) * self.batch) % len(ids)]
            logits = self.policy(input_ids=rows).logits[:, :-1].float()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            cast(Any, loss).backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


@contextmanager
def timed(device: torch.device, taken: dict[str, float], name: str) -> Iterator[None]:
    """Seconds of a `with` block, what it queued on the device included."""
    _wait(device)
    start = time.perf_counter()
    yield
    _wait(device)
    taken[name] = time.perf_counter() - start


@contextmanager
def peak_memory(device: torch.device, peaks: dict[str, float], name: str) -> Iterator[None]:
    """The most memory (MiB) that a `with` block held beyond what was there; on a CPU as seen every millisecond."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        yield
        peaks[name] = (module.max_memory_allocated() - before) / 2**20
        return
    process, done, seen = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.001):
            seen[0] = max(seen[0], process.memory_info().rss)

    before, watcher = process.memory_info().rss, threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    peaks[name] = max(0, seen[0] - before) / 2**20


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
