"""ALDRIFT (arXiv 2503.06917) as a `transformers.Trainer`: one epoch is one rung of the temperature ladder.

The whole algorithm is [`ALDRIFTTrainer.begin_rung`]: propose, correct, and fill the data set from which the `Trainer`
then learns, as it learns from any other. Epochs, optimizer, schedule, logging, checkpoints, distributed training and
resume are the Trainer's own.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import reduce
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    set_seed,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import SchedulerType, TrainOutput

from ..algorithm import diagnostics, losses, samplers
from ..algorithm.archive import Archive, Snapshot
from ..algorithm.ladder import ADAPTIVE_RUNGS, PATIENCE, adaptive_tau, linear_ladder
from ..algorithm.metrics import proposal_metrics, success_share
from ..models import loading, numerics, prior, sharding, snapshots
from ..models.generation import neutral_generation_config
from ..models.prompts import encode_prompts
from ..objective.objective import OBJECTIVE_BATCH, CostFunction, Objective
from ..reporting import health
from ..reporting.console import LadderLines, print_completions
from ..reporting.progress import Bars
from ..reporting.record import RunRecord
from ..reporting.report import LiveReport
from ..streams import stream_seed
from ..types import Prompts, Proposals
from . import checkpoints
from .config import ALDRIFTConfig
from .data import check_dataset
from .interrupt import Interrupt
from .loop import Rungs
from .optimizer import rehearse, schedule_kwargs
from .rollout import TOLERANCE, Proposer
from .samples import RungSamples, SampleCollator
from .saving import SavingTrainer
from .settings import settings_of

logger = logging.getLogger(__name__)

# The first number of a random stream's address, after the run's seed: no two uses share a stream.
PROPOSE, CORRECT, SHUFFLE, EVALUATE, SAMPLE = range(5)


class ALDRIFTTrainer(SavingTrainer):
    """
    Turns a causal language model `L` into a sampler of `p_T(s) ∝ L(s)·exp(-T·d(s))`, without a gradient of `d`.

    Args:
        model (`str`, [`transformers.PreTrainedModel`] or [`peft.PeftModel`]):
            The prior `L` is exactly what you pass in: an id or path to load, a model (with `peft_config`: the prior is
            the model with the new adapter off; without: a frozen copy of it), or a `PeftModel` (a frozen copy of its
            active adapter is the prior, the adapter itself is trained on). The id or path of an adapter loads it on its
            base model.
        objective (`Callable` or `list[Callable]`):
            Cost functions `cost(prompts, completions, **columns) -> list[float]`, sync or async, lower is better, in
            `[0, D]`. Several are summed with `args.objective_weights`. See [`aldrift_hf.objective.objective`].
        args ([`ALDRIFTConfig`], *optional*):
            Settings.
        train_dataset ([`datasets.Dataset`] or `list`, *optional*):
            Prompts, in a column `"prompt"` (text or chat messages); further columns are handed to the objective. `None`
            is one empty prompt.
        processing_class ([`transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. `None` loads the one that belongs to the model.
        eval_dataset ([`datasets.Dataset`] or `list`, *optional*):
            Prompts for [`evaluate`]. `None` uses those of `train_dataset`.
        callbacks, optimizers:
            As in [`transformers.Trainer`].
        peft_config ([`peft.PeftConfig`], *optional*):
            Adapter to train. `None` with a plain model is full fine-tuning beside a frozen copy.

    Raises:
        ValueError, TypeError, OSError: for settings, data, an objective or an output directory that cannot work, before
            a model is loaded where the model is not needed to tell.
    """

    _tag_names = ["aldrift"]
    args: ALDRIFTConfig
    control: TrainerControl

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        objective: CostFunction | list[CostFunction],
        args: ALDRIFTConfig | None = None,
        train_dataset: Dataset | list[Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        eval_dataset: Dataset | list[Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
    ) -> None:
        args = ALDRIFTConfig() if args is None else args
        if not isinstance(args, ALDRIFTConfig):
            raise TypeError(f"args must be an ALDRIFTConfig, got {type(args).__name__}")
        loading.check_writable(str(args.output_dir))
        train = check_dataset(train_dataset, "train_dataset")
        evaluation = train if eval_dataset is None else check_dataset(eval_dataset, "eval_dataset")
        self.bars = Bars(shown=not args.disable_tqdm and args.process_index == 0)
        self.interrupt = Interrupt()
        self.objective = Objective(
            objective,
            args.objective_weights,
            args.objective_range,
            batch_size=args.generation_batch_size or OBJECTIVE_BATCH,
            on_error=args.objective_on_error,
            overlap=args.overlap_objective,
            output_dir=str(args.output_dir),
            bars=self.bars,
        )
        for dataset in (train, evaluation):
            self.objective.check_signature([name for name in dataset.column_names if name != "prompt"])
        if peft_config is not None:
            prior.check_peft_config(peft_config)
        if optimizers[0] is None and not args.deepspeed:
            rehearse(args)

        tokenizer = loading.tokenizer_of(model, args) if processing_class is None else processing_class
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"processing_class must be a tokenizer, got {type(tokenizer).__name__}")
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no end-of-text token, so no completion could end. Set tokenizer.eos_token to the "
                "token that your model ends with."
            )
        if not isinstance(model, str) and args.model_init_kwargs is not None:
            raise ValueError(
                "model_init_kwargs is for a model given by id or path; this one is loaded already. Drop it."
            )
        self.args = args
        self.processing_class = tokenizer
        adapter = loading.is_adapter(model, args)  # asked once: of an id, the Hub is
        model_config = loading.config_of(model, args, adapter)
        loading.check_trainable(model_config, args, adapter or peft_config is not None)
        self.context_length = loading.context_length(model_config)
        self.prompts = self._encode(train)
        self.eval_prompts = self._encode(evaluation)
        loaded = loading.load_model(model, args, adapter) if isinstance(model, str) else model
        pad_token_id = int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

        set_seed(args.seed)  # a new adapter's weights are random; the Trainer seeds too late for them
        policy, frozen = prior.split(loaded, peft_config)
        if args.learns_densities:
            losses.without_dropout(policy)
        super().__init__(
            model=policy,
            args=args,
            data_collator=SampleCollator(pad_token_id),
            train_dataset=RungSamples(1, self.prompts.token_ids),
            eval_dataset=evaluation,
            processing_class=tokenizer,
            compute_loss_func=losses.maximum_likelihood,
            callbacks=[Rungs(self), *(callbacks or [])],
            optimizers=optimizers,
        )
        sharding.check(self.accelerator, prior.base_model(loaded))
        self.proposer = Proposer(
            args,
            self._running,
            self._unwrapped,
            frozen,
            self.objective,
            tokenizer,
            neutral_generation_config(
                max_completion_length=args.max_completion_length,
                eos_token_ids=loading.eos_token_ids(prior.base_model(loaded), tokenizer),
                pad_token_id=pad_token_id,
            ),
            pad_token_id,
            self.bars,
            self._stop_if_asked,
        )
        if self.pop_callback(DEFAULT_PROGRESS_CALLBACK) is not None:
            self.add_callback(LadderLines(self.bars.console))
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)
        samples_per_rung = len(self.prompts) * args.num_chains
        rows_per_update = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.updates_per_rung = args.updates_per_rung or math.ceil(samples_per_rung / rows_per_update)
        self.samples = RungSamples(self.updates_per_rung * rows_per_update, self.prompts.token_ids)
        self.train_dataset = self.samples
        self.archive = Archive(args.archive_window) if args.sampler == "archive" else None
        self.progress = checkpoints.Progress()
        self.record = RunRecord(settings_of(args, policy, self.objective.names, self.prompts, tokenizer))
        self.live_report = LiveReport()
        self.rungs_wanted = int(args.num_train_epochs)
        self._first_proposals: tuple[Proposals, dict[str, float]] | None = None
        self._draws = 0
        self._said: set[str] = set()
        """Kinds of cautions that a rung gave rise to, each logged once a run."""

    # ---- The algorithm ----------------------------------------------------------------------------------------------

    def begin_rung(self, rung: int) -> None:
        """Propose and correct on rung `rung`, and lay out its samples to learn from (steps 1 and 2 of ALDRIFT)."""
        progress, args = self.progress, self.args
        # The first rung's may have been drawn already, to see the range of the objective.
        proposals, seconds = self._first_proposals or self.proposer.propose(
            self.prompts, args.proposals_per_prompt, (PROPOSE, rung)
        )
        self._first_proposals = None
        pool = proposals if self.archive is None else self._extend_archive(proposals)
        tau_before, tau = progress.tau, self._next_tau(pool, rung)
        index, acceptance_rate = self._correct(pool, tau_before, tau, rung)
        chosen = pool.flat(index)

        log_z_before = torch.tensor(progress.log_z or [0.0] * len(self.prompts), dtype=torch.float64)
        if self.archive is None:
            log_z = log_z_before + diagnostics.log_z_increment(pool.log_weight(tau_before), pool.log_weight(tau))
        else:  # the archive still holds the prior's draws: no need to go step by step
            log_z = diagnostics.log_z(pool.log_weight(tau))
        self._lay_out(pool, index, log_z, tau, rung)
        excluded = (proposals.log_prior == -math.inf).double().mean().item()
        progress.rung, progress.tau, progress.log_z = rung, tau, log_z.tolist()
        progress.proposals += len(proposals.texts)
        progress.batches = self.proposer.batches
        progress.loss_sum, progress.updates, progress.learn_seconds = 0.0, 0, 0.0
        progress.records[rung:] = [
            {
                "rung": rung,
                "tau": tau,
                **proposal_metrics(proposals, tau, self.objective.best),
                **self._archive_measures(pool, tau),
                "sample_objective_mean": pool.objective.flatten()[chosen].mean().item(),
                "acceptance_rate": acceptance_rate,
                "log_z_increment": (log_z - log_z_before).mean().item(),
                "log_z": log_z.mean().item(),
                "missing_mass": diagnostics.missing_mass(log_z, proposals.log_weight(tau)).mean().item(),
                "distinct_proposals": proposals.distinct_share(),
                "distinct_samples": pool.distinct_share(chosen),
                "flat": proposals.flat_share(),
                "proposals": progress.proposals,
                "objective_calls": self.objective_calls,
                **({"excluded": excluded} if excluded else {}),
                **({"objective_failures": self.objective.failures} if self.objective.failures else {}),
                **self._components(proposals),
                **seconds,
            }
        ]
        self.record.take_draws(proposals, self.prompts, tau)
        self.write_record()
        self._warn(f"The model that drew rung {rung}", progress.records[-1], self._said)
        if args.log_completions and self.is_world_process_zero():
            print_completions(self.bars.console, proposals, proposals.log_weight(tau), self.prompts, rung, tau)

    def end_rung(self) -> None:
        """Complete the rung's record with what was learnt, log it and write it to `output_dir/rungs.jsonl`."""
        progress = self.progress
        record = progress.records[-1]
        loss = torch.tensor(progress.loss_sum / max(progress.updates, 1), device=self.args.device)
        record["sft_loss"] = cast(Tensor, reduce(loss, "mean")).item()
        record["seconds_learn"] = progress.learn_seconds
        self.log({key: value for key, value in record.items() if math.isfinite(value)})
        self.write_record()

    def _warn(self, who: str, figures: dict[str, float], said: set[str] | None = None) -> None:
        """Say what to be wary of in the figures of a rung's draws or the final model's, but for the kinds `said`."""
        said = set() if said is None else said
        for kind, words in health.cautions(who, self.record.settings, figures).items():
            if kind not in said and self.is_world_process_zero():
                logger.warning(words)
            said.add(kind)

    def write_record(self) -> None:
        """Bring `record`, its files in `output_dir` and the report there up to date."""
        self.record.settings["objective_range"] = self.progress.objective_range
        self.record.rungs = [record for record in self.progress.records if "sft_loss" in record]
        self.record.log_z = self.progress.log_z
        if self.is_world_process_zero():
            self.record.write(str(self.args.output_dir))
            self.live_report.update(self.record, str(self.args.output_dir))

    @property
    def objective_calls(self) -> int:
        """Distinct (prompt, completion) pairs that the objective was asked for since training began."""
        return self.objective.calls - self.progress.calls_before

    def _next_tau(self, pool: Proposals, rung: int) -> float:
        """Inverse temperature of a rung; those beyond the ladder's end stay at T."""
        args = self.args
        if args.ladder == "linear":
            return self.ladder[min(rung, len(self.ladder) - 1)]
        # Of the archive, too, a rung's worth of draws is what counts as whole.
        least = args.ess_threshold * args.proposals_per_prompt
        return adaptive_tau(pool.log_weight(0.0), pool.objective, self.progress.tau, args.tau_max, least)

    @property
    def ladder(self) -> list[float]:
        """The inverse temperatures of a linear ladder. Known once D is: set, or seen on the prior's draws."""
        args = self.args
        step = args.tau_step if args.tau_step is not None else 1 / cast(float, self.progress.objective_range)
        return linear_ladder(args.tau_max, step)

    def _extend_archive(self, proposals: Proposals) -> Proposals:
        """Add a rung's proposals to the archive: all of its draws, with the mixture of their models as the model."""
        archive = cast(Archive, self.archive)
        policy = self._unwrapped()
        is_prior = torch.allclose(proposals.log_model, proposals.log_prior, rtol=0.0, atol=TOLERANCE)

        def score(snapshot: Snapshot | None, drawn: Proposals) -> Tensor:
            with contextlib.nullcontext() if snapshot is None else snapshots.loaded(policy, snapshot):
                return self.proposer.score(self.prompts, drawn)

        archive.extend(proposals, {} if is_prior else snapshots.take(policy), score)
        return archive.mixture()

    def _resample(self, pool: Proposals, tau: float, m: int, generator: torch.Generator) -> Tensor:
        """`m` draws a prompt of the archive, by their weights at `tau`, `[P, m]`."""
        log_weight = pool.log_weight(tau)
        if self.args.pareto_smoothing:
            log_weight = diagnostics.pareto_smoothed(log_weight)
        return samplers.systematic_resample(log_weight, m, generator)

    def _lay_out(self, pool: Proposals, index: Tensor, log_z: Tensor, tau: float, rung: int) -> None:
        """The rung's samples, `index` `[P, k]` into the pool's draws, for the Trainer to learn from."""
        generator, densities = self._generator(SHUFFLE, rung), None
        if self.args.learns_densities:
            # As many again of the proposals as they are: what the model should not say is told by them alone.
            plain = samplers.systematic_resample(torch.zeros_like(pool.objective), index.shape[1], generator)
            index = torch.cat([index, plain], dim=1)
            log_target = pool.log_target(tau) - log_z[:, None]
            log_reference = losses.log_reference(log_target, pool.log_model)
            densities = {"log_target": log_target.gather(1, index), "log_reference": log_reference.gather(1, index)}
            densities = {name: column.flatten() for name, column in densities.items()}
        rows = pool.flat(index)
        self.samples.fill(pool.rows[rows], pool.completions.select(rows), generator, densities)

    def _archive_measures(self, pool: Proposals, tau: float) -> dict[str, float]:
        """Diagnostics of the archive's own weights, from which the samples are drawn."""
        if self.archive is None:
            return {}
        measures = proposal_metrics(pool, tau, self.objective.best)
        return {
            "archive_draws": pool.objective.shape[1],
            "archive_ess": measures["ess"],
            "archive_khat": measures["khat"],
        }

    def _correct(self, proposals: Proposals, tau_before: float, tau: float, rung: int) -> tuple[Tensor, float]:
        """Which of each prompt's proposals become samples, `[P, m]`; and the acceptance rate, NaN without chains."""
        m, generator = self.args.num_chains, self._generator(CORRECT, rung)
        if self.args.sampler == "metropolis_hastings":
            return _run_chains(proposals.log_weight(tau), m, generator)
        if self.args.sampler == "top":
            return samplers.top(proposals.objective, proposals.log_prior, m), math.nan
        if self.args.sampler == "archive":
            # As many as the rung's updates take in: more would not be learnt, fewer would be learnt more than once.
            share = 1 - losses.REFERENCE_SHARE if self.args.learns_densities else 1.0
            rows = math.ceil(share * len(self.samples) / len(self.prompts))
            return self._resample(proposals, tau, rows, generator), math.nan
        return samplers.systematic_resample(-(tau - tau_before) * proposals.objective, m, generator), math.nan

    # ---- Training -------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Climb the ladder. See [`transformers.Trainer.train`].

        At the end the final model is checked for missing mass (as in [`evaluate`], on the training prompts), unless
        `max_objective_calls` is spent.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or `True` for the last one in `output_dir`. The run then goes
                on as if it had never been interrupted, also from the middle of a rung.

        Raises:
            ValueError: if there is no such checkpoint, or it is damaged, or belongs to other settings or data.
            FloatingPointError: if log-probabilities, a loss or a gradient are no numbers, before they do harm.
            KeyboardInterrupt: after Ctrl-C, at the next safe point, with a checkpoint; after a second one, at once.
        """
        folder = checkpoints.to_resume_from(resume_from_checkpoint, str(self.args.output_dir))
        if folder is None:
            self.progress = checkpoints.Progress(
                objective_range=self.args.objective_range, calls_before=self.objective.calls
            )
            if self.archive is not None:
                self.archive = Archive(self.args.archive_window)
        else:
            self.progress = checkpoints.load(folder, self.samples, self.objective, self._must_agree())
            self.proposer.batches = self.progress.batches
            if self.archive is not None:
                checkpoints.load_archive(folder, self.archive, self.proposer.decode)
        self.record.finished, self.record.metrics = False, {}
        self._said.clear()
        if self.progress.objective_range is None:
            self._measure_objective_range()
        rungs = self.rungs_wanted
        if rungs == -1:
            rungs = len(self.ladder) if self.args.ladder == "linear" else ADAPTIVE_RUNGS
            if self.args.ladder == "adaptive" and self.args.lr_scheduler_type != "constant":
                logger.warning(
                    "an adaptive ladder's length is not known beforehand: lr_scheduler_type="
                    f"{SchedulerType(self.args.lr_scheduler_type).value} is laid out over {ADAPTIVE_RUNGS} rungs, and "
                    "so hardly changes the learning rate. Set num_train_epochs, the number of rungs, or use 'constant'."
                )
        if folder is not None and self._has_ended() and self.progress.updates == self.updates_per_rung:
            rungs = self.progress.rung + 1  # the run ended with the checkpoint's rung: there is none to go on with
        self.args.num_train_epochs = rungs
        with self.interrupt.caught(), self.bars.live():
            output = super().train(resume_from_checkpoint=folder, **kwargs)
        if not self.progress.complete:
            self.end_rung()  # resumed from the very last update: the loop had nothing left to do
        self.record.finished = True
        if not self._budget_is_spent():
            output.metrics.update(self._measure(self.prompts, "final"))
        self.write_record()
        self.create_model_card()
        return output

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.args.learns_densities:
            densities = {name: inputs.pop(name) for name in ("log_target", "log_reference")}
            self.compute_loss_func = functools.partial(losses.generalized_kl, **densities)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LambdaLR:
        self.args.lr_scheduler_kwargs = schedule_kwargs(self.args, num_training_steps)
        return cast(torch.optim.lr_scheduler.LambdaLR, super().create_scheduler(num_training_steps, optimizer))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        value = loss.item()
        numerics.check_loss(value, self.args.learning_rate)
        self.progress.loss_sum += value
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        # The rung's samples come in an order of their own, which the checkpoint keeps.
        return torch.utils.data.SequentialSampler(self.samples)

    def _measure_objective_range(self) -> None:
        """D from the first rung's proposals: before the first update the policy is the prior."""
        self._first_proposals = self.proposer.propose(self.prompts, self.args.proposals_per_prompt, (PROPOSE, 0))
        worst = self._first_proposals[0].objective.max().item()
        if worst == 0:
            raise ValueError(
                "every draw from the prior has cost 0, so there is nothing to optimise and no range to take the "
                "ladder's steps from. Check the objective, or set objective_range."
            )
        self.progress.objective_range = worst
        logger.info(f"objective_range not set: D = {worst:g}, the largest cost among the first rung's proposals")

    def _stop_if_asked(self) -> None:
        """Between updates and rounds of proposals: ends the run, with a checkpoint, if Ctrl-C was pressed."""
        if not self.interrupt.asked():
            return
        step = self.state.global_step
        if step and not os.path.isdir(os.path.join(str(self.args.output_dir), f"checkpoint-{step}")):
            self._save_checkpoint(self.model, None)
        raise KeyboardInterrupt(f"stopped after update {step}; go on with resume_from_checkpoint=True")

    def _has_ended(self) -> bool:
        return self._budget_is_spent() or self._ladder_has_ended() or self._ladder_is_stuck()

    def _ladder_has_ended(self) -> bool:
        return self.args.ladder == "adaptive" and self.rungs_wanted == -1 and self.progress.tau == self.args.tau_max

    def _ladder_is_stuck(self) -> bool:
        """Whether an adaptive ladder has stood at one `τ` below T for too many rungs."""
        last = [record["tau"] for record in self.progress.records[-PATIENCE:]]
        below = self.args.ladder == "adaptive" and self.progress.tau < self.args.tau_max
        return below and len(last) == PATIENCE and len(set(last)) == 1

    def _budget_is_spent(self) -> bool:
        limit = self.args.max_objective_calls
        return limit is not None and self.objective_calls >= limit

    # ---- Evaluation and sampling ------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """How close the model is to `p_T`, from `num_chains · chain_length` fresh draws a prompt.

        Args:
            eval_dataset: prompts; `None` takes the trainer's `eval_dataset`, or else its `train_dataset`.
            ignore_keys: has no meaning here.
            metric_key_prefix: first part of the metrics' names.

        Returns:
            Under `eval_…`, means over prompts: `objective` (mean cost), `objective_best`, `success` (share of cost 0 or
            the best known), `distinct` (share of distinct draws), `ess` (share in [0, 1]), `khat`, `log_z` (of `p_T`,
            nats, from these draws), `kl` (KL(model‖p_T), nats, with the ladder's log Z where it is known), `kl_forward`
            (KL(p_T‖model), nats, blind to lost mass) and, on training prompts after training began, `missing_mass`
            (nats; see [`aldrift_hf.algorithm.diagnostics.missing_mass`]).
        """
        prompts = (
            self.eval_prompts if eval_dataset is None else self._encode(check_dataset(eval_dataset, "eval_dataset"))
        )
        self.objective.check_signature(prompts.columns)
        metrics = self._measure(prompts, metric_key_prefix)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measure(self, prompts: Prompts, prefix: str) -> dict[str, float]:
        """The metrics of [`evaluate`], logged; and a warning where the model lost mass."""
        start = time.time()
        stream = (EVALUATE, self.state.global_step)
        proposals, _ = self.proposer.propose(prompts, self.args.proposals_per_prompt, stream)
        tau = self.args.tau_max
        log_weight = proposals.log_weight(tau)
        log_z = diagnostics.log_z(log_weight)
        measures = proposal_metrics(proposals, tau, self.objective.best)
        metrics = {
            "objective": measures.pop("objective_mean"),
            **measures,
            "distinct": proposals.distinct_share(),
            "log_z": log_z.mean().item(),
            "kl_forward": diagnostics.forward_kl(log_weight).mean().item(),
        }
        if prompts.keys == self.prompts.keys and self.progress.log_z:
            ladder_log_z = torch.tensor(self.progress.log_z, dtype=torch.float64)
            at_rung = proposals.log_weight(self.progress.tau)
            metrics["missing_mass"] = diagnostics.missing_mass(ladder_log_z, at_rung).mean().item()
            if self.progress.tau == tau:
                log_z = ladder_log_z
        metrics["kl"] = diagnostics.reverse_kl(log_weight, log_z).mean().item()
        metrics["runtime"] = time.time() - start
        if prefix == "final":
            self.record.metrics = dict(metrics)
            self.record.take_draws(proposals, prompts, tau)
        self._warn("The model", metrics)
        metrics = {f"{prefix}_{key}": value for key, value in metrics.items()}
        self.log({key: value for key, value in metrics.items() if math.isfinite(value)})
        return metrics

    def sample(
        self,
        num_samples: int,
        prompts: Dataset | list[Any] | None = None,
        chain_length: int | None = None,
        correction: str = "metropolis_hastings",
    ) -> Dataset:
        """Corrected draws from `p_T`.

        Fresh draws of the model are corrected by `num_samples` chains of `chain_length` proposals a prompt, whose last
        states are returned: Metropolis-Hastings chains, or one step of i-SIR (see [`isir`]), which
        takes one of a chain's proposals by their weights. With `chain_length=1` no correction is made: the draws are
        the model's own. Or, with `correction="archive"`, nothing is drawn and no objective is called: the samples are
        resampled from all proposals of the run, by their weights.

        Their diagnostics are logged under `sample_…`: acceptance rate, `ess`, `khat`, `log_z`, and the share of
        distinct samples. Chains can only go where the model goes: what it lost (missing mass), they miss.

        Args:
            num_samples: samples a prompt.
            prompts: a data set with the objective's columns, or a list of prompts; `None` takes the training prompts.
            chain_length: proposals a chain; `None` takes `args.chain_length`. Longer chains come closer to `p_T`.
            correction: `"metropolis_hastings"`, `"isir"` or, on the training prompts after training with
                `sampler="archive"`, `"archive"`.

        Returns:
            A data set of `num_samples` rows a prompt, ordered by prompt, with `prompt`, `completion`, `objective`,
            `log_prior` and `log_model` (nats; of the archive: of the mixture of its models).

        Raises:
            ValueError: for a number below 1, or a correction that is not known or not possible.
        """
        steps = self.args.steps_per_chain if chain_length is None else chain_length
        if num_samples < 1 or steps < 1:
            raise ValueError(f"num_samples and chain_length must be at least 1, got {num_samples} and {steps}")
        if correction not in ("metropolis_hastings", "isir", "archive"):
            raise ValueError(f"correction must be metropolis_hastings, isir or archive, got {correction!r}")
        if correction == "archive" and (self.archive is None or not self.archive.rungs or prompts is not None):
            raise ValueError(
                "correction='archive' takes from the proposals of a run: train with sampler='archive' first, and leave "
                "prompts out."
            )
        asked = self.prompts if prompts is None else self._encode(check_dataset(prompts, "prompts"))
        self.objective.check_signature(asked.columns)
        proposals, index, acceptance_rate = self._draw_corrected(asked, num_samples, steps, correction)
        tau = self.args.tau_max
        log_weight = proposals.log_weight(tau)
        chosen = proposals.flat(index)
        measures = proposal_metrics(proposals, self.args.tau_max, self.objective.best)
        picked = proposals.objective.flatten()[chosen]
        metrics = {
            "acceptance_rate": acceptance_rate,
            "ess": measures["ess"],
            "khat": measures["khat"],
            "log_z": diagnostics.log_z(log_weight).mean().item(),
            "objective": picked.mean().item(),
            "success": success_share(picked, self.objective.best),
            "distinct": proposals.distinct_share(chosen),
        }
        self.log({f"sample_{key}": value for key, value in metrics.items() if math.isfinite(value)})
        return Dataset.from_dict(
            {
                "prompt": [asked.rows[int(proposals.rows[i])]["prompt"] for i in chosen.tolist()],
                "completion": [proposals.texts[i] for i in chosen.tolist()],
                "objective": picked.tolist(),
                "log_prior": proposals.log_prior.flatten()[chosen].tolist(),
                "log_model": proposals.log_model.flatten()[chosen].tolist(),
            }
        )

    def _draw_corrected(self, prompts: Prompts, m: int, steps: int, correction: str) -> tuple[Proposals, Tensor, float]:
        """Draws, which of them are samples of `p_T` (`[P, m]`, into each prompt's), and the acceptance rate."""
        self._draws += 1
        stream, tau = (SAMPLE, self._draws), self.args.tau_max
        if correction == "archive":
            pool = cast(Archive, self.archive).mixture()
            return pool, self._resample(pool, tau, m, self._generator(*stream)), math.nan
        proposals, _ = self.proposer.propose(prompts, m * steps, stream)
        kernel = samplers.isir if correction == "isir" else samplers.metropolis_hastings
        return proposals, *_run_chains(proposals.log_weight(tau), m, self._generator(*stream), kernel)

    def load_run(self, folder: str | os.PathLike[str]) -> None:
        """Take up what a run has trained, so that [`evaluate`] and [`sample`] work as after its own `train()`.

        The trainer must have been made as the run's was: with its prior, its adapter's settings and its objective. On
        other prompts, or for another objective, the ladder's log Z says nothing, and metrics that need it are left out.

        Args:
            folder: the run's output directory, with a saved model.

        Raises:
            ValueError, OSError, RuntimeError: if there is no run, or no model of this trainer's kind.
        """
        record = RunRecord.read(str(folder))
        loading.load_trained(cast(PreTrainedModel, self._unwrapped()), Path(folder))
        same = ("prompts", "prompts_fingerprint", "objective", "objective_weights", "max_completion_length")
        if record.rungs and all(record.settings[name] == self.record.settings[name] for name in same):
            self.progress.log_z, self.progress.tau = record.log_z, record.rungs[-1]["tau"]

    # ---- Models and text --------------------------------------------------------------------------------------------

    def _unwrapped(self) -> nn.Module:
        return cast(nn.Module, self.accelerator.unwrap_model(self.model))

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Where models may be run outside of training steps: parameters whole, and under the autocast of those."""
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and not self._is_wrapped():
            self.model.to(self.args.device)  # the Trainer leaves that to the wrapping, when training begins
        checkpointing = cast(dict[str, Any] | None, self.args.gradient_checkpointing_kwargs)
        with sharding.gathered(self.model_wrapped, self.accelerator, checkpointing), self.accelerator.autocast():
            yield

    def _is_wrapped(self) -> bool:
        return self.model_wrapped is not self.model or sharding.is_sharded(self.model)

    def _encode(self, dataset: Dataset) -> Prompts:
        return encode_prompts(
            dataset,
            cast(PreTrainedTokenizerBase, self.processing_class),
            max_completion_length=self.args.max_completion_length,
            context_length=self.context_length,
        )

    def _generator(self, *stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(stream_seed(self.args.seed, *stream))

    def _components(self, proposals: Proposals) -> dict[str, float]:
        if len(self.objective.functions) == 1:
            return {}
        means = self.objective.components(self.prompts, proposals.rows.tolist(), proposals.texts)
        return {f"objective/{name}": value for name, value in means.items()}


def _run_chains(
    log_weight: Tensor,
    m: int,
    generator: torch.Generator,
    kernel: Callable[[Tensor, torch.Generator], samplers.Chains] = samplers.metropolis_hastings,
) -> tuple[Tensor, float]:
    """`m` chains over each prompt's proposals `[P, m·M]`: their last states `[P, m]`, and the acceptance rate."""
    prompts, n = log_weight.shape
    chains = kernel(log_weight.view(prompts, m, n // m), generator)
    index = chains.last + (n // m) * torch.arange(m)
    return index, chains.acceptance_rate.mean().item()
