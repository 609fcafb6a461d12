"""Checkpoints as any Trainer's, with the ladder's state in them, and under a temporary name until they are whole."""

from __future__ import annotations

import os
import shutil
from typing import Any, cast

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from ..algorithm.archive import Archive
from ..models import prior
from ..objective.objective import Objective
from ..reporting.hub import HubTrainer
from . import checkpoints
from .samples import RungSamples


class SavingTrainer(HubTrainer):
    """The part of [`ALDRIFTTrainer`] that writes checkpoints."""

    progress: checkpoints.Progress
    samples: RungSamples
    objective: Objective
    archive: Archive | None
    _staging: str | None = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's, with our files, and under a temporary name until all of them are written."""
        if self.args.world_size > 1:
            loss_sum = torch.tensor(self.progress.loss_sum, device=self.args.device)
            self.progress.loss_sum = cast(Tensor, reduce(loss_sum, "mean")).item()
        output_dir = str(self.args.output_dir)
        self._staging = os.path.join(output_dir, checkpoints.STAGING)
        folder = os.path.join(self._staging, f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)
            checkpoints.save(folder, self.progress, self.samples, self.objective, self._must_agree(), self.archive)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.state.best_model_checkpoint == folder:
                self.state.best_model_checkpoint = os.path.join(output_dir, os.path.basename(folder))
                self.state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))
            folder = checkpoints.commit(folder, output_dir)
            if self.args.push_to_hub:
                self._push_from_checkpoint(folder)
            rotate_checkpoints(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _must_agree(self) -> dict[str, Any]:
        """Settings that a checkpoint is resumed under: D as it was asked for, not as it was measured."""
        asked = {**self.record.settings, "objective_range": self.args.objective_range}
        return {name: asked[name] for name in checkpoints.MUST_AGREE}

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or str(super()._get_output_dir(trial))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if whole and prior.PRIOR_ADAPTER in getattr(self.model, "peft_config", {}):
            # Up to Transformers 5.22 the Trainer leaves out the adapter at the top where another lies in a folder.
            self.model.load_adapter(resume_from_checkpoint, self.model.active_adapter, is_trainable=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # not before it has its name: uploads go on in a thread
            super()._push_from_checkpoint(checkpoint_folder)
