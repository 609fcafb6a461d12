"""Making gold: draws of the prior, in blocks, with a file that holds all that has been drawn so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from problems.steering import SteeringTask
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aldrift_hf.models.generation import generate, neutral_generation_config
from aldrift_hf.models.prompts import encode_prompt
from aldrift_hf.models.scoring import inference, sequence_logprobs
from aldrift_hf.models.vocabulary import eos_token_ids, pad_token_id
from aldrift_hf.streams import uniforms
from aldrift_hf.types import Completions, Progress
from evaluation.gold import Gold

PURPOSE = 5
"""The purpose of the stream of random numbers: gold's files were drawn by it, and the trainer draws by others."""
CHECKED_DRAWS = 4
"""Draws of a file on which its `log L` is compared with the model's."""
MAX_GAP = 0.05
"""Nats by which they may differ because of rounding."""


class GoldMaker:
    """Draws gold for a task.

    Args:
        task: the task.
        model: the prior, in fp32.
        tokenizer: its tokenizer.
        seed: random seed.
    """

    def __init__(
        self, task: SteeringTask, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
    ) -> None:
        self.task, self.model, self.tokenizer, self.seed = task, model, tokenizer, seed
        self.prompts = [encode_prompt(row["prompt"], index, tokenizer) for index, row in enumerate(task.rows)]
        self.about = {"task": task.name, "max_completion_length": task.max_completion_length, "seed": seed}
        self.pad_token_id = pad_token_id(tokenizer, None)
        self.config = neutral_generation_config(
            max_completion_length=task.max_completion_length,
            eos_token_ids=eos_token_ids(model, tokenizer),
            pad_token_id=self.pad_token_id,
        )

    def make(self, path: Path, draws: int, block: int, progress: Progress) -> Gold:
        """Add draws to a file until it holds as many as asked for; it is written after every block.

        A draw depends on the seed and its number alone, so an interrupted run goes on as if it had not been.

        Args:
            path: the file.
            draws: number of draws, over all prompts.
            block: draws that are made at once.
            progress: shows how far it is.

        Raises:
            ValueError: if the file holds draws of another task, model or seed.
        """
        gold = self.stored(path)
        if len(gold) and not path.exists():
            gold.write(path)
        with progress(f"gold of {self.task.name}", draws, min(len(gold), draws)) as advance:
            while len(gold) < draws:
                rows = range(len(gold), min(len(gold) + block, draws))
                self.extend(gold, rows)
                gold.write(path)
                advance(len(rows))
        return gold

    def stored(self, path: Path) -> Gold:
        """The draws that a file holds, or else those of another task's file beside it, if the draws would be the same.

        Draws are the prior's: only their costs depend on the task.
        """
        if path.exists():
            return self._checked(Gold.read(path), path)
        for other in sorted(path.parent.glob("*.json")):
            gold = Gold.read(other)
            if gold.prompts == self.prompts and {**gold.about, "task": self.task.name} == self.about:
                costs = self._costs(range(len(gold)), gold.completions)
                return self._checked(replace(gold, about=self.about, cost=costs), other)
        return Gold(self.about, self.prompts, [], [], [])

    def _checked(self, gold: Gold, path: Path) -> Gold:
        if what := self._difference(gold):
            raise ValueError(
                f"the draws in {path} have other {what} than this task, model and seed: move the file away, or choose "
                "another --gold_dir"
            )
        return gold

    def _difference(self, gold: Gold) -> str | None:
        """What a file does not share with this task, model and seed."""
        if gold.about != self.about:
            return "settings"
        if gold.prompts != self.prompts:
            return "prompts"
        if gold.cost != self._costs(range(len(gold)), gold.completions):
            return "costs"
        count = min(CHECKED_DRAWS, len(gold))
        scores = self._log_prior(gold.prompt_of_draws[:count], gold.completions[:count])
        gaps = [abs(new - old) for new, old in zip(scores, gold.log_prior)]
        return "log-probabilities" if max(gaps) > MAX_GAP else None

    def extend(self, gold: Gold, rows: range) -> None:
        """Append the draws with these numbers."""
        prompts = [self.prompts[row % len(self.prompts)] for row in rows]
        numbers = uniforms((self.seed, PURPOSE), rows, self.task.max_completion_length)
        with inference(self.model):
            completions = generate(self.model, prompts, self.config, numbers).completions.tokens()
        gold.log_prior += [round(value, 4) for value in self._log_prior(prompts, completions)]
        gold.cost += self._costs(rows, completions)
        gold.completions += completions

    def _log_prior(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[float]:
        padded = Completions.of(completions, self.pad_token_id)
        with inference(self.model):
            scores: list[float] = sequence_logprobs(
                self.model, prompts, padded, pad_token_id=self.pad_token_id, batch_size=len(prompts)
            ).tolist()
        return scores

    def _costs(self, rows: range, completions: Sequence[Sequence[int]]) -> list[float]:
        asked = [self.task.rows[row % len(self.prompts)] for row in rows]
        columns = {name: [row[name] for row in asked] for name in self.task.columns}
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        return [round(cost, 6) for cost in self.task.cost([row["prompt"] for row in asked], texts, **columns)]
