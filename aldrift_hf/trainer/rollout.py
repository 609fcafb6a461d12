"""Step 1 of ALDRIFT on however many processes: draws from the policy, scored under policy and prior, and priced."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..models.batching import Batches, fitting
from ..models.generation import Draws, assert_neutral, generate
from ..models.numerics import check_scores, check_support
from ..models.prior import Prior, base_model
from ..models.scoring import inference, sequence_logprobs
from ..objective.objective import Objective
from ..reporting.progress import Bars
from ..streams import uniforms
from ..types import Completions, Prompts, Proposals
from .config import ALDRIFTConfig

Result = TypeVar("Result")

TOLERANCE = 1e-3
"""Most nats by which generation's `log q` may differ from the scorer's to be taken for it: 0.1 % of a weight."""
SEEN = 8
"""Draws of every batch on which the two are compared."""
FAR, FAR_IN_HALF = 0.02, 0.5
"""Beyond so many nats, times the square root of a completion's tokens, it is not rounding: in fp32, and in bf16."""


class _Part(NamedTuple):
    """Draws of consecutive rows, their texts, `log q` and `log L`."""

    completions: Completions
    texts: list[str]
    log_model: Tensor
    log_prior: Tensor


class Proposer:
    """What draws, scores and prices.

    Args:
        args: the run's settings.
        running: a context in which models may be run: in the precision of training, all parameters in place.
        policy: gives the module that is trained, adapter layers in place, without the wrappers of distributed training.
        prior: turns it into the prior.
        objective: the cost.
        tokenizer: makes texts of completions.
        generation_config: a neutral one.
        pad_token_id: fills rows.
        bars: show how far it is.
        between_rounds: called after each round of proposals; may raise.

    Attributes:
        batches: how many rows at once were found to fit; `None` where `args` says it, or none were drawn yet.
    """

    def __init__(
        self,
        args: ALDRIFTConfig,
        running: Callable[[], contextlib.AbstractContextManager[None]],
        policy: Callable[[], nn.Module],
        prior: Prior,
        objective: Objective,
        tokenizer: PreTrainedTokenizerBase,
        generation_config: GenerationConfig,
        pad_token_id: int,
        bars: Bars,
        between_rounds: Callable[[], None],
    ) -> None:
        self.args, self.running, self.bars, self.between_rounds = args, running, bars, between_rounds
        self.policy, self.prior, self.objective = policy, prior, objective
        self.tokenizer, self.generation_config, self.pad_token_id = tokenizer, generation_config, pad_token_id
        self.batches: Batches | None = None
        self._neutral = False

    def propose(self, prompts: Prompts, per_prompt: int, stream: Sequence[int]) -> tuple[Proposals, dict[str, float]]:
        """`per_prompt` draws for every prompt, scored and priced; and the seconds that each part took.

        What a row draws depends on its place in the stream, and not on how many rows or processes there are at once.
        The objective works on one round of blocks while the next one is drawn.

        Raises:
            FloatingPointError: for log-probabilities that are no numbers, before the objective sees the draws.
        """
        rows = [row for row in range(len(prompts)) for _ in range(per_prompt)]
        seconds = dict.fromkeys(("seconds_propose", "seconds_score", "seconds_objective"), 0.0)
        parts: list[_Part] = []
        texts: list[str] = []
        with self._objective_abandoned_on_error():
            with self._inference():
                for drawn in self._deal("proposals", prompts, rows, functools.partial(self._draw, stream, seconds)):
                    new = [text for part in drawn for text in part.texts]
                    self.objective.begin(prompts, rows[len(texts) : len(texts) + len(new)], new)
                    parts += drawn
                    texts += new
                    self.between_rounds()
            with timed(seconds, "seconds_objective"):
                objective = self.objective.finish(prompts, rows, texts)
        shape = (len(prompts), per_prompt)
        ids, length, log_model, log_prior = (
            torch.cat(column)
            for column in zip(*((*part.completions, part.log_model, part.log_prior) for part in parts), strict=True)
        )
        check_support(log_prior.view(shape))
        return (
            Proposals(
                rows=torch.tensor(rows),
                completions=Completions(ids, length),
                texts=texts,
                objective=objective.view(shape),
                log_prior=log_prior.view(shape),
                log_model=log_model.view(shape),
            ),
            seconds,
        )

    def score(self, prompts: Prompts, drawn: Proposals) -> Tensor:
        """`[P, n]` log-probabilities of draws under the policy as it is; the processes share the work."""

        def scores(rows: range, token_ids: list[list[int]]) -> Tensor:
            completions = drawn.completions.select(torch.arange(rows.start, rows.stop))
            return self._score(base_model(self.policy()), token_ids, completions)

        with self._inference():
            rounds = list(self._deal("proposals scored anew", prompts, drawn.rows.tolist(), scores))
        return torch.cat([part for parts in rounds for part in parts]).view_as(drawn.objective)

    def decode(self, completions: Completions) -> list[str]:
        """Texts, without special tokens; equal completions are decoded once."""
        rows = [tuple(row) for row in completions.tokens()]
        distinct = list(dict.fromkeys(rows))
        texts = dict(zip(distinct, self.tokenizer.batch_decode(distinct, skip_special_tokens=True), strict=True))
        return [texts[row] for row in rows]

    def _deal(
        self, what: str, prompts: Prompts, rows: Sequence[int], work: Callable[[range, list[list[int]]], Result]
    ) -> Iterator[list[Result]]:
        """Deal blocks of rows out to the processes, one each a round, and yield every round's results in rows' order.

        Args:
            what: is dealt out, for the progress bar.
            prompts: whose token ids `work` is given.
            rows: the prompt of each row.
            work: takes a stretch of rows and their prompts' token ids.
        """
        args, batches = self.args, self._fitting(max(map(len, prompts.token_ids)))
        blocks = [range(len(rows))[start : start + batches.size] for start in range(0, len(rows), batches.size)]
        with self.bars.task(what, len(rows)) as advance:
            for first in range(0, len(blocks), args.world_size):
                mine = [
                    result
                    for block in blocks[first + args.process_index :][:1]
                    for result in batches.over(
                        block, lambda stretch: work(stretch, [prompts.token_ids[rows[row]] for row in stretch])
                    )
                ]
                together = [result for results in gather_object([mine]) for result in results]
                advance(sum(map(len, blocks[first : first + args.world_size])))
                yield together

    def _draw(self, stream: Sequence[int], seconds: dict[str, float], rows: range, token_ids: list[list[int]]) -> _Part:
        model = base_model(self.policy())
        if not self._neutral:
            assert_neutral(model, token_ids[0], self.generation_config)
            self._neutral = True
        with timed(seconds, "seconds_propose"):
            numbers = uniforms((self.args.seed, *stream), rows, self.args.max_completion_length)
            drawn = generate(model, token_ids, self.generation_config, numbers)
        with timed(seconds, "seconds_score"):
            log_model = self._log_q(model, token_ids, drawn)
            with self.prior.active(self.policy()) as prior_model:
                log_prior = self._score(prior_model, token_ids, drawn.completions)
        check_scores(log_model, log_prior)
        return _Part(drawn.completions, self.decode(drawn.completions), log_model, log_prior)

    def _log_q(self, model: PreTrainedModel, token_ids: list[list[int]], drawn: Draws) -> Tensor:
        """`log q` of draws: generation's own where, on a few of them, it is the scorer's; else the scorer's.

        Raises:
            RuntimeError: where the two have nothing to do with each other.
        """
        few = torch.linspace(0, len(token_ids) - 1, min(SEEN, len(token_ids))).long()
        seen = self._score(model, [token_ids[row] for row in few.tolist()], drawn.completions.select(few))
        if (seen - drawn.log_probs[few]).abs().max() <= TOLERANCE:
            return drawn.log_probs
        scored = self._score(model, token_ids, drawn.completions)
        in_full = model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
        apart = (scored - drawn.log_probs).abs() / drawn.completions.length.sqrt()
        if apart.max() > (FAR if in_full else FAR_IN_HALF):
            raise RuntimeError(
                f"{type(model).__name__} generates with other probabilities than its forward pass has: for one "
                f"completion they are {(scored - drawn.log_probs).abs().max():.3g} nats apart. Its draws would be "
                "weighted wrongly. The usual reason is a model that ignores the attention mask of prompts padded on "
                "the left: use prompts of one length (in tokens), or generation_batch_size=1."
            )
        return scored

    def _score(self, model: PreTrainedModel, prompts: list[list[int]], completions: Completions) -> Tensor:
        return sequence_logprobs(
            model,
            prompts,
            completions,
            pad_token_id=self.pad_token_id,
            batch_size=len(prompts),
            batch_tokens=self.args.scoring_batch_tokens,
        )

    def _fitting(self, prompt_length: int) -> Batches:
        if self.args.generation_batch_size is not None:
            return Batches(self.args.generation_batch_size, fixed=True)
        if self.batches is None:
            tokens = prompt_length + self.args.max_completion_length
            self.batches = Batches(fitting(base_model(self.policy()), tokens), fixed=False)
        # Blocks are the same for all: who has less memory, or ran out of it, decides.
        self.batches.size = min(gather_object([self.batches.size]))
        return self.batches

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        with self.running(), inference(self.policy()):
            yield

    @contextlib.contextmanager
    def _objective_abandoned_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.objective.abandon()
            raise


@contextlib.contextmanager
def timed(seconds: dict[str, float], key: str) -> Iterator[None]:
    """Adds the seconds of a `with` block."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[key] += time.perf_counter() - start
