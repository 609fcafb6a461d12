"""The methods of `transformers.Trainer` that are overridden, each passed on to the object whose task it is."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer, TrainerControl
from transformers.trainer_utils import TrainOutput

from ..algorithm.losses import Loss
from ..models import adapters, numerics, quiet, sharding
from ..models.head import Projection, projecting
from ..models.passes import Padded, Pass
from ..models.prior import base_model
from ..models.scoring import learning_pass
from ..models.shared_prompts.support import sharing_if_known
from ..objective.objective import Objective
from ..reporting.hub import HubPusher
from ..reporting.record import RunRecord
from .accelerate_state import AccelerateState
from .checkpoints import Checkpointer
from .config import ALDRIFTConfig
from .cycles import cycles, has_cycles
from .interrupt import Interrupt, TerminatedError
from .optimizer import schedule_kwargs
from .run import Run

logger = logging.getLogger(__name__)


class HookedTrainer(Trainer):
    """A `Trainer` that learns a rung's samples, writes the run into its checkpoints, and pushes our model card.

    Attributes:
        run: the run.
        interrupt: whether the user asked it to stop.
        checkpointer: writes and reads its checkpoints.
        hub: pushes to the Hub.
    """

    args: ALDRIFTConfig
    control: TrainerControl
    lr_scheduler: LambdaLR | None
    run: Run
    interrupt: Interrupt
    checkpointer: Checkpointer
    hub: HubPusher
    objective: Objective
    _accelerate_state: AccelerateState
    _drops_out: bool

    @property
    def record(self) -> RunRecord:
        """What is known of the run: settings, the figures of each rung, draws. See [`RunRecord`]."""
        return self.run.record

    # ---- Learning ----------------------------------------------------------------------------------------------------

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        columns = {name: column for name, column in inputs.items() if name not in batch}
        base = base_model(self._unwrapped())
        padded = Padded(batch["input_ids"], batch["attention_mask"], batch["labels"] != -100)
        forward = learning_pass(base, padded, self._drops_out)
        with projecting(base, forward.select, forward.targets) as projection:
            self.compute_loss_func = functools.partial(rung_loss, self.run.loss, columns, forward, projection)
            return super().compute_loss(model, forward.inputs | {"labels": batch["labels"]}, *args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        if self.lr_scheduler is None and has_cycles(self.args):
            warmup = self.args.get_warmup_steps(num_training_steps)
            schedule = cycles(cast(Optimizer, optimizer or self.optimizer), self.run.state, warmup)
            self.lr_scheduler, self._created_lr_scheduler = schedule, True
            return schedule
        with self._arguments(lr_scheduler_kwargs=schedule_kwargs(self.args, num_training_steps)):
            return cast(LambdaLR, super().create_scheduler(num_training_steps, optimizer))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if self.run.state.settled:  # without gradients the optimizer changes nothing
            return torch.zeros((), device=self.args.device)
        with sharing_if_known(base_model(self._unwrapped())):  # also for layers that run again in the backward pass
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        value = loss.item()
        numerics.check_loss(value, self._get_learning_rate())
        self.run.learned(value)
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        # The rung's samples come in an order of their own, which the checkpoint keeps.
        return torch.utils.data.SequentialSampler(self.run.samples)

    # ---- Stopping, and settings --------------------------------------------------------------------------------------

    def _stop_if_asked(self) -> None:
        """Between updates and rounds of proposals: ends the run, with a checkpoint, if a signal has asked for it."""
        asked = self.interrupt.asked()
        if asked is None:
            return
        step = self.state.global_step
        is_saved = os.path.isdir(os.path.join(str(self.args.output_dir), f"checkpoint-{step}"))
        if step and not gather_object([is_saved])[0]:  # each process may have a disk of its own
            self._save_checkpoint(self.model, None)
        where, remedy = "before the first update", "start again: draws and costs so far are kept"
        if step:
            where, remedy = f"after update {step}", "go on with resume_from_checkpoint=True"
        if asked is signal.SIGTERM:
            raise TerminatedError(f"{where}{', with a checkpoint' if step else ''}; {remedy}")
        raise KeyboardInterrupt(f"stopped {where}; {remedy}")

    def _train_until_terminated(self, folder: str | None, **kwargs: Any) -> TrainOutput | None:
        """The Trainer's `train`; `None` where SIGTERM has ended it."""
        try:
            return super().train(resume_from_checkpoint=folder, **kwargs)
        except TerminatedError as stopped:
            logger.warning(f"training was terminated {stopped}.")
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            return None

    @contextlib.contextmanager
    def _arguments(self, **changes: Any) -> Iterator[None]:
        """Within a `with` block the Trainer sees changed settings, in a copy: the user's are never written to."""
        asked = self.args
        self.args = copy.copy(asked)
        for name, value in changes.items():
            setattr(self.args, name, value)
        try:
            yield
        finally:
            self.args = asked

    # ---- What has no meaning here ------------------------------------------------------------------------------------

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: there are no labels to predict. Use [`evaluate`] or [`sample`].

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "ALDRIFTTrainer has nothing to predict: a data set holds prompts, without labels. Use trainer.sample(n, "
            "prompts) for corrected completions, or trainer.evaluate(prompts) for metrics."
        )

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: every trial needs a trainer of its own.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "ALDRIFTTrainer does not search hyperparameters: its model and the frozen prior are made once. Make a "
            "trainer per trial, each with an output_dir of its own."
        )

    # ---- Checkpoints -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's, with our files, and under a temporary name until all of them are written."""
        with self.checkpointer.saving(self):
            super()._save_checkpoint(model, trial)
        if not self.args.save_only_model:  # with which no run is resumed
            self.run.rollout.journal.forget(self.run.state.rung)

    def _get_output_dir(self, trial: Any) -> str:
        return self.checkpointer.staging or str(super()._get_output_dir(trial))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._saves_adapters():
            adapters.load_active(self.model, Path(resume_from_checkpoint), self.checkpointer.adapter_name)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if not best.is_dir():  # newer versions of Transformers do not call this then
            logger.warning(f"{best}, the best checkpoint, does not exist any more: the last model is kept.")
        elif self._saves_adapters():
            adapters.load_active(self.model, best, self.checkpointer.adapter_name)
        else:
            super()._load_best_model()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """An evaluation that was skipped, with none before it, has found nothing to compare."""
        return bool(metrics) and super()._determine_best_metric(metrics, trial)

    def _saves_adapters(self) -> bool:
        """Whether checkpoints hold adapters as PEFT saves them. The Trainer finds those called `default` alone, and
        would also load the frozen ones, which are the prior as it was passed in."""
        return isinstance(self.model, PeftModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    # ---- The Hub -----------------------------------------------------------------------------------------------------

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository, unless it exists. With `push_to_hub=True` that happens before anything is computed.

        Raises:
            OSError: if the Hub refuses or cannot be reached, with the remedy.
        """
        self.hub.create_repository(functools.partial(super().init_hf_repo, *args, **kwargs))
        self.hub.repository = self.hub_model_id

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push what lies in `output_dir`: see [`transformers.Trainer.push_to_hub`].

        That is the adapter or the model, the tokenizer, the settings (without tokens), the run's record with prompts
        and draws (`draws.jsonl`), its report, figures and model card, and files of your own; but no checkpoints, and
        nothing whose name begins with `_`. Keyword arguments of [`create_model_card`] are passed on to it.

        Raises:
            OSError: if the Hub does not take it, with the remedy. The model has been saved before.
        """
        if not self.args.push_to_hub:  # the repository may be refused, and that comes before the Trainer saves
            self.save_model(_internal_call=True)
        return self.hub.push(functools.partial(super().push_to_hub, *args, **kwargs))

    def create_model_card(
        self, *, finetuned_from: str | None = None, model_name: str | None = None, **details: Any
    ) -> None:
        """Write the model card of the run so far to `output_dir/README.md`; every push does.

        Args:
            finetuned_from: id of the base model. `None` takes the one that the model was loaded by.
            model_name: the title. `None` takes the repository's name.
            details: further arguments of [`transformers.Trainer.create_model_card`], such as `language`, `license` and
                `dataset_tags`, or of TRL's: `dataset_name`. Others are put into the card's header as they are.
        """
        if self.is_world_process_zero():
            sets = ("dataset_tags", "dataset_name")
            details = {"datasets" if name in sets else name: value for name, value in details.items()}
            self.hub.write_card(
                self.record, str(self.args.output_dir), base_model=finetuned_from, name=model_name, **details
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with quiet.late_bars():
            super()._save(output_dir, state_dict)
        if self.args.should_save:  # in place of the card that PEFT has written
            self.hub.write_card(self.record, output_dir or str(self.args.output_dir))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.checkpointer.staging is not None:  # not before it has its name: uploads go on in a thread
            return
        if self.is_world_process_zero():
            self.create_model_card()
            self.hub.copy_adapters(checkpoint_folder)
        super()._push_from_checkpoint(checkpoint_folder)
        self.hub.watch(getattr(getattr(self, "push_in_progress", None), "jobs", []))

    # ---- Models ------------------------------------------------------------------------------------------------------

    def _unwrapped(self) -> nn.Module:
        # Whether there is a wrapper is asked on every micro-batch; Accelerate looks at every module for that.
        wrapped = not isinstance(self.model, (PreTrainedModel, PeftModel))
        return cast(nn.Module, self.accelerator.unwrap_model(self.model) if wrapped else self.model)

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """What training, evaluating and sampling happen in: the objective is open."""
        self._accelerate_state.restore()
        with self.objective.open():
            yield

    @contextlib.contextmanager
    def _running(self, whole: bool) -> Iterator[None]:
        """Where models may be run outside of training steps, under the autocast of those: see [`sharding.gathered`]."""
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and not self._is_wrapped():
            self.model.to(self.args.device)  # the Trainer leaves that to the wrapping, when training begins
        with sharding.gathered(self.model_wrapped, self.accelerator, whole), self.accelerator.autocast():
            yield

    def _is_wrapped(self) -> bool:
        return self.model_wrapped is not self.model or sharding.is_sharded(self.model)


def rung_loss(
    loss: Loss,
    columns: dict[str, Tensor],
    forward: Pass,
    projection: Projection,
    outputs: Any,
    labels: Tensor,
    num_items_in_batch: Tensor | int,
) -> Tensor:
    """The loss of a micro-batch, as the Trainer calls it."""
    return loss(forward.table(projection.of(outputs.logits)), num_items_in_batch, **columns)
