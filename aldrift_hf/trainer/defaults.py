"""Defaults that differ from those of `TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from transformers import TrainingArguments

from ..models import quiet


@dataclass
class TrainerDefaults(TrainingArguments):
    """`TrainingArguments` for a run along a ladder."""

    learning_rate: Optional[float] = field(
        default=None,
        metadata={
            "help": "The initial learning rate of the optimizer. None: found by the first updates, such that one "
            "changes the samples' log-probabilities by 0.3 nats (standard deviation)."
        },
    )
    per_device_train_batch_size: Optional[int] = field(
        default=None,
        metadata={
            "help": "Rows per batch and process. None: 8; with sampler=archive, and if gradient_accumulation_steps is "
            "left open as well, more of short texts, up to 1,024 tokens with their prompts."
        },
    )
    gradient_accumulation_steps: Optional[int] = field(
        default=None,
        metadata={
            "help": "Batches per update. None: with sampler=archive, as many as make 128 rows over all processes; "
            "otherwise 1."
        },
    )
    lr_scheduler_type: str = field(
        default="cosine_with_restarts",
        metadata={
            "help": "Learning rate schedule. cosine_with_restarts, without lr_scheduler_kwargs, falls from the "
            "learning rate to 0 over the updates of each rung."
        },
    )
    logging_steps: float = field(
        default=50, metadata={"help": "Log the loss every this many updates, in addition to the log of every rung."}
    )
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to save checkpoints: no, steps, epoch (after every rung) or best."}
    )
    save_total_limit: Optional[int] = field(
        default=2, metadata={"help": "Number of checkpoints to keep; the oldest are deleted first."}
    )
    remove_unused_columns: Optional[bool] = field(
        default=False, metadata={"help": "Must stay off: the columns belong to the objective and the loss."}
    )
    dataloader_pin_memory: bool = field(
        default=False, metadata={"help": "Off by default: a batch is a few token ids, so pinning gains nothing."}
    )

    def __post_init__(self) -> None:
        with quiet.old_names():  # --gradient_checkpointing, which all allowed versions of transformers have
            super().__post_init__()
