"""All proposals of the run so far, weighted against all the models that drew them (`sampler="archive"`).

Deterministic-mixture importance sampling (Owen and Zhou, 2000; adaptive multiple importance sampling, Cornuet et al.,
2012): with `n_k` draws of model `q_k` among `N` in all, a draw has the weight

    w(s) = L(s)·exp(-τ·d(s)) / Σ_k α_k q_k(s),    α_k = n_k / N,

whichever model it came from. Language models are normalised, so no partition function is needed, and the mean of the
weights estimates `Z_τ`. The first rung's model is the prior, and it always stays in the mixture: with its share `α_0`
the weights are bounded, `w ≤ exp(-τ·d) / α_0`.

A new rung costs one forward pass of its model over the draws in the archive, and one forward pass of each model in the
archive over the new draws; known log-probabilities are never computed again. `window` bounds both: beyond it the oldest
rung after the first is dropped, draws and model together (a draw whose own model has left the mixture would get a wrong
weight).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..types import Completions, Proposals, join_rungs

Snapshot = Mapping[str, Tensor]
"""The model of a rung: its trained parameters by name. Empty for the prior, whose log-probabilities are known."""
Scorer = Callable[[Snapshot | None, Proposals], Tensor]
"""`(snapshot, proposals) -> [P, n]`: log-probabilities under a snapshot's model, or the present one (`None`), nats."""


class Archive:
    """The rungs within the window, and the log-probability of every draw under every rung's model.

    Args:
        window: most rungs to keep, the first included; at least 2.

    Attributes:
        rungs: the proposals of each rung, oldest first, without texts.
        snapshots: the model that drew each rung's proposals.
        log_q: for each rung's draws, `[K, P, n]`: log-probabilities under the `K` models, nats.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.rungs: list[Proposals] = []
        self.snapshots: list[Snapshot] = []
        self.log_q: list[Tensor] = []

    @property
    def drawn(self) -> list[int]:
        """Draws per prompt of each rung."""
        return [rung.objective.shape[1] for rung in self.rungs]

    def extend(self, proposals: Proposals, snapshot: Snapshot, score: Scorer) -> None:
        """Add a rung's proposals and the model that drew them, which is the present one.

        Args:
            proposals: `n` draws for each of `P` prompts.
            snapshot: the present model; empty if it is the prior.
            score: called once per model in the archive, on the new draws, and once on all draws in the archive.
        """
        if len(self.rungs) == self.window:
            self._forget(1)
        known = [score(past, proposals) if past else proposals.log_prior for past in self.snapshots]
        if self.rungs:  # all at once: in fuller batches, in each of which equal strings are scored once
            columns = torch.split(score(None, join_rungs(self.rungs)), self.drawn, dim=1)
            self.log_q = [torch.cat([log_q, new[None]]) for log_q, new in zip(self.log_q, columns, strict=True)]
        self.log_q.append(torch.stack([*known, proposals.log_model]))
        self.rungs.append(replace(proposals, texts=None))
        self.snapshots.append(snapshot)

    def mixture(self) -> Proposals:
        """All draws as one set of proposals, whose model is the mixture: `[P, N]`, ordered by prompt."""
        total = sum(self.drawn)
        log_share = torch.tensor([math.log(n / total) for n in self.drawn], dtype=torch.float64)[:, None, None]
        log_mixture = torch.cat([(log_share + log_q).logsumexp(0) for log_q in self.log_q], dim=1)
        return replace(join_rungs(self.rungs), log_model=log_mixture)

    def state_dict(self) -> dict[str, Tensor]:
        """As named tensors: `<rung>.<column>`, and `<rung>.model.<parameter>` for the rung's model."""
        kept: dict[str, Tensor] = {}
        for number, (rung, log_q, snapshot) in enumerate(zip(self.rungs, self.log_q, self.snapshots, strict=True)):
            columns = {
                "ids": rung.completions.ids,
                "length": rung.completions.length,
                "objective": rung.objective,
                "log_prior": rung.log_prior,
                "log_q": log_q,
            }
            kept |= {f"{number}.{name}": column.contiguous() for name, column in columns.items()}
            kept |= {f"{number}.model.{name}": value for name, value in snapshot.items()}
        return kept

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of [`state_dict`]."""
        rungs = 1 + max((int(name.split(".")[0]) for name in state), default=-1)
        self.rungs, self.snapshots, self.log_q = [], [], []
        for number in range(rungs):
            ids, length, objective, log_prior, log_q = (
                state[f"{number}.{name}"] for name in ("ids", "length", "objective", "log_prior", "log_q")
            )
            prompts, n = objective.shape
            rows = torch.arange(prompts).repeat_interleave(n)
            self.rungs.append(Proposals(rows, Completions(ids, length), objective, log_prior, log_q[number]))
            self.log_q.append(log_q)
            prefix = f"{number}.model."
            self.snapshots.append(
                {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            )

    def _forget(self, number: int) -> None:
        del self.rungs[number], self.snapshots[number], self.log_q[number]
        self.log_q = [torch.cat([log_q[:number], log_q[number + 1 :]]) for log_q in self.log_q]
