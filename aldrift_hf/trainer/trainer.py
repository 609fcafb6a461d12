"""ALDRIFT (arXiv 2503.06917) as a `transformers.Trainer`: one epoch is one rung of the temperature ladder.

The algorithm is [`aldrift_hf.algorithm.rung.run_rung`]; [`aldrift_hf.trainer.run.Run`] repeats it. Epochs, optimizer,
schedule, logging, checkpoints, distributed training and resume are the Trainer's own.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import time
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import TrainOutput

from ..algorithm.ladders import Ladder
from ..algorithm.losses import Loss
from ..algorithm.samplers import Sampler
from ..models import fidelity, loading, prior, sharding
from ..models.dropout import has_dropout, without_dropout
from ..models.engines import Engine
from ..models.kernels import attention_of_any_shape
from ..objective.protocol import CostFunction
from ..reporting.defaults import with_defaults
from ..reporting.hub import HubPusher
from ..reporting.record import MAX_PROMPTS, RunRecord
from ..reporting.report import Picture, Report
from ..reporting.writers import ReportWriter
from ..types import Prompts
from .accelerate_state import AccelerateState, forget
from .checkpoints import Checkpointer, to_resume_from
from .config import ALDRIFTConfig
from .data import check_dataset
from .deepspeed import in_precision
from .evaluation import decoded, draw_corrected, measure
from .events import Events
from .hooks import HookedTrainer, rung_loss
from .inputs import check_inputs, check_writable
from .interrupt import Interrupt
from .loop import RungLoop
from .open_settings import fill_batches, settled
from .optimizer import check_given_optimizer, check_optimizer, initial_rate, seeks_rate
from .parts import Parts, parts_of
from .rollout import Rollout, Runtime
from .run import Run
from .samples import RungSamples, SampleCollator
from .set_aside import set_aside
from .setup import make_objective, make_run
from .state import Phase
from .step_size import StepSize

logger = logging.getLogger(__name__)


class ALDRIFTTrainer(HookedTrainer):
    """
    Turns a causal language model `L` into a sampler of `p_T(s) ∝ L(s)·exp(-T·d(s))`, without a gradient of `d`.

    Args:
        model (`str`, [`transformers.PreTrainedModel`] or [`peft.PeftModel`]):
            The prior `L` is exactly what you pass in: an id or path to load, a model (with `peft_config`: the prior is
            the model with the new adapter off; without: a frozen copy of it), or a `PeftModel` (a frozen copy of its
            active adapter is the prior, and the adapter itself is trained). The id or path of an adapter loads it on
            its base model; that of a GGUF file (`FOLDER/FILE.gguf`) unpacks its weights.
        objective (`Callable` or `list[Callable]`):
            Cost functions `cost(prompts, completions, **columns) -> list[float]`, sync or async, in `[0, D]`, lower is
            better. Several are summed with `args.objective_weights`. See [`aldrift_hf.objective`].
        args ([`ALDRIFTConfig`], *optional*):
            Settings. Training does not change them.
        train_dataset ([`datasets.Dataset`] or `list`, *optional*):
            Prompts, in a column `"prompt"` (text or chat messages); other columns are passed to the objective. `None`
            is one empty prompt.
        eval_dataset ([`datasets.Dataset`] or `list`, *optional*):
            Prompts for [`evaluate`]. `None` uses those of `train_dataset`.
        processing_class ([`transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. `None` loads the one that belongs to the model.
        callbacks, optimizers:
            As in [`transformers.Trainer`]. A [`RunCallback`] also hears of rungs.
        peft_config ([`peft.PeftConfig`], *optional*):
            Adapter to train. `None` with a plain model is full fine-tuning beside a frozen copy.
        sampler ([`Sampler`], *optional*):
            An instance of your own (`recipes/your_own_parts.md`). Settings left open are still those of `args.sampler`.
        ladder ([`Ladder`], *optional*):
            Likewise, in place of `args.ladder`.
        loss ([`Loss`], *optional*):
            Likewise, in place of `args.loss_type`.
        engine ([`Engine`], *optional*):
            Likewise, in place of `args.engine`.

    Attributes:
        record ([`RunRecord`]): what is known of the run: settings, the figures of each rung, draws.
        prompt_metrics (`Dataset`): what [`evaluate`], or the final measurement, found for each prompt, the worst first:
            `prompt`, `objective`, `success`, `ess`, `distinct`, `log_z`, `kl` and, where the ladder's log Z is known,
            `missing_mass`; `None` before.

    Raises:
        ValueError, TypeError, OSError: for settings, data, an objective or an output directory that cannot work, before
            a model is loaded where that can be told without it.
    """

    _tag_names = ["aldrift"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        objective: CostFunction | list[CostFunction],
        args: ALDRIFTConfig | None = None,
        train_dataset: Dataset | list[Any] | None = None,
        eval_dataset: Dataset | list[Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
        *,
        sampler: Sampler | None = None,
        ladder: Ladder | None = None,
        loss: Loss | None = None,
        engine: Engine | None = None,
    ) -> None:
        args = ALDRIFTConfig() if args is None else args
        if not isinstance(args, ALDRIFTConfig):
            raise TypeError(f"args must be an ALDRIFTConfig, got {type(args).__name__}")
        train = check_dataset(train_dataset, "train_dataset")
        args = settled(args, len(train))
        args.output_dir = check_writable(str(args.output_dir))
        parts = parts_of(args, sampler, ladder, loss, engine)
        evaluation = train if eval_dataset is None else check_dataset(eval_dataset, "eval_dataset")
        self.events = Events(self)
        self.objective = make_objective(objective, args, [train, evaluation], self.events.progress)
        if optimizers[0] is None:
            check_optimizer(args)
        self.inputs = check_inputs(args, model, peft_config, processing_class, train, evaluation)
        if args.fills_batches and args.deepspeed_plugin is None:  # DeepSpeed has read them
            fill_batches(args, max(map(len, self.inputs.prompts.token_ids)) + args.max_completion_length)
        if isinstance(model, str):
            model = loading.load_model(model, args.model_init_kwargs, self.inputs.adapter)
            peft_config = loading.at_revision(peft_config, args.model_init_kwargs)
        set_seed(args.seed)  # a new adapter's weights are random; the Trainer seeds too late for them
        policy, self.prior = fidelity.split_checked(in_precision(model, args), peft_config)
        check_given_optimizer(*optimizers, policy)
        if parts.loss.exact_logprobs:
            without_dropout(policy)
            fidelity.check_exact(policy, self.prior)
        self._drops_out, self._seeks_rate = has_dropout(policy), seeks_rate(args, optimizers[0])
        self.interrupt, self._loop, self._step_size, self.hub = Interrupt(), RungLoop(), StepSize(), HubPusher(args)
        forget(args)
        super().__init__(
            model=policy,
            args=args,
            data_collator=SampleCollator(self.inputs.pad_token_id),
            train_dataset=RungSamples(1, self.inputs.prompts.token_ids),
            eval_dataset=evaluation,
            processing_class=self.inputs.tokenizer,
            compute_loss_func=functools.partial(rung_loss, parts.loss, {}),
            callbacks=[self._loop, self._step_size, *with_defaults(callbacks or [], args)],
            optimizers=optimizers,
        )
        self._accelerate_state = AccelerateState()
        self.pop_callback(DEFAULT_PROGRESS_CALLBACK)
        self.interrupt.take_over(self.pop_callback(JITCheckpointCallback))
        sharding.check(self.accelerator, prior.base_model(model), draws_first=args.objective_range is None)
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)
        self.run = self._make_run(parts, engine)
        self.train_dataset = self.run.samples
        self.checkpointer = Checkpointer(self.run, str(args.output_dir), args.save_total_limit)
        self._loop.attach(self.run)
        self._step_size.attach(self.run)
        self._sample_calls, self._evaluated = 0, dict[str, float]()
        self.prompt_metrics: Dataset | None = None

    def _make_run(self, parts: Parts, engine: Engine | None) -> Run:
        return make_run(
            self.args,
            self.inputs,
            parts,
            engine,
            self.prior,
            self.objective,
            Runtime(self._unwrapped, self._running, self.events.progress, self._stop_if_asked),
            self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            # A skipped update has no gradients, which fp16's scaler and sharded optimizers do not take.
            not (self.args.fp16 or self.is_fsdp_enabled or self.is_deepspeed_enabled),
            self.events.tell,
            self.log,
        )

    # ---- What users read ---------------------------------------------------------------------------------------------

    @property
    def rollout(self) -> Rollout:
        """Draws from the policy for any prompts, scored and evaluated."""
        return self.run.rollout

    @property
    def sampler(self) -> Sampler:
        """The sampler of the run."""
        return self.run.sampler

    @property
    def objective_calls(self) -> int:
        """Distinct (prompt, completion) pairs that the objective was asked for since training began."""
        return self.objective.calls

    # ---- Training ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Climb the ladder to T, and stay there until the run is done. See [`transformers.Trainer.train`].

        `record.ended_by` says why it ended: see `num_rungs`. Then the final model is measured (as by [`evaluate`], on
        the training prompts; with `prompts_per_rung`, on those of the next rung), if T is known and
        `max_objective_calls` leaves enough draws. A second call begins the ladder again, with the model as it is.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or `True` for the last one in `output_dir`. The run then goes
                on as if it had never been interrupted, also from the middle of a rung.

        Raises:
            ValueError: if there is no such checkpoint, or it is damaged, or belongs to other settings or data.
            FloatingPointError: if log-probabilities, a loss or a gradient are NaN or infinite, before they do harm.
            KeyboardInterrupt: after Ctrl-C, at the next safe point, with a checkpoint unless no update has been made;
                after a second one, at once.
        """
        folder = to_resume_from(resume_from_checkpoint, str(self.args.output_dir))
        run = self.run
        run.record.finished, run.record.ended_by, run.record.metrics = False, "", {}
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._at_work())
            stack.enter_context(self.events.running())
            stack.enter_context(self.interrupt.caught())
            stack.enter_context(attention_of_any_shape())
            if folder is None:
                run.start()
                run.state.seeks_rate = self._seeks_rate
            else:
                self.checkpointer.read(folder)
            if self.is_world_process_zero():
                set_aside(str(self.args.output_dir), folder)
            self.accelerator.wait_for_everyone()
            epochs = run.rungs_to_climb(resumed=folder is not None)
            with self._arguments(num_train_epochs=epochs, learning_rate=initial_rate(self.args)):
                output = self._train_until_terminated(folder, **kwargs)
            if run.state.phase is Phase.DRAWN and run.has_learned:
                run.end_rung()  # resumed from the very last update: the loop had nothing left to do
            if output is None:
                return TrainOutput(self.state.global_step, math.nan, {})
            run.finish(self.state.global_step)
            which = run.on_prompts.group(run.state.rung + 1)
            if draws := run.measurable(len(which)):
                output.metrics.update(self._measure(self.inputs.prompts, "final", draws, which, is_result=True))
            run.update_record()
            self.rollout.journal.clear()
            self.events.tell("on_run_end")
        return output

    def load_run(self, folder: str | os.PathLike[str]) -> None:
        """Take up what a run has trained, so that [`evaluate`] and [`sample`] work as after its own `train()`.

        The trainer must have been made as the run's was: with its prior, adapter, objective and settings (of which T is
        read from the run where a goal was set). For other prompts, and for functions of other names or weights, the
        ladder's log Z is not used: `missing_mass` is left out, and `kl` is of the draws alone. There is no archive.

        Args:
            folder: the run's output directory, with a saved model.

        Raises:
            ValueError, OSError, RuntimeError: if there is no run, or no model of this trainer's kind, or another prior.
        """
        record = RunRecord.read(str(folder))
        policy = cast(PreTrainedModel, self._unwrapped())
        fidelity.check_same_prior(self.prior, policy, record.prior_row_scores, str(folder))
        loading.load_trained(policy, Path(folder), record.settings.get("adapter_name"))
        self.run.take_up(record)

    def report(self, picture: Picture | None = None) -> Report:
        """The report of the run so far, which a notebook shows as the last value of a cell.

        Args:
            picture: how completions are shown, beside their text: see [`aldrift_hf.reporting.report.Picture`]. `None`
                takes that of the installed `ReportWriter`, if it has one.
        """
        writers = [each for each in self.callback_handler.callbacks if isinstance(each, ReportWriter)]
        own = next((each.picture for each in writers if each.picture is not None), None)
        return Report(self.record, picture or own)

    # ---- Evaluation and sampling -------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """How close the model is to `p_T`, from `num_generations` draws per prompt.

        They depend on the seed and the number of updates: a second call repeats them, as does one after [`train`],
        which has measured the same model; another `seed` gives others. Within [`train`] its calls count towards
        `max_objective_calls`. Where too few are left, or while T is not known, it is skipped there, with a warning, and
        returns what it returned before.

        Args:
            eval_dataset: prompts; `None` takes the trainer's `eval_dataset`, or else its `train_dataset`.
            ignore_keys: has no meaning here.
            metric_key_prefix: first part of the metrics' names.

        Returns:
            Under `eval_…`, means over prompts: `objective` (mean cost), `objective_best`, `success` (share of draws
            that cost at most `success_threshold`), `distinct` (share of distinct draws), `diversity`
            ([`aldrift_hf.algorithm.diversity`]), `ess` (share in [0, 1]), `khat`, `kl_to_prior` (KL(model‖L), nats),
            `log_z` (of `p_T`, nats, from these draws), `kl` (KL(model‖p_T), nats, with the ladder's log Z where it is
            known), `kl_forward` (KL(p_T‖model), nats, blind to lost mass) and, for all training prompts in their order
            after training began, `missing_mass` (nats, at each prompt's last τ; see
            [`aldrift_hf.algorithm.diagnostics.missing_mass`]). With several prompts, also `kl_worst` and `ess_worst`;
            `prompt_metrics` then has a row for each. Also standard errors (`…_error`), `draws` and `runtime`.
        """
        prompts = self.inputs.eval_prompts if eval_dataset is None else self.inputs.encode(eval_dataset, "eval_dataset")
        self.objective.check_signature(prompts.columns)
        draws = self.run.measurable(len(prompts)) if self.is_in_train else self.args.proposals
        if not draws:
            logger.warning("an evaluation is skipped: T is not known yet, or max_objective_calls leaves too few calls")
            return dict(self._evaluated)
        self._evaluated = metrics = self._measure(prompts, metric_key_prefix, draws)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return dict(metrics)

    def _measure(
        self, prompts: Prompts, prefix: str, per_prompt: int, which: Tensor | None = None, is_result: bool = False
    ) -> dict[str, float]:
        """The metrics of [`evaluate`] from `per_prompt` draws for these prompts (`None`: all), logged and told."""
        start = time.time()
        with self._at_work():
            measured = measure(self.run, prompts, self.state.global_step, per_prompt, which, keep=is_result)
        metrics, self.prompt_metrics = measured.metrics, Dataset.from_list(measured.by_prompt)
        metrics["runtime"] = time.time() - start
        if is_result:
            self.record.metrics = dict(metrics)
            self.record.take_draws(measured.proposals, prompts, self.run.tau_max)
            self.record.prompt_metrics = measured.by_prompt[:MAX_PROMPTS]
        self.events.tell("on_measured", metrics=metrics)
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

        Fresh draws of the model are corrected by `num_samples` chains of `chain_length` proposals per prompt, whose
        last states are returned: Metropolis-Hastings chains, or one step of i-SIR
        ([`aldrift_hf.algorithm.samplers.kernels.isir`]), which takes one of a chain's proposals by their weights. With
        `chain_length=1` no correction is made: the draws are the model's own. With `correction="archive"` nothing is
        drawn and the objective is not called: samples are resampled by weight from the proposals that it keeps. With
        `correction="suffix"` each step of a chain after its first draw keeps the beginning of its text and redraws the
        rest ([`aldrift_hf.algorithm.samplers.kernels.suffix_move`]).

        The k-th call of a trainer gives the same samples with the same seed. Diagnostics are logged under `sample_…`:
        acceptance rate, `ess`, `khat`, `log_z`, and the share of distinct samples. Chains can only reach what the model
        draws: mass that it has lost (missing mass) is missing here too.

        Args:
            num_samples: samples per prompt.
            prompts: a data set with the objective's columns, or a list of prompts; `None` takes the training prompts.
            chain_length: proposals per chain; `None` takes `args.chain_length`. Longer chains come closer to `p_T`.
            correction: `"metropolis_hastings"`, `"isir"`, `"suffix"` or, on the training prompts after training with a
                sampler that keeps the run's proposals, `"archive"`.

        Returns:
            A data set of `num_samples` rows per prompt, ordered by prompt, with `prompt`, `completion`, `objective`,
            `log_prior` and `log_model` (nats; for the archive: of the mixture of its models).

        Raises:
            ValueError: for a number below 1, a correction that is unknown or not possible, or while T is not known.
        """
        steps = self.args.steps_per_chain if chain_length is None else chain_length
        if num_samples < 1 or steps < 1:
            raise ValueError(f"num_samples and chain_length must be at least 1, got {num_samples} and {steps}")
        asked = self.inputs.prompts if prompts is None else self.inputs.encode(prompts, "prompts")
        self.objective.check_signature(asked.columns)
        self._sample_calls += 1
        with self._at_work():
            draws = draw_corrected(self.run, asked, num_samples, steps, correction, self._sample_calls)
        metrics = draws.metrics(self.run.tau_max, self.args.success_threshold)
        self.log({f"sample_{key}": value for key, value in metrics.items() if math.isfinite(value)})
        return draws.dataset(decoded(self.run, draws))
