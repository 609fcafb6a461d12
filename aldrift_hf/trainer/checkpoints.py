"""The part of a checkpoint that is ours: where the ladder stands, the rung's samples, and every cost paid for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from ..algorithm.archive import Archive
from ..models.batching import Batches
from ..objective.objective import Objective
from ..types import Completions
from .samples import RungSamples

STATE_FILE = "aldrift_state.json"
SAMPLES_FILE = "aldrift_samples.safetensors"
OBJECTIVE_FILE = "aldrift_objective.jsonl"
ARCHIVE_FILE = "aldrift_archive.safetensors"
MANIFEST_FILE = "aldrift_manifest.json"

STAGING = "_saving"
"""Where a checkpoint lies while it is written, in `output_dir`; a folder that the Trainer never pushes."""

MUST_AGREE = (
    *("architecture", "tuning", "vocabulary", "objective", "objective_weights", "objective_range", "tau_max"),
    *("ladder", "tau_step", "ess_threshold", "sampler", "num_chains", "chain_length", "archive_window"),
    *("pareto_smoothing", "loss_type", "max_completion_length", "prompts", "prompts_fingerprint", "seed"),
)
"""Settings under which a run can be gone on with; others may change."""


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
        ValueError: if the last checkpoint is asked for and there is none, or if the one that is meant is damaged; the
            message names the newest one beside it that is not.
    """
    if not asked:
        return None
    # From the command line, where the option is text, "True" asks for the last checkpoint too.
    named = isinstance(asked, str) and asked.lower() != "true"
    folder = asked if named else get_last_checkpoint(output_dir)
    if folder is None:
        raise ValueError(
            f"there is no checkpoint in {output_dir} to resume from. Pass its folder, or leave resume_from_checkpoint "
            "out to start anew: costs that were paid for are kept."
        )
    if wrong := damage(str(folder)):
        others = [path for path in reversed(sort_checkpoints(str(Path(str(folder)).parent))) if not damage(path)]
        offer = f"The newest good one is {others[0]}" if others else "There is no good one; start anew"
        raise ValueError(f"{folder} cannot be resumed from: {wrong}. {offer} (costs that were paid for are kept).")
    return str(folder)


def damage(folder: str) -> str | None:
    """What is wrong with a checkpoint's files, by the manifest that was written last; `None` if nothing is."""
    path = Path(folder)
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text())
    except FileNotFoundError:
        return f"it is not a checkpoint of ALDRIFTTrainer, or not a whole one: it has no {MANIFEST_FILE}"
    except ValueError:
        return f"{MANIFEST_FILE} is damaged"
    if not isinstance(manifest, dict):
        return f"{MANIFEST_FILE} is damaged"
    files = _files(path)  # looked up in, so that no name in a manifest becomes a path elsewhere
    for name, digest in manifest.items():
        if name not in files:
            return f"{name} is missing"
        if _digest(files[name]) != digest:
            return f"{name} is not as it was written"
    return None


def _files(folder: Path) -> dict[str, Path]:
    """Regular files in a folder and below, by their names in it."""
    return {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}


def commit(folder: str, output_dir: str) -> str:
    """Move a checkpoint whose files are all written to `output_dir`, under its own name, which is returned.

    A kill at any instant leaves it there whole, or not there.
    """
    path, final = Path(folder), Path(output_dir, Path(folder).name)
    manifest = {name: _digest(file) for name, file in _files(path).items()}
    (path / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))
    if final.exists():  # of the run that is gone on with
        final.rename(path.parent / "replaced")
    path.rename(final)
    shutil.rmtree(path.parent)
    return str(final)


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        os.fsync(file.fileno())
    return digest.hexdigest()


def save(
    folder: str,
    progress: Progress,
    samples: RungSamples,
    objective: Objective,
    settings: Mapping[str, Any],
    archive: Archive | None = None,
) -> None:
    """Write our files into a checkpoint's folder."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / STATE_FILE).write_text(json.dumps({**asdict(progress), "settings": settings}))
    save_file(samples.tensors(), path / SAMPLES_FILE)
    with (path / OBJECTIVE_FILE).open("w") as file:
        for key, values in objective.cache.items():
            file.write(json.dumps([*key, values]) + "\n")
    if archive is not None:
        save_file(archive.tensors(), path / ARCHIVE_FILE)


def load(folder: str, samples: RungSamples, objective: Objective, settings: Mapping[str, Any]) -> Progress:
    """Read them back: the samples and the objective's cache in place, the progress returned.

    Raises:
        ValueError: if the checkpoint was written under other settings, with other data or batch sizes.
    """
    path = Path(folder)
    state = json.loads((path / STATE_FILE).read_text())
    theirs = state.pop("settings")
    ours = json.loads(json.dumps(settings))
    differences = [f"{name} = {theirs[name]!r}, not {ours[name]!r}" for name in ours if theirs[name] != ours[name]]
    if differences:
        raise ValueError(
            f"{folder} was written under other settings than this run's: {'; '.join(differences)}. Resume with the "
            "same ones, or start anew in another output_dir."
        )
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
    """Read the archive back in place."""
    archive.load(load_file(Path(folder) / ARCHIVE_FILE), decode)
