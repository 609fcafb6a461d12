"""The parts of a rung without any overhead: `generate`, two forward passes, and plain optimizer updates."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from aldrift_hf.models.prior import base_model
from aldrift_hf.models.scoring import inference
from evaluation.measuring import timed
from evaluation.random_models import END


class BareRung:
    """Does the parts of a rung one after the other, on a model of its own, and measures the time of each.

    Args:
        model: a copy of the model that the trainer trains.
        peft_config: its adapter.
        proposals: number of completions in all.
        rows: number of completions generated or scored at once.
        length: largest number of tokens per completion.
        updates: number of optimizer updates.
        batch: number of completions per update.
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
        """The time of each part, in the order of a rung."""
        taken: dict[str, float] = {}
        with timed(self.device, taken, "generate"), inference(self.policy):
            drawn = [self.generate() for _ in range(0, self.proposals, self.rows)]
        with timed(self.device, taken, "forward, prior"), inference(self.policy), self.policy.disable_adapter():
            self._score(drawn)
        with timed(self.device, taken, "forward, policy"), inference(self.policy):
            self._score(drawn)
        with timed(self.device, taken, "updates"):
            self._learn(torch.cat(drawn))
        return taken

    def generate(self) -> Tensor:
        """`rows` completions after the end-of-text token, padded with it: `[rows, 1 + length]` token ids."""
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
