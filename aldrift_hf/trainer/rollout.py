"""Step 1 of ALDRIFT, *propose*, on any number of processes: draws, scored under policy and prior, and evaluated."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..content import Content
from ..models.batching import Batches, fitting
from ..models.engines import Engine, EngineGuard
from ..models.footprint import Work
from ..models.numerics import check_scores, check_support
from ..models.prior import Prior, base_model
from ..models.scoring import inference, sequence_logprobs, token_table
from ..models.sharding import in_step, whole
from ..models.shared_prompts.cache import MIN_PROMPT
from ..models.shared_prompts.support import can_share_prompts
from ..objective.objective import Objective
from ..types import Beginnings, Completions, Draws, Progress, Prompts, Proposals, Screen, Spans
from .config import ALDRIFTConfig
from .draw_journal import Columns, DrawJournal

Result = TypeVar("Result")


class _Part(NamedTuple):
    """Draws of consecutive rows, their texts, `log q` by token, `log L`, and what the engine's guard measured."""

    completions: Completions
    texts: list[str]
    token_log_model: Tensor
    log_prior: Tensor
    measured: Tensor

    @property
    def columns(self) -> Columns:
        """All but the texts."""
        return {**self.completions._asdict(), **{name: getattr(self, name) for name in _NUMBERS}}


_NUMBERS = ("token_log_model", "log_prior", "measured")


@dataclass(frozen=True)
class Runtime:
    """What a rollout needs of the trainer around it.

    Attributes:
        policy: returns the module that is trained, adapter layers in place, without wrappers of distributed training.
        running: a context in which models may be run, in the precision of training. Its argument says whether every
            process needs whole parameters; otherwise forward passes are made [`aldrift_hf.models.sharding.in_step`].
        progress: shows how far a piece of work is.
        stop_if_asked: called between rounds of proposals, and between updates; raises where the user wants to stop.
    """

    policy: Callable[[], nn.Module]
    running: Callable[[bool], contextlib.AbstractContextManager[None]]
    progress: Progress
    stop_if_asked: Callable[[], None]


