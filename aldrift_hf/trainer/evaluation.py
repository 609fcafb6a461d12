"""How close a model is to `p_T`, and corrected draws from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from .. import streams
from ..algorithm import diagnostics
from ..algorithm.errors import Influence, by_draw, mean_error, pooled_influence
from ..algorithm.metrics import prompt_metrics, proposal_metrics, success_share
from ..algorithm.samplers import Selection
from ..algorithm.samplers.chains import run_chains
from ..algorithm.samplers.kernels import isir, metropolis_hastings
from ..algorithm.samplers.suffix import suffix_chains
from ..reporting.record import prompt_rows
from ..types import Beginnings, Prompts, Proposals, Screen, Spans, join_prompts
from .parts import check_continues
from .run import Run

KERNELS = {"metropolis_hastings": metropolis_hastings, "isir": isir}
"""Corrections of fresh draws, all made in advance; `"suffix"` draws as its chains go on, and `"archive"` not at all."""


@dataclass(frozen=True)
class Measured:
    """What fresh draws of the model say of it.

    Attributes:
        metrics: those of [`ALDRIFTTrainer.evaluate`], without prefix.
        by_prompt: `prompt` and the figures of [`prompt_metrics`] of each, the largest `kl` first; with `missing_mass`
            where the ladder's log Z is known.
        proposals: the draws.
    """

    metrics: dict[str, float]
    by_prompt: list[dict[str, Any]]
    proposals: Proposals


def measure(
    run: Run, prompts: Prompts, step: int, per_prompt: int, which: Tensor | None = None, keep: bool = False
) -> Measured:
    """How close the model is to `p_T`.

    Args:
        run: the run.
        prompts: what to draw for.
        step: the update after which the model is measured: the address of the random stream.
        per_prompt: draws per prompt.
        which: `[S]`, positions of the prompts to draw for among `prompts`; `None` for all.
        keep: whether the journal keeps the draws.
    """
    tau, ladder = run.tau_max, run.state.ladder
    proposals = run.rollout.propose(prompts, per_prompt, (streams.EVALUATE, step), which=which, keep=keep)
    log_weight = proposals.log_weight(tau)
    log_z, fresh = diagnostics.log_z(log_weight), pooled_influence(log_weight, [log_weight.shape[-1]])
    measured = proposal_metrics(proposals, tau, run.args.success_threshold)
    metrics = {
        "objective": measured.pop("objective_mean"),
        **measured,
        "distinct": proposals.distinct_share(),
        "log_z": log_z.mean().item(),
        "log_z_error": mean_error(fresh.error()),
        "kl_forward": diagnostics.forward_kl(log_weight).mean().item(),
    }
    evenly = torch.full_like(log_weight, 1 / log_weight.shape[-1])
    kl_error = fresh.error(log_weight * evenly)
    missing: dict[str, Tensor] = {}
    if prompts.keys == run.prompts.keys and ladder.taus:
        here = ladder.of(proposals.prompts)
        at_its_end = proposals.log_weight(here.prompt_tau[:, None])
        of_ladder = Influence(torch.zeros_like(log_weight), here.log_z_error.square())
        missing = {"missing_mass": diagnostics.missing_mass(here.log_z, at_its_end)}
        metrics["missing_mass"] = missing["missing_mass"].mean().item()
        metrics["missing_mass_error"] = mean_error(of_ladder.error(at_its_end.softmax(-1)))
        known = here.prompt_tau == tau
        log_z = torch.where(known, here.log_z, log_z)
        kl_error = torch.where(known, of_ladder.error(log_weight * evenly), kl_error)
    by_prompt = prompt_metrics(proposals, tau, run.args.success_threshold, log_z) | missing
    metrics["kl"], metrics["kl_error"] = by_prompt["kl"].mean().item(), mean_error(kl_error)
    if len(log_z) > 1:
        metrics["kl_worst"], metrics["ess_worst"] = by_prompt["kl"].max().item(), by_prompt["ess"].min().item()
    return Measured(metrics, prompt_rows(proposals, prompts, by_prompt), proposals)


@dataclass(frozen=True)
class CorrectedDraws:
    """Draws, and which of them are samples of `p_T`.

    Attributes:
        proposals: the draws.
        selection: the samples among them.
        prompts: what was drawn for.
        fresh: draws of the model, or of the archive's mixtures, on which the diagnostics are measured.
    """

    proposals: Proposals
    selection: Selection
    prompts: Prompts
    fresh: Sequence[Proposals]

    @property
    def chosen(self) -> Tensor:
        """`[P·m]`, positions of the samples in the draws' flat columns."""
        return self.proposals.flat(self.selection.index)

    def metrics(self, tau: float, threshold: float) -> dict[str, float]:
        """Diagnostics of the draws, and cost and variety of the samples."""
        weights = [by_draw(draws.log_weight(tau), draws.texts_per_draw) for draws in self.fresh]
        picked = self.proposals.objective.flatten()[self.chosen]
        return {
            "acceptance_rate": self.selection.acceptance_rate,
            "ess": torch.cat([diagnostics.effective_sample_size(part) for part in weights]).mean().item(),
            "khat": torch.cat([diagnostics.pareto_khat(part) for part in weights]).nanmean().item(),
            "log_z": torch.cat([diagnostics.log_z(part) for part in weights]).mean().item(),
            "objective": picked.mean().item(),
            "success": success_share(picked, threshold),
            "distinct": self.proposals.distinct_share(self.chosen),
        }

    def dataset(self, texts: list[str]) -> Dataset:
        """The samples as a data set.

        Args:
            texts: of the samples.
        """
        proposals, chosen = self.proposals, self.chosen
        rows = proposals.rows[chosen].tolist()
        return Dataset.from_dict(
            {
                "prompt": [self.prompts.rows[row]["prompt"] for row in rows],
                "completion": texts,
                "objective": proposals.objective.flatten()[chosen].tolist(),
                "log_prior": proposals.log_prior.flatten()[chosen].tolist(),
                "log_model": proposals.log_model.flatten()[chosen].tolist(),
            }
        )


