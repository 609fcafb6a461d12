"""The archive for a cost that a text shares with its twin, such as the two strands of one piece of DNA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...types import Completions, Proposals, join_rungs
from ..archive import mixture
from ..errors import by_draw
from .archive import ArchiveSampler
from .base import Policy


class TwinArchive(ArchiveSampler):
    """The archive, to which each draw brings its twin: another text, which is known to cost the same.

    If a coin decided which of a draw `s ~ q` and its twin `s'` is taken, either would have the density

        q̄(s) = (q(s) + q(s'))/2.

    Both are kept, with the weight of `L(s)·exp(-τ·d(s))` over the mixture of all rungs' `q̄`: the mean over the coin. So
    a run learns from up to twice as many texts for the same calls of the objective. The prior need not write both
    equally often. Where the model draws a known text's twin, the objective is asked for it all the same.

    Args:
        twin: makes a text's twin; of the twin, the text; and of a text that has none, the text itself. A draw that was
            cut at the longest completion has none, nor has one whose twin the tokenizer cannot write within that.
        window, pareto_smoothing: as for [`ArchiveSampler`].

    Raises:
        ValueError: on a rung, if the twin of a draw's twin is another text than the draw's.
    """

    def __init__(self, twin: Callable[[str], str], window: int = 16, pareto_smoothing: bool = False) -> None:
        super().__init__(window, pareto_smoothing)
        self.twin = twin

    def pool(self, proposals: Proposals, policy: Policy) -> Proposals:
        snapshot = policy.snapshot()
        twins = replace(proposals, completions=self._twins(proposals.completions, policy))
        twins.log_prior = policy.log_prob({}, twins)
        twins.log_model = policy.log_prob(None, twins) if snapshot else twins.log_prior
        if not snapshot:
            own = proposals.log_prior
        else:
            own = proposals.log_model if proposals.as_scored else policy.log_prob(None, proposals)
        prompts, n = own.shape
        one_by_one = torch.arange(2 * n).view(2, n).T.flatten().expand(prompts, -1)
        pairs = join_rungs([replace(proposals, log_model=own), twins]).select(one_by_one)
        # The law of an engine with its own rounding is known for the draw alone: the pair has the draw's factor.
        factor = (proposals.log_model - own).repeat_interleave(2, -1)
        pairs.log_model, pairs.as_scored = _of_either(pairs.log_model) + factor, proposals.as_scored
        self._group = self.archive.extend(
            pairs,
            snapshot,
            lambda earlier, draws: _of_either(policy.log_prob(earlier, draws)),
            _of_either(pairs.log_prior),
        )
        return replace(mixture(self._group), texts_per_draw=2)

    def draws(self) -> list[Proposals]:
        return [replace(draws, texts_per_draw=2) for draws in super().draws()]

    def _twins(self, completions: Completions, policy: Policy) -> Completions:
        """The twin of each draw, or the draw itself."""
        drawn, texts = completions.tokens(), policy.decode(completions)
        others = [self.twin(text) for text in texts]
        for text, other in zip(texts, others, strict=True):
            if (back := self.twin(other)) != text:
                raise ValueError(f"TwinArchive: the twin of {text!r} is {other!r}, but the twin of that is {back!r}")
        ids, length = completions.ids.clone(), completions.length.clone()
        # Other tokens with the text of a draw have no twin: two texts would have the same one.
        written = zip(drawn, policy.encode(texts), policy.encode(others), strict=True)
        for row, (tokens, own, twin) in enumerate(written):
            if twin is not None and tokens == own:
                ids[row, : len(twin)], length[row] = torch.tensor(twin), len(twin)
        return Completions(ids, length)


def _of_either(log_q: Tensor) -> Tensor:
    """`log q̄` of each, from `log q` of `[P, 2n]` texts of which every two are a pair."""
    return by_draw(log_q, 2).repeat_interleave(2, -1)