class Rollout:
    """Draws from the policy for any prompts.

    Args:
        args: the run's settings.
        runtime: the trainer around it.
        prior: turns the policy into the prior.
        engine: draws completions.
        objective: the cost.
        tokenizer: decodes completions.
        pad_token_id: fills rows.
        eos_token_ids: tokens that end a completion.

    Attributes:
        guard: sees whether the engine draws from the policy.
        journal: keeps draws until they are used.
        batches: how many rows at once fit into memory; `None` before the first draw.
        seconds: seconds that each part of the last proposals took.
    """

    def __init__(
        self,
        args: ALDRIFTConfig,
        runtime: Runtime,
        prior: Prior,
        engine: Engine,
        objective: Objective,
        tokenizer: PreTrainedTokenizerBase,
        pad_token_id: int,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self.args, self.runtime, self.policy = args, runtime, runtime.policy
        self.prior, self.engine, self.objective = prior, engine, objective
        self.tokenizer, self.pad_token_id, self.eos_token_ids = tokenizer, pad_token_id, eos_token_ids
        self.guard = EngineGuard(engine, pad_token_id, args.scoring_batch_tokens)
        self.journal = DrawJournal(str(args.output_dir))
        size = args.per_device_generation_batch_size
        self.batches = None if size is None else Batches(size, fixed=True)
        self.seconds: dict[str, float] = {}

    def propose(
        self,
        prompts: Prompts,
        per_prompt: int,
        stream: Sequence[int],
        beginnings: Beginnings | Spans | None = None,
        which: Tensor | None = None,
        keep: bool = False,
        screen: Screen | None = None,
    ) -> Proposals:
        """`per_prompt` draws for every prompt, or for some, scored and evaluated.

        What a row draws depends on its place in the stream, and not on how many rows or processes work at once. The
        objective evaluates one round of blocks while the next one is drawn.

        Args:
            prompts: what to draw for.
            per_prompt: draws per prompt.
            stream: the address of the random numbers.
            beginnings: of each draw, or what is around its span; `log q` is that of the whole completion all the same.
                `None` for none.
            which: `[S]`, the prompts to draw for, as positions among `prompts`; `None` for all.
            keep: whether the journal keeps them, so that a run that is killed does not draw them again.
            screen: which draws are evaluated, after all are drawn; `None` for all. The others' cost is NaN.

        Raises:
            FloatingPointError: for log-probabilities that are NaN or infinite, before the objective sees the draws.
            RuntimeError: for an engine whose draws are not the policy's, likewise.
        """
        which = torch.arange(len(prompts)) if which is None else which
        rows = which.repeat_interleave(per_prompt).tolist()
        self.seconds = dict.fromkeys(("seconds_propose", "seconds_score", "seconds_objective"), 0.0)
        parts: list[_Part] = []
        done = 0
        with self._objective_abandoned_on_error():
            with self._inference():
                self.engine.sync(self.policy())
                if beginnings is None:
                    self.guard.begin()
                for drawn in self._rounds(prompts, rows, stream, beginnings, keep):
                    new = [text for part in drawn for text in part.texts]
                    if screen is None:
                        self.objective.begin(prompts, rows[done : done + len(new)], new)
                    parts += drawn
                    done += len(new)
                    self.runtime.stop_if_asked()
                self.engine.rest()
            proposals = self._proposals(parts, torch.tensor(rows), (len(which), per_prompt))
            asked = torch.ones_like(proposals.objective, dtype=torch.bool) if screen is None else screen(proposals)
            chosen = asked.flatten().nonzero()[:, 0].tolist()
            with self._timed("seconds_objective"):
                judged = [rows[row] for row in chosen], [cast(list[str], proposals.texts)[row] for row in chosen]
                if screen is not None:
                    self.objective.begin(prompts, *judged)
                proposals.objective[asked] = self.objective.finish(prompts, *judged)
        if beginnings is None:
            check_support(proposals.log_prior)
        return proposals

    def _proposals(self, parts: Sequence[_Part], rows: Tensor, shape: tuple[int, int]) -> Proposals:
        """All draws together, not evaluated yet."""
        columns = ((*part.completions, part.token_log_model, part.log_prior) for part in parts)
        ids, length, token_log_model, log_prior = (torch.cat(column) for column in zip(*columns, strict=True))
        return Proposals(
            rows=rows,
            completions=Completions(ids, length),
            objective=torch.full(shape, math.nan, dtype=torch.float64),
            log_prior=log_prior.view(shape),
            log_model=token_log_model.sum(-1).view(shape),
            texts=[text for part in parts for text in part.texts],
            as_scored=self.guard.as_scored,
            token_log_model=token_log_model,
        )

    def score(self, prompts: Prompts, drawn: Proposals, under_prior: bool = False) -> Tensor:
        """`[P, n]` log-probabilities of draws under the policy as it is now, or the prior; the processes share the
        work."""
        return self._scores(prompts, drawn, self._score, under_prior).view_as(drawn.objective)

    def score_tokens(self, prompts: Prompts, drawn: Proposals) -> Tensor:
        """`[P·n, width]`, those of each token."""
        return self._scores(prompts, drawn, self._score_tokens)

    def _scores(
        self, prompts: Prompts, drawn: Proposals, score: Callable[..., Tensor], under_prior: bool = False
    ) -> Tensor:
        def scores(rows: range, token_ids: list[list[int]]) -> Tensor:
            completions, policy = drawn.completions.select(torch.arange(rows.start, rows.stop)), self.policy()
            with self.prior.active(policy) if under_prior else contextlib.nullcontext(base_model(policy)) as model:
                return score(model, token_ids, completions)

        with self._inference():
            rounds = list(self._deal("proposals scored", prompts, drawn.rows.tolist(), scores))
        return torch.cat([part for parts in rounds for part in parts])

    def decode(self, completions: Completions) -> list[str]:
        """Texts, without special tokens; equal completions are decoded once."""
        rows = [tuple(row) for row in completions.tokens()]
        distinct = list(dict.fromkeys(rows))
        texts = dict(zip(distinct, self.tokenizer.batch_decode(distinct, skip_special_tokens=True), strict=True))
        return [texts[row] for row in rows]

    def _rounds(
        self,
        prompts: Prompts,
        rows: Sequence[int],
        stream: Sequence[int],
        beginnings: Beginnings | Spans | None,
        keep: bool,
    ) -> Iterator[list[_Part]]:
        """Draws in rounds, each as the engine's guard lets it pass: first what the journal has, all at once."""
        kept = self._kept(prompts, rows, stream, beginnings) if keep else []
        work = functools.partial(self._draw, stream, beginnings)
        new = self._deal("proposals", prompts, rows, work, sum(len(part.texts) for part in kept))
        for drawn in itertools.chain([kept] if kept else [], new):
            self.guard.check(torch.cat([part.measured for part in drawn]))
            if keep and drawn is not kept:
                self.journal.add([part.columns for part in drawn])
            yield drawn

    def _kept(
        self,
        prompts: Prompts,
        rows: Sequence[int],
        stream: Sequence[int],
        beginnings: Beginnings | Spans | None,
    ) -> list[_Part]:
        """The first of these draws, where an earlier start of the run has made them, from the same law."""
        args, policy = self.args, self.policy()
        model = base_model(policy)
        trained = (parameter for parameter in policy.parameters() if parameter.requires_grad)
        asked = [prompts.token_ids[row] for row in dict.fromkeys(rows)]
        tokens = [torch.tensor(list(map(len, asked))), torch.tensor(list(itertools.chain.from_iterable(asked)))]
        law = [
            [args.seed, torch.tensor(rows), tokens, None if beginnings is None else [*beginnings]],
            [args.max_completion_length],
            [type(self.engine).__name__, args.engine_kwargs, torch.is_autocast_enabled(model.device.type)],
            [model.config.to_json_string(), str(model.dtype), self.prior.row_scores],
            [Content().digest(whole(parameter)) for parameter in trained],
        ]
        return [
            _Part(completions, self.decode(completions), *(columns[name] for name in _NUMBERS))
            for columns in self.journal.begin(stream, law)
            for completions in [Completions(columns["ids"], columns["length"])]
        ]

    def _deal(
        self,
        what: str,
        prompts: Prompts,
        rows: Sequence[int],
        work: Callable[[range, list[list[int]]], Result],
        done: int = 0,
    ) -> Iterator[list[Result]]:
        """Deal blocks of rows out to the processes, one each per round; yields each round's results in rows' order.

        Args:
            what: name of the work, for its progress bar.
            prompts: their token ids are passed to `work`.
            rows: the prompt of each row.
            work: takes a range of rows and their prompts' token ids.
            done: the number of rows at the beginning that are left out.
        """
        args, batches = self.args, self._fitting(prompts, len(rows) // len(set(rows)))
        blocks = [range(len(rows))[start : start + batches.size] for start in range(done, len(rows), batches.size)]
        with self.runtime.progress(what, len(rows), done) as advance:
            for first in range(0, len(blocks), args.world_size):
                with in_step(base_model(self.policy())) as waits:
                    mine = [
                        result
                        for block in blocks[first + args.process_index :][:1]
                        for result in batches.over(
                            block,
                            lambda part: work(part, [prompts.token_ids[rows[row]] for row in part]),
                            retry=not waits,
                        )
                    ]
                together = [result for results in gather_object([mine]) for result in results]
                advance(sum(map(len, blocks[first : first + args.world_size])))
                yield together

    def _draw(
        self, stream: Sequence[int], beginnings: Beginnings | Spans | None, rows: range, token_ids: list[list[int]]
    ) -> _Part:
        address = (self.args.seed, *stream)
        mine = None if beginnings is None else beginnings.select(rows)
        with self._timed("seconds_propose"):
            if mine is None:
                draws, measured = self._generated(token_ids, address, rows)
            elif isinstance(mine, Spans):
                draws, measured = self._with_spans(mine, token_ids, address, rows)
            else:
                draws, measured = self._continued(mine, token_ids, address, rows)
        with self._timed("seconds_score"), self.prior.active(self.policy()) as prior_model:
            log_prior = self._score(prior_model, token_ids, draws.completions)
        check_scores(draws.log_probs, log_prior)
        return _Part(draws.completions, self.decode(draws.completions), draws.token_log_probs, log_prior, measured)

    def _generated(
        self, asked: list[list[int]], address: tuple[int, ...], rows: range, *limits: list[int]
    ) -> tuple[Draws, Tensor]:
        """The engine's draws, and what its guard measures of them."""
        draws = self.engine.generate(asked, address, rows, *limits)
        return draws, self.guard.measure(base_model(self.policy()), asked, draws)

    def _continued(
        self, begun: Beginnings, token_ids: list[list[int]], address: tuple[int, ...], rows: range
    ) -> tuple[Draws, Tensor]:
        most = self.args.max_completion_length
        limits = [most - len(tokens) for tokens in begun.tokens]
        rests, measured = self._generated(_joined(token_ids, begun.tokens), address, rows, limits)
        return begun.continued(rests, most, self.pad_token_id), measured

    def _with_spans(
        self, spans: Spans, token_ids: list[list[int]], address: tuple[int, ...], rows: range
    ) -> tuple[Draws, Tensor]:
        if any(spans.widths):  # a span of no tokens draws one, too, which is left out
            limits = [max(width, 1) for width in spans.widths]
            new, measured = self._generated(_joined(token_ids, spans.tokens), address, rows, limits)
            drawn = new.completions
        else:
            drawn, measured = Completions.of([[] for _ in rows], self.pad_token_id), self.guard.nothing_measured
        whole = spans.filled(drawn, self.args.max_completion_length, self.pad_token_id, self.eos_token_ids)
        # What follows a span has a new context: all is scored again.
        return Draws(whole, self._score_tokens(base_model(self.policy()), token_ids, whole)), measured

    def _score(self, model: PreTrainedModel, prompts: list[list[int]], completions: Completions) -> Tensor:
        return sequence_logprobs(model, prompts, completions, **self._in_batches(prompts))

    def _score_tokens(self, model: PreTrainedModel, prompts: list[list[int]], completions: Completions) -> Tensor:
        return token_table(model, prompts, completions, **self._in_batches(prompts))

    def _in_batches(self, prompts: list[list[int]]) -> dict[str, int]:
        batch_tokens = self.args.scoring_batch_tokens
        return {"pad_token_id": self.pad_token_id, "batch_size": len(prompts), "batch_tokens": batch_tokens}

    def _fitting(self, prompts: Prompts, per_prompt: int) -> Batches:
        if self.batches is None or not self.batches.fixed:
            model, present = base_model(self.policy()), None if self.batches is None else self.batches.size
            work = Work(
                max(map(len, prompts.token_ids)), self.args.max_completion_length, self.args.scoring_batch_tokens
            )
            if per_prompt > 1 and work.prompt >= MIN_PROMPT and can_share_prompts(model, work.width):
                work = dataclasses.replace(work, per_prompt=per_prompt)
            self.batches = Batches(fitting(model, work, present), fixed=False)
        # Blocks are the same for all: the process with the least memory decides.
        self.batches.size = min(gather_object([self.batches.size]))
        return self.batches

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        with self.runtime.running(self.engine.draws_with_policy), inference(self.policy()):
            yield

    @contextlib.contextmanager
    def _objective_abandoned_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.objective.abandon()
            raise

    @contextlib.contextmanager
    def _timed(self, key: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[key] += time.perf_counter() - start


def _joined(prompts: Sequence[list[int]], tokens: Sequence[list[int]]) -> list[list[int]]:
    """Each prompt with the tokens that follow it."""
    return [[*prompt, *more] for prompt, more in zip(prompts, tokens, strict=True)]
