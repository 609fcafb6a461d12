"""The part of a checkpoint that is ours: where the ladder stands, the rung's samples, and every cost paid for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers.trainer_utils import get_last_checkpoint

from .archive import Archive
from .batches import Batches
from .objective import Objective
from .rungs import RungSamples
from .sequences import Completions

STATE_FILE = "aldrift_state.json"
SAMPLES_FILE = "aldrift_samples.safetensors"
OBJECTIVE_FILE = "aldrift_objective.jsonl"
ARCHIVE_FILE = "aldrift_archive.safetensors"


@dataclass
class Progress:
    """Counters and estimates of a run; everything a later rung depends on, beside the model and the random seed.

    Attributes:
        rung: index of the rung whose samples are being learnt, or were last; -1 before the first.
        objective_range: D as given, or as seen on the prior's draws.
        tau: the rung's inverse temperature.
        log_z: the ladder's `log Z_τ` of each prompt, nats.
        proposals: draws so far.
        batches: how many completions fit at once.
        calls_before: objective calls made before training began.
        records: what was logged of each rung begun.
        loss_sum: the rung's training loss, summed over its micro-batches on this process.
        updates: the rung's optimizer updates so far.
        learn_seconds: time spent in them.
    """

    rung: int = -1
    objective_range: float | None = None
    tau: float = 0.0
    log_z: list[float] = field(default_factory=list)
    proposals: int = 0
    batches: Batches | None = None
    calls_before: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    loss_sum: float = 0.0
    updates: int = 0
    learn_seconds: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether the last rung begun has its record complete (true before the first)."""
        return not self.records or "sft_loss" in self.records[-1]


def to_resume_from(asked: str | bool | None, output_dir: str) -> str | None:
    """The checkpoint's folder that `resume_from_checkpoint` means; `None` where nothing is to be resumed.

    Raises:
        ValueError: if the last checkpoint is asked for and there is none.
    """
    if not asked:
        return None
    # From the command line, where the option is text, "True" asks for the last checkpoint too.
    if isinstance(asked, str) and asked.lower() != "true":
        return asked
    folder = get_last_checkpoint(output_dir)
    if folder is None:
        raise ValueError(
            f"there is no checkpoint in {output_dir} to resume from. Pass its folder, or leave resume_from_checkpoint "
            "out to start anew."
        )
    return str(folder)


def save(
    folder: str, progress: Progress, samples: RungSamples, objective: Objective, archive: Archive | None = None
) -> None:
    """Write our files into a checkpoint's folder."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / STATE_FILE).write_text(json.dumps(asdict(progress)))
    save_file(samples.tensors(), path / SAMPLES_FILE)
    with (path / OBJECTIVE_FILE).open("w") as file:
        for key, values in objective.cache.items():
            file.write(json.dumps([*key, values]) + "\n")
    if archive is not None:
        save_file(archive.tensors(), path / ARCHIVE_FILE)


def load(folder: str, samples: RungSamples, objective: Objective) -> Progress:
    """Read them back: the samples and the objective's cache in place, the progress returned.

    Raises:
        ValueError: if the folder is no checkpoint of this trainer, or was written with other data or batch settings.
    """
    path = Path(folder)
    missing = [name for name in (STATE_FILE, SAMPLES_FILE, OBJECTIVE_FILE) if not (path / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is not a checkpoint of ALDRIFTTrainer: it has no {', '.join(missing)}.")
    state = json.loads((path / STATE_FILE).read_text())
    batches = state.pop("batches", None)
    progress = Progress(**state, batches=batches and Batches(**batches))
    tensors = load_file(path / SAMPLES_FILE)
    if len(progress.log_z) != len(samples.prompts) or len(tensors["order"]) != len(samples):
        raise ValueError(
            f"{folder} was written for {len(progress.log_z)} prompts and {len(tensors['order'])} training rows a rung; "
            f"this run has {len(samples.prompts)} and {len(samples)}. Resume with the same data set, num_chains, "
            "updates_per_rung, batch sizes and number of processes."
        )
    samples.load(tensors)
    with (path / OBJECTIVE_FILE).open() as file:
        for line in file:
            key, text, values = json.loads(line)
            objective.cache[key, text] = values
    return progress


def load_archive(folder: str, archive: Archive, decode: Callable[[Completions], list[str]]) -> None:
    """Read the archive back in place.

    Raises:
        ValueError: if the checkpoint has none, that is, was written with another sampler.
    """
    path = Path(folder) / ARCHIVE_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {ARCHIVE_FILE}: it was not written with sampler='archive'.")
    archive.load(load_file(path), decode)