def draw_corrected(
    run: Run, prompts: Prompts, num_samples: int, steps: int, correction: str, call: int
) -> CorrectedDraws:
    """Samples of `p_T` from fresh draws of the model, or from the draws that the sampler keeps.

    Args:
        run: the run.
        prompts: what to draw for.
        num_samples: samples per prompt.
        steps: proposals per chain.
        correction: one of [`KERNELS`], or `"archive"`.
        call: number of this call: part of the random stream's address.

    Raises:
        ValueError: for a correction that is unknown, or that this run cannot make.
    """
    tau, address = run.tau_max, (streams.SAMPLE, call)
    generator = streams.generator(run.args.seed, *address)
    if correction == "archive":
        return _from_archive(run, prompts, num_samples, generator)
    if correction == "suffix":
        return _suffix_chains(run, prompts, num_samples, steps, address, generator)
    if correction not in KERNELS:
        raise ValueError(f"correction must be one of {', '.join(KERNELS)}, suffix or archive, got {correction!r}")
    proposals = run.rollout.propose(prompts, num_samples * steps, address)
    selection = run_chains(proposals.log_weight(tau), num_samples, generator, KERNELS[correction])
    return CorrectedDraws(proposals, selection, prompts, [proposals])


def _from_archive(run: Run, prompts: Prompts, num_samples: int, generator: torch.Generator) -> CorrectedDraws:
    """Samples from the draws that the sampler keeps."""
    tau, pools = run.tau_max, run.sampler.draws() if prompts is run.prompts else []
    if not pools:
        raise ValueError(
            "correction='archive' takes samples from the proposals of the run: train with a sampler that keeps "
            "them (sampler='archive') first, and leave prompts out."
        )
    if missing := len(prompts) - sum(len(pool.prompts) for pool in pools):
        raise ValueError(
            f"correction='archive' takes samples from the proposals of the run, which keeps none for {missing} of "
            f"{len(prompts)} prompts: the last archive_window={run.args.archive_window} rungs did not draw for them. "
            "Raise archive_window, or take another correction."
        )
    chosen = [pool.select(run.sampler.select(pool, tau, tau, num_samples, generator).index) for pool in pools]
    everything = torch.arange(num_samples).expand(len(prompts), -1)
    return CorrectedDraws(join_prompts(chosen), Selection(everything), prompts, pools)


def _suffix_chains(
    run: Run, prompts: Prompts, num_samples: int, steps: int, address: tuple[int, ...], generator: torch.Generator
) -> CorrectedDraws:
    """Chains that begin at a draw of the model and redraw a suffix of their state in every further step."""
    check_continues(run.rollout.engine, "correction")
    fresh = run.rollout.propose(prompts, num_samples, address)

    def redraw(step: int, beginnings: Beginnings | Spans, screen: Screen | None = None) -> Proposals:
        return run.rollout.propose(prompts, num_samples, (*address, step), beginnings, screen=screen)

    moved = suffix_chains(fresh, steps, run.tau_max, redraw, generator)
    return CorrectedDraws(moved.pool, moved.selection, prompts, [fresh])


def decoded(run: Run, draws: CorrectedDraws) -> list[str]:
    """Texts of the samples."""
    texts = draws.proposals.texts
    if texts is None:  # a pool of several rungs
        return run.rollout.decode(draws.proposals.completions.select(draws.chosen))
    return [texts[row] for row in draws.chosen.tolist()]
