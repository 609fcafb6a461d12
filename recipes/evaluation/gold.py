"""Gold: draws of the prior with their log-probabilities and costs, and all that they say about p_τ and about any model.

`p_τ(s) ∝ L(s)·exp(-τ·d(s))` has the weight `exp(-τ·d(s))` on a draw `s` of the prior `L`. So draws of `L`, made once,
estimate `log Z_τ = log E_L[exp(-τ·d)]`, means under p_τ, and `KL(p_τ‖q)` of any model `q` that can score them.

All functions take costs `[P, n]`, of `n` draws for each of `P` prompts, and return the mean over prompts. Errors are
standard errors by the delta method, for given prompts: `log Z` and a mean under p_τ are smooth functions of means over
draws, and so each draw has an influence on them (its derivative), whose standard deviation over `√n` is the error. Like
the estimates themselves (their bias is about `1 / 2·ESS`), errors can be trusted where [`effective_sample_size`] is a
few dozen or more.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from aldrift_hf.reporting.record import replace_file
from aldrift_hf.types import Completions

Array: TypeAlias = NDArray[np.float64]


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float


@dataclass
class Gold:
    """Draws of the prior for a task; draw `r` is for prompt `r % P`.

    Attributes:
        about: what the draws depend on, as JSON values: they are never mixed with others.
        prompts: token ids of the `P` prompts.
        completions: token ids of the draws.
        log_prior: `log L` of each, nats.
        cost: `d` of each.
    """

    about: dict[str, Any]
    prompts: list[list[int]]
    completions: list[list[int]]
    log_prior: list[float]
    cost: list[float]

    def __len__(self) -> int:
        return len(self.cost)

    @property
    def prompt_of_draws(self) -> list[list[int]]:
        """The prompt of each draw."""
        return [self.prompts[row % len(self.prompts)] for row in range(len(self))]

    @property
    def padded(self) -> Completions:
        """The draws as they are scored; what fills them up has no meaning."""
        return Completions.of(self.completions, pad_token_id=0)

    def by_prompt(self, column: Any) -> Array:
        """A number for each draw as `[P, n]`; a last turn that does not have a draw for every prompt is left out."""
        prompts = len(self.prompts)
        whole = len(self) // prompts * prompts
        return np.asarray(column, dtype=np.float64)[:whole].reshape(-1, prompts).T

    def write(self, path: Path) -> None:
        """Write a JSON file, one draw per line. A killed process leaves the file that was there before."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = zip(self.cost, self.log_prior, self.completions, strict=True)
        lines = [
            f'{{"about": {json.dumps(self.about)},',
            f'"prompts": {_compact(self.prompts)},',
            '"columns": ["cost", "log_prior", "token_ids"],',
            '"draws": [',
            ",\n".join(_compact(row) for row in rows),
            "]}",
        ]
        replace_file(path, lines)

    @classmethod
    def read(cls, path: Path) -> Gold:
        """The inverse of [`write`]."""
        stored = json.loads(path.read_text())
        cost, log_prior, completions = ([row[part] for row in stored["draws"]] for part in range(3))
        return cls(stored["about"], stored["prompts"], completions, log_prior, cost)


def _compact(values: Any) -> str:
    return json.dumps(values, separators=(",", ":"))


def weights(cost: Array, tau: float) -> Array:
    """Self-normalised weights of the draws under `p_τ`, `[P, n]`; each prompt's sum to 1."""
    return np.exp(_log_weights(cost, tau) - _log_sum(cost, tau)[:, None])


def effective_sample_size(cost: Array, tau: float) -> Array:
    """`ESS`, the number of draws of `p_τ` that each prompt's draws are worth, `[P]`."""
    ess: Array = 1 / (weights(cost, tau) ** 2).sum(-1)
    return ess


def draws(cost: Array, tau: float, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Positions of `count` draws of `p_τ` for each prompt, `[P, count]`: independent, given the draws of the prior."""
    return np.array([rng.choice(len(row), count, p=row) for row in weights(cost, tau)])


def log_z(cost: Array, tau: float) -> Estimate:
    """`log Z_τ = log E_L[exp(-τ·d)]`, nats."""
    return _mean(np.zeros_like(cost), cost, tau, times_log_z=1.0)


def mean(values: Array, cost: Array, tau: float) -> Estimate:
    """The mean under `p_τ` of a number that each draw has, `[P, n]`.

    That of `log q - log q'` is how much farther `p_τ` is from the model `q'` than from `q`: its error is smaller than
    those of the two distances, because they have the draws in common.
    """
    return _mean(values, cost, tau)


def plain_mean(values: Array) -> Estimate:
    """The mean of draws without weights, `[P, n]`."""
    return mean(values, np.zeros_like(values), 0.0)


def with_errors(**estimates: Estimate) -> dict[str, float]:
    """Estimates by their names, and the standard error of each under `NAME_error`."""
    measured = {name: estimate.value for name, estimate in estimates.items()}
    return measured | {f"{name}_error": estimate.error for name, estimate in estimates.items()}


def mean_cost(cost: Array, tau: float) -> Estimate:
    """`E[d]` under `p_τ`; under the prior for `τ = 0`."""
    return mean(cost, cost, tau)


def kl_from_prior(cost: Array, tau: float) -> Estimate:
    """`KL(p_τ‖L) = -τ·E_{p_τ}[d] - log Z_τ`, nats."""
    return _mean(-tau * cost, cost, tau, times_log_z=-1.0)


def kl_to_model(cost: Array, tau: float, log_prior: Array, log_model: Array) -> Estimate:
    """`KL(p_τ‖q) = E_{p_τ}[log L - τ·d - log q] - log Z_τ`, nats.

    Args:
        cost: `[P, n]`.
        tau: τ.
        log_prior: `log L` of the draws, `[P, n]`.
        log_model: `log q` of the draws, `[P, n]`.
    """
    return _mean(log_prior - tau * cost - log_model, cost, tau, times_log_z=-1.0)


def _mean(values: Array, cost: Array, tau: float, *, times_log_z: float = 0.0) -> Estimate:
    """`E_{p_τ}[values] + times_log_z · log Z_τ`, its mean over prompts.

    With `u = exp(-τ·d) / Z_τ`, the influence of a draw on `E_{p_τ}[f]` is `u·(f - E_{p_τ}[f])`, and on `log Z_τ` it is
    `u - 1`.
    """
    prompts, n = cost.shape
    if n < 2:
        raise ValueError(f"there are {n} draws per prompt: an error needs at least two")
    relative = n * weights(cost, tau)
    of_values = (relative * values).mean(-1)
    influence = relative * (values - of_values[:, None]) + times_log_z * (relative - 1)
    of_prompts = of_values + times_log_z * (_log_sum(cost, tau) - np.log(n))
    errors = influence.std(-1, ddof=1) / np.sqrt(n)
    return Estimate(float(of_prompts.mean()), float(np.sqrt((errors**2).sum()) / prompts))


def _log_weights(cost: Array, tau: float) -> Array:
    return -tau * cost


def _log_sum(cost: Array, tau: float) -> Array:
    total: Array = np.logaddexp.reduce(_log_weights(cost, tau), axis=-1)
    return total
