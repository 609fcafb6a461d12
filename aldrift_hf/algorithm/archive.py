"""All proposals of the run so far, weighted against all the models that drew them (`sampler="archive"`).

Deterministic-mixture importance sampling (Owen and Zhou, 2000; adaptive multiple importance sampling, Cornuet et al.,
2012): with `n_k` draws of model `q_k` among `N` in all, a draw has the weight

    w(s) = L(s)·exp(-τ·d(s)) / Σ_k α_k q_k(s),    α_k = n_k / N,

whichever model it came from. Language models are normalised, so no partition function is needed, and the mean of the
weights estimates `Z_τ`. The first rung's model is the prior, in a run that begins with it, and always stays in the
mixture: with its share `α_0` the weights are bounded, `w ≤ exp(-τ·d) / α_0`.

Draws may come from another law `r_k` than the scorer's `q_k`: that of an engine with its own rounding, which is known
for its own draws alone. Then a draw of the k-th law has the weight `w(s)·q_k(s)/r_k(s)`. This is exact, because the
scorer's shares `α_k q_k / Σ_j α_j q_j` sum to 1 for every string, and all that multiple importance sampling needs of
them is that (Veach and Guibas, 1995):

    Σ_k α_k E_{r_k}[w·(q_k/r_k)·f] = Σ_k α_k Σ_s q_k(s)·w(s)·f(s) = Σ_s L(s)·exp(-τ·d(s))·f(s).

A new rung costs one forward pass of its model over the draws in the archive, and one forward pass of each model in the
archive over the new draws; known log-probabilities are never computed again. `window` bounds both: beyond it the oldest
rung after the first is dropped, draws and model together (a draw whose own model has left the mixture would get a wrong
weight).

Where rungs draw for groups of prompts in turn ([`aldrift_hf.algorithm.prompt_groups`]), the mixture of a prompt's draws
is that of the models which drew for it. Only the first group's holds the prior: what all models have lost that drew for
another is missing from its estimates, and its first rung's missing mass is not known. The window counts all rungs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..types import Completions, Proposals, join_rungs

Snapshot = Mapping[str, Tensor]
"""The model of a rung: its trained parameters by name. Empty for the prior, whose log-probabilities are known."""
Scorer = Callable[[Snapshot | None, Proposals], Tensor]
"""`(snapshot, proposals) -> [P, n]`: log-probabilities under a snapshot's model, or the present one (`None`), nats."""


@dataclass
class Entry:
    """A rung in the archive.

    Attributes:
        proposals: its draws, without texts.
        snapshot: the model that drew them.
        log_q: `[K, S, n]`, their log-probabilities under the `K` models that drew for the same prompts, by age, nats:
            the scorer's.
    """

    proposals: Proposals
    snapshot: Snapshot
    log_q: Tensor


class Archive:
    """The rungs within the window, and the log-probability of every draw under every model that drew for its prompt.

    Args:
        window: most rungs to keep, the first included; at least 2.

    Attributes:
        entries: the rungs, oldest first.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.entries: list[Entry] = []

    def groups(self) -> list[list[Entry]]:
        """The rungs by the prompts that they drew for; within a group by age."""
        groups: dict[tuple[int, ...], list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault(tuple(entry.proposals.prompts.tolist()), []).append(entry)
        return [*groups.values()]

    def group(self, prompts: Tensor) -> list[Entry]:
        """The rungs that drew for these prompts."""
        return [entry for entry in self.entries if torch.equal(entry.proposals.prompts, prompts)]

    def extend(
        self, proposals: Proposals, snapshot: Snapshot, score: Scorer, log_prior: Tensor | None = None
    ) -> list[Entry]:
        """Add a rung's proposals and the model that drew them, which is the present one.

        Args:
            proposals: `n` draws for each of `S` prompts.
            snapshot: the present model; empty if it is the prior.
            score: called once per earlier model that drew for these prompts, on the new draws, and once on all earlier
                draws for them; and on the new draws, if `log q` as drawn is not the scorer's.
            log_prior: `[S, n]`, the new draws' log-probabilities under the prior as a law of draws, where that is not
                their `log_prior`.

        Returns:
            The rungs that drew for these prompts, the new one included.
        """
        if len(self.entries) == self.window:
            self._forget(1)
        earlier = self.group(proposals.prompts)
        log_prior = proposals.log_prior if log_prior is None else log_prior
        known = [score(entry.snapshot, proposals) if entry.snapshot else log_prior for entry in earlier]
        if earlier:  # all at once: in fuller batches, in each of which equal strings are scored once
            drawn = [entry.proposals for entry in earlier]
            columns = torch.split(score(None, join_rungs(drawn)), draws_of(earlier), dim=1)
            for entry, new in zip(earlier, columns, strict=True):
                entry.log_q = torch.cat([entry.log_q, new[None]])
        own = proposals.log_model if proposals.as_scored else score(None, proposals) if snapshot else log_prior
        log_q = torch.stack([*known, own])
        self.entries.append(Entry(replace(proposals, texts=None, token_log_model=None), snapshot, log_q))
        return [*earlier, self.entries[-1]]

    def state_dict(self) -> dict[str, Tensor]:
        """As named tensors: `<rung>.<column>`, and `<rung>.model.<parameter>` for the rung's model."""
        kept: dict[str, Tensor] = {}
        for number, entry in enumerate(self.entries):
            rung = entry.proposals
            columns = {
                "prompts": rung.prompts,
                "ids": rung.completions.ids,
                "length": rung.completions.length,
                "objective": rung.objective,
                "log_prior": rung.log_prior,
                "log_model": rung.log_model,
                "log_q": entry.log_q,
            }
            kept |= {f"{number}.{name}": column.contiguous() for name, column in columns.items()}
            kept |= {f"{number}.model.{name}": value for name, value in entry.snapshot.items()}
        return kept

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of [`state_dict`]."""
        rungs = 1 + max((int(name.split(".")[0]) for name in state), default=-1)
        self.entries = []
        for number in range(rungs):
            prompts, ids, length, objective, log_prior, log_model, log_q = (
                state[f"{number}.{name}"]
                for name in ("prompts", "ids", "length", "objective", "log_prior", "log_model", "log_q")
            )
            rows = prompts.repeat_interleave(objective.shape[1])
            drawn = Proposals(rows, Completions(ids, length), objective, log_prior, log_model)
            prefix = f"{number}.model."
            snapshot = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            self.entries.append(Entry(drawn, snapshot, log_q))

    def _forget(self, number: int) -> None:
        gone = self.entries[number]
        group = self.group(gone.proposals.prompts)
        age = next(age for age, entry in enumerate(group) if entry is gone)
        del self.entries[number]
        for entry in group:
            entry.log_q = torch.cat([entry.log_q[:age], entry.log_q[age + 1 :]])


def draws_of(group: Sequence[Entry]) -> list[int]:
    """Draws per prompt of each rung."""
    return [entry.proposals.objective.shape[1] for entry in group]


def mixture(group: Sequence[Entry]) -> Proposals:
    """The draws of rungs for the same prompts as one set of proposals, `[S, N]`, whose model is their mixture."""
    drawn = draws_of(group)
    log_share = torch.tensor([math.log(n / sum(drawn)) for n in drawn], dtype=torch.float64)[:, None, None]
    log_mixture = [
        (log_share + entry.log_q).logsumexp(0) + entry.proposals.log_model - entry.log_q[age]
        for age, entry in enumerate(group)
    ]
    return replace(join_rungs([entry.proposals for entry in group]), log_model=torch.cat(log_mixture, dim=1))
