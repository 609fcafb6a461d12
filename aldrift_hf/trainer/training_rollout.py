"""The policy on a run's own prompts, rung by rung, as [`aldrift_hf.algorithm.rung.run_rung`] sees it."""

from __future__ import annotations

from torch import Tensor

from .. import streams
from ..algorithm.archive import Snapshot
from ..algorithm.prompt_groups import group_of
from ..models import snapshots
from ..types import Beginnings, Completions, Prompts, Proposals, Screen, Spans
from .rollout import Rollout


class TrainingRollout:
    """The policy on the run's own prompts, as [`aldrift_hf.algorithm.rung.run_rung`] sees it.

    Args:
        rollout: draws for any prompts.
        prompts: the run's.
        folder: for snapshots of the model that are too large for memory.
        is_prior: as below.

    Attributes:
        per_prompt: independent proposals per prompt of the next rung.
        is_prior: whether the policy still is the prior, so that no copy of it needs to be kept.
    """

    def __init__(self, rollout: Rollout, prompts: Prompts, folder: str, is_prior: bool) -> None:
        self.rollout, self.prompts, self.folder, self.is_prior = rollout, prompts, folder, is_prior
        self.per_prompt = rollout.args.proposals
        self._ahead: Proposals | None = None

    def group(self, rung: int) -> Tensor:
        """`[S]`, the prompts of a rung."""
        args = self.rollout.args
        return group_of(rung, len(self.prompts), args.prompts_per_rung, args.seed)

    def propose(self, rung: int) -> Proposals:
        """A rung's independent proposals."""
        drawn, self._ahead = self._ahead, None
        if drawn is not None:
            return drawn
        address, which = (streams.PROPOSE, rung), self.group(rung)
        return self.rollout.propose(self.prompts, self.per_prompt, address, which=which, keep=True)

    def redraw(self, rung: int, step: int, beginnings: Beginnings | Spans, screen: Screen | None = None) -> Proposals:
        """Further draws of a rung, which begin with these tokens; their seconds are added to the rung's."""
        before, which = self.rollout.seconds, self.group(rung)
        per_prompt = len(beginnings.tokens) // len(which)
        address = (streams.PROPOSE, rung, step)
        drawn = self.rollout.propose(self.prompts, per_prompt, address, beginnings, which, keep=True, screen=screen)
        self.rollout.seconds = {name: before[name] + more for name, more in self.rollout.seconds.items()}
        return drawn

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return self.rollout.eos_token_ids

    def decode(self, completions: Completions) -> list[str]:
        """Their texts, without special tokens."""
        return self.rollout.decode(completions)

    def encode(self, texts: list[str]) -> list[list[int] | None]:
        """The tokens of each text, with the end; `None` for one that they do not decode to, or that is too long."""
        rollout, most = self.rollout, self.rollout.args.max_completion_length
        tokens = [
            [*rollout.tokenizer(text, add_special_tokens=False)["input_ids"], self.eos_token_ids[0]] for text in texts
        ]
        back = rollout.decode(Completions.of(tokens, rollout.pad_token_id)) if texts else []
        return [
            row if given == text and len(row) <= most else None
            for text, row, given in zip(texts, tokens, back, strict=True)
        ]

    def draw_ahead(self) -> Proposals:
        """The first rung's proposals, to look at them before the rung begins; they are not drawn again."""
        self._ahead = self.propose(0)
        return self._ahead

    def snapshot(self) -> Snapshot:
        """The policy as it is now; empty while it is the prior."""
        return {} if self.is_prior else snapshots.take(self.rollout.policy(), self.folder)

    def log_prob(self, snapshot: Snapshot | None, proposals: Proposals) -> Tensor:
        """`[P, n]` log-probabilities under a snapshot's model, the prior (`{}`) or the present model (`None`), nats."""
        if not snapshot:
            return self.rollout.score(self.prompts, proposals, under_prior=snapshot is not None)
        with snapshots.loaded(self.rollout.policy(), snapshot):
            return self.rollout.score(self.prompts, proposals)

    def token_log_prob(self, proposals: Proposals) -> Tensor:
        """`[P·n, width]` log-probabilities of each token under the present model, nats."""
        return self.rollout.score_tokens(self.prompts, proposals)
