"""A run along the ladder: its parts, its state, and what is done when a rung begins and when it ends."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from accelerate.utils import reduce
from torch import Tensor
from transformers.trainer_utils import SchedulerType

from ..algorithm import stopping
from ..algorithm.goals import Goal
from ..algorithm.ladders import Ladder
from ..algorithm.losses import Loss
from ..algorithm.metrics import completion_metrics, prompt_metrics, rung_metrics
from ..algorithm.prompt_groups import num_groups
from ..algorithm.rung import Rung, run_rung
from ..algorithm.samplers import Sampler
from ..objective.objective import Objective
from ..reporting.record import MAX_DRAWS, MAX_PROMPTS, RunRecord, evenly, prompt_rows
from ..types import Prompts, Proposals, Samples
from .config import ALDRIFTConfig
from .cycles import has_cycles, updates_for
from .rollout import Rollout
from .samples import RungSamples
from .state import Phase, RunState
from .training_rollout import TrainingRollout
from .validation import MAX_COUNT

logger = logging.getLogger(__name__)

MAX_RUNGS = 200
"""Most rungs where neither `num_rungs` nor `max_rungs` is set; or twice as many as the ladder has to T, or as many as
it has and two epochs over the prompts, if that is more."""
NUM_SCORED = 128
"""Samples whose log-probabilities tell how far updates have moved the model, at most."""
LEAST_MEASURED = 32
"""Draws per prompt that the final model is measured on, at least; with fewer calls left, it is not measured."""


@dataclass
class Run:
    """A run: [`aldrift_hf.algorithm.rung.run_rung`] with its parts, rung after rung.

    Attributes:
        args: the run's settings.
        prompts: what is drawn for.
        rollout: draws from the policy for any prompts.
        on_prompts: the policy on the run's own prompts.
        objective: the cost.
        sampler, ladder, loss, goal: the algorithm's parts.
        eos_token_ids: tokens that end a completion.
        samples: the rung's samples, from which the `Trainer` learns.
        updates_per_rung: optimizer updates per rung, for which an epoch has rows.
        ordinary_updates: how many of them are made, at most, on rungs that are not the run's last. If it is all, every
            rung makes so many; otherwise as many as its texts are worth.
        record: what is known of the run, for people; filled from `state`.
        tell: `tell(event, **facts)` passes an event on to the callbacks.
        log: logs figures.
        state: where the run stands.
    """

    args: ALDRIFTConfig
    prompts: Prompts
    rollout: Rollout
    on_prompts: TrainingRollout
    objective: Objective
    sampler: Sampler
    ladder: Ladder
    loss: Loss
    goal: Goal | None
    eos_token_ids: tuple[int, ...]
    samples: RungSamples
    updates_per_rung: int
    ordinary_updates: int
    record: RunRecord
    tell: Callable[..., None]
    log: Callable[[dict[str, float]], None]
    state: RunState

    def start(self) -> None:
        """Begin at the bottom of the ladder. Costs that were evaluated before are not evaluated again."""
        self.state = RunState.start(len(self.prompts), self.args.tau_max, self.args.objective_range)
        self.objective.reset()
        self.sampler.load_state_dict({})
        if not self._affordable():
            raise ValueError(
                f"max_objective_calls={self.args.max_objective_calls} does not allow one proposal for each of "
                f"{len(self.on_prompts.group(0))} prompts{self._chains_in_words()}. Raise it, or take fewer prompts, "
                "or fewer per rung (prompts_per_rung)."
            )
        self.on_prompts.per_prompt = self.sampler.whole_texts(self._affordable())
        if self.state.ladder.objective_range is None:
            self._measure_objective_range()
        self.update_record()

    def begin_rung(self) -> None:
        """Propose and correct on the next rung, and lay out its samples (steps 1 and 2 of ALDRIFT)."""
        state = self.state
        self.on_prompts.per_prompt = self.sampler.whole_texts(self._affordable())
        rung = run_rung(
            state.ladder,
            self.on_prompts,
            self.sampler,
            self.ladder,
            self.loss,
            self.goal,
            rows=lambda proposals: self.rows_per_update * self._updates_for(proposals),
            seed=self.args.seed,
        )
        self.samples.fill(rung.samples)
        state.ladder, state.phase = rung.state, Phase.DRAWN
        state.proposals += sum(map(len, rung.drawn))
        state.num_tokens += sum(map(self._tokens, rung.drawn))
        metrics = {
            "rung": state.rung,
            "tau": rung.state.tau,
            **rung_metrics(rung, self.args.success_threshold),
            **completion_metrics(rung.proposals, self.eos_token_ids),
            "num_tokens": state.num_tokens,
            "proposals": state.proposals,
            "objective_calls": self.objective.calls,
            **({"objective_failures": self.objective.failures} if self.objective.failures else {}),
            **self._components(rung.proposals),
            **self.rollout.guard.figures,
            **self.rollout.seconds,
        }
        metrics |= self._figures_of_the_sampler(rung, metrics)
        state.rungs.append(metrics)
        is_last = self.stop_reason() is not None
        longer = self.updates_per_rung // self.ordinary_updates if is_last else 1
        state.begin_learning(longer * self._updates_for(rung.proposals))
        if state.rung == 0:
            state.prior_costs = evenly(rung.proposals.objective.flatten().tolist(), MAX_DRAWS)
        by_prompt = prompt_metrics(rung.proposals, rung.state.tau, self.args.success_threshold, rung.after.log_z)
        self.record.take_draws(rung.proposals, self.prompts, rung.state.tau)
        self.record.prompt_metrics = prompt_rows(rung.proposals, self.prompts, by_prompt)[:MAX_PROMPTS]
        self.update_record()
        self.tell("on_rung_drawn", metrics=metrics, proposals=rung.proposals, prompts=self.prompts)

    def end_rung(self) -> None:
        """Complete the rung's record with what was learned, and log it."""
        state = self.state
        made = max(1, min(state.updates, state.planned))  # fewer than planned where a callback has stopped the run
        loss = torch.tensor(state.loss_sum / made, device=self.args.device)
        metrics = state.rungs[-1]
        metrics["loss"] = cast(Tensor, reduce(loss, "mean")).item()
        metrics["seconds_learn"] = state.learn_seconds
        metrics["learning_rate"], metrics["updates"] = state.learning_rate, made
        state.phase = Phase.LEARNED
        self.update_record()
        self.log({key: value for key, value in metrics.items() if math.isfinite(value)})
        self.tell("on_rung_learned")

    def finish(self, updates: int) -> None:
        """Say that training has ended, after so many optimizer updates."""
        self.record.finished = True
        if not self.record.ended_by and self.has_learned:  # resumed from its last update
            self.record.ended_by = self.stop_reason() or ""
        if not self.record.ended_by:
            self.record.ended_by = f"Training was stopped after update {updates}, by max_steps or a callback."

    def take_up(self, record: RunRecord) -> None:
        """The model is that of another run: its ladder's log Z holds here, too, for the same prompts and objective."""
        self.on_prompts.is_prior = False
        if self.goal is not None and record.tau_max is not None:
            self.state.ladder = replace(self.state.ladder, tau_max=record.tau_max, tau_max_error=record.tau_max_error)
        same = ("prompts", "prompts_fingerprint", "objective", "objective_weights", "max_completion_length")
        if record.rungs and all(record.settings[name] == self.record.settings[name] for name in same):
            known = (record.log_z, record.log_z_error, record.prompt_tau)
            log_z, error, tau = (torch.tensor(values, dtype=torch.float64) for values in known)
            self.state.ladder = replace(
                self.state.ladder,
                log_z=log_z,
                log_z_error=error,
                prompt_tau=tau,
                taus=(record.rungs[-1]["tau"],),
                objective_range=record.objective_range,
            )

    def learned(self, loss: float) -> None:
        """Count a micro-batch's loss."""
        self.state.loss_sum += loss

    def updated(self, seconds: float, learning_rate: float) -> None:
        """Count an optimizer update, or one that is skipped because the rung is settled."""
        if not self.state.settled:
            self.state.learning_rate = max(self.state.learning_rate, learning_rate)
        self.state.updates += 1
        self.state.learn_seconds += seconds
        self.on_prompts.is_prior = False

    def sample_log_probs(self) -> Tensor:
        """`log q` of the rung's samples under the policy as it is now, `[n]`; of an even choice if they are many."""
        samples = cast(Samples, self.samples.samples)
        chosen = torch.linspace(0, len(samples.rows) - 1, min(NUM_SCORED, len(samples.rows))).long()
        nothing = torch.zeros(1, len(chosen), dtype=torch.float64)
        drawn = Proposals(samples.rows[chosen], samples.completions.select(chosen), nothing, nothing, nothing)
        return self.rollout.score(self.prompts, drawn).flatten()

    def update_record(self) -> None:
        """Bring the record up to date with the state."""
        rungs = self.state.rungs
        self.record.prior_costs = list(self.state.prior_costs)
        self.record.rungs = list(rungs if self.state.phase is Phase.LEARNED else rungs[:-1])
        self.record.log_z = self.state.ladder.log_z.tolist()
        self.record.log_z_error = self.state.ladder.log_z_error.tolist()
        self.record.prompt_tau = self.state.ladder.prompt_tau.tolist()
        tau_max = self.state.ladder.tau_max
        self.record.tau_max = tau_max if math.isfinite(tau_max) else None
        self.record.tau_max_error = self.state.ladder.tau_max_error
        self.record.objective_range = self.state.ladder.objective_range

    @property
    def tau_max(self) -> float:
        """T: as given, or as the run has found it.

        Raises:
            ValueError: where it has not.
        """
        tau = self.state.ladder.tau_max
        if math.isinf(tau):
            raise ValueError(
                "there is no T yet: no draw of the run so far has what T is chosen for (target_cost, target_success, "
                "kl_budget). Train first, with more draws or a goal that can be reached."
            )
        return tau

    @property
    def rows_per_update(self) -> int:
        """Training rows per optimizer update, over all processes."""
        return len(self.samples) // self.updates_per_rung

    @property
    def has_learned(self) -> bool:
        """Whether all updates of the rung that the ladder has reached are done."""
        return self.state.updates == self.updates_per_rung

    def _updates_for(self, proposals: Proposals) -> int:
        """Updates of a rung with these proposals, if it is not the run's last."""
        if self.ordinary_updates == self.updates_per_rung:
            return self.ordinary_updates
        return updates_for(proposals, self.ordinary_updates, self.rows_per_update)

    def stop_reason(self) -> str | None:
        """Why the run ends with the rung that it has reached, as a sentence; `None` to go on."""
        args, state = self.args, self.state
        rungs, at = state.rung + 1, f"rung {state.rung} at tau = {state.ladder.tau:g}"
        if not self._affordable():
            return (
                f"The budget is spent, with {at}: {self.objective.calls} distinct completions were evaluated, of "
                f"max_objective_calls={args.max_objective_calls}."
            )
        if args.num_rungs is not None:
            return f"All of num_rungs={args.num_rungs} rungs were climbed." if rungs >= args.num_rungs else None
        reason = self.ladder.stop_reason(state.ladder)
        if reason is None and self.sampler.corrects:
            reason = stopping.done(state.rungs, args.target_ess, self._groups)
        elif reason is None and rungs == self.ladder.num_rungs(state.ladder):
            reason = f"The ladder has reached its last rung, {at}; sampler={args.sampler!r} does not aim at p_T."
        if reason is None and rungs >= self._most_rungs():
            reason = f"The budget is spent, with {at}: {rungs} rungs, as many as max_rungs allows."
        return reason

    def rungs_to_climb(self, resumed: bool) -> int:
        """Epochs for the `Trainer`."""
        if resumed and self.stop_reason() is not None and self.has_learned:
            return self.state.rung + 1  # the run ended with the checkpoint's rung: nothing is left to do
        if self.args.num_rungs is None and (wide := self._laid_out_over_the_run()):
            logger.warning(
                f"the number of rungs is not known beforehand: {wide} is laid out over {self._most_rungs()} rungs, and "
                "the run may end before. Set num_rungs, or leave it out (warmup_steps may be a number of updates)."
            )
        return self._most_rungs()

    def measurable(self, prompts: int) -> int:
        """Draws for each of so many prompts to measure the model by, as calls are left; 0 if too few or without a T."""
        n, known = self.args.proposals, math.isfinite(self.state.ladder.tau_max)
        draws = min(n, self._draws_left(prompts)) if known else 0
        return draws if draws >= min(n, LEAST_MEASURED) else 0

    def _laid_out_over_the_run(self) -> str:
        """What of the learning rate's course depends on the number of updates; empty for nothing."""
        args = self.args
        if args.get_warmup_steps(1000) != args.get_warmup_steps(2000):
            return f"a warm-up over a share of all updates (warmup_steps={args.warmup_steps:g})"
        if has_cycles(args) or args.lr_scheduler_type in ("constant", "constant_with_warmup"):
            return ""
        return f"lr_scheduler_type={SchedulerType(args.lr_scheduler_type).value}"

    def _affordable(self) -> int:
        """Proposals per prompt of the next rung, each of which may be a call of the objective.

        The last rung has as many as are left. Less than half of a rung's would hardly teach the model anything, and is
        left for measuring it; 0 then, as after a rung that was the last (its draws may have repeated, so that it left
        calls). The first rung has what there is.
        """
        n, left = self.args.proposals, self._draws_left(len(self.on_prompts.group(self.state.rung + 1)))
        if self.state.rungs and self.state.rungs[-1]["draws"] < self.sampler.whole_texts(n):
            return 0
        step = self.args.steps_per_chain if self.sampler.uses_chains else 1
        most = next((size for size in range(n, 0, -step) if self.sampler.draws_for(size) <= left), 0)
        return most if 2 * most >= n or self.state.rung < 0 else 0

    def _draws_left(self, prompts: int) -> int:
        """Draws for each of so many prompts, each of which may be a call of the objective, for which calls are left."""
        limit = self.args.max_objective_calls
        return MAX_COUNT if limit is None else (limit - self.objective.calls) // prompts

    def _most_rungs(self) -> int:
        """The largest number of rungs that the run may have."""
        own = self.ladder.num_rungs(self.state.ladder) or 0
        return self.args.num_rungs or self.args.max_rungs or max(MAX_RUNGS, 2 * own, own + 2 * self._groups)

    @property
    def _groups(self) -> int:
        """Rungs per epoch over the prompts."""
        return num_groups(len(self.prompts), self.args.prompts_per_rung)

    def _chains_in_words(self) -> str:
        steps = self.args.steps_per_chain
        return f" (chain_length={steps} for each)" if self.sampler.uses_chains and steps > 1 else ""

    def _measure_objective_range(self) -> None:
        """D from the first rung's proposals, which are draws from the prior."""
        largest = self.on_prompts.draw_ahead().objective.max().item()
        if largest == 0:
            raise ValueError(
                "every draw from the prior has cost 0, so there is nothing to optimise, and no range to take the "
                "ladder's steps from. Check the objective, or set objective_range."
            )
        self.state.ladder = replace(self.state.ladder, objective_range=largest)
        logger.info(f"objective_range is not set: D = {largest:g}, the largest cost among the first rung's proposals")

    def _figures_of_the_sampler(self, rung: Rung, figures: Collection[str]) -> dict[str, float]:
        """What a sampler of the user's own measures must not pass for one of the run's `figures`."""
        own = self.sampler.metrics(rung.pool, rung.state.tau)
        if taken := sorted(own.keys() & {*figures, "loss", "seconds_learn", "learning_rate", "updates"}):
            raise ValueError(
                f"{type(self.sampler).__name__}.metrics returns figures under names that a rung's record uses already: "
                f"{', '.join(taken)}. Give them other names."
            )
        return own

    def _tokens(self, proposals: Proposals) -> int:
        lengths = torch.tensor([len(ids) for ids in self.prompts.token_ids])
        return int(lengths[proposals.rows].sum() + proposals.completions.length.sum())

    def _components(self, proposals: Proposals) -> dict[str, float]:
        """Mean cost of each objective, where there are several."""
        if len(self.objective.functions) == 1:
            return {}
        texts = cast(list[str], proposals.texts)
        means = self.objective.components(self.prompts, proposals.rows.tolist(), texts)
        return {f"objective/{name}": mean for name, mean in means.items()}

    def to_json(self) -> dict[str, Any]:
        """The part of the state that is kept as JSON in a checkpoint."""
        batches = self.rollout.batches
        return {**self.state.to_json(), "generation_batch_size": batches and batches.size}
