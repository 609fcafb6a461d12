"""Checkpoints: whole or not there, checked before they are used, with everything that the ladder needs in them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from accelerate.utils import reduce
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints, sort_checkpoints

from ..models.batching import Batches
from ..models.fidelity import check_same_prior
from ..objective.changed import check_unchanged
from ..types import Samples
from .run import Run
from .state import RunState

STATE_FILE = "aldrift_state.json"
SAMPLES_FILE = "aldrift_samples.safetensors"
OBJECTIVE_FILE = "aldrift_objective.safetensors"
SAMPLER_FILES = "aldrift_sampler-{}.safetensors"
MANIFEST_FILE = "aldrift_manifest.json"

STAGING = "_saving"
"""Folder in `output_dir` in which a checkpoint is written; the Trainer never pushes it."""

MUST_AGREE = (
    *("architecture", "tuning", "vocabulary", "objective", "objective_weights", "objective_range", "tau_max"),
    *("target_cost", "target_success", "kl_budget"),
    *("ladder", "tau_step", "ess_threshold", "sampler", "num_generations", "prompts_per_rung", "chain_length"),
    *(
        "archive_window",
        "pareto_smoothing",
        "loss",
        "engine",
        "max_completion_length",
        "prompts",
        "prompts_fingerprint",
        "seed",
    ),
)
"""Settings that must be the same when a run is resumed; others may change."""


def to_resume_from(asked: str | os.PathLike[str] | bool | None, output_dir: str) -> str | None:
    """The checkpoint's folder that `resume_from_checkpoint` means; `None` where nothing is to be resumed.

    Raises:
        TypeError: if it is neither a folder nor a truth value.
        ValueError: if the last checkpoint is asked for and there is none, or if the checkpoint is damaged; the message
            names the newest undamaged one beside it.
    """
    asked = os.fspath(asked) if isinstance(asked, os.PathLike) else asked
    if not isinstance(asked, (str, bool, type(None))):
        raise TypeError(f"resume_from_checkpoint must be a checkpoint's folder, True or False, got {asked!r}")
    # From the command line, where the option is text, "True" and "False" are meant as they are in Python.
    meant = {"true": True, "false": False}.get(asked.lower(), asked) if isinstance(asked, str) else asked
    if not meant:
        return None
    last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    folder = meant if isinstance(meant, str) else last
    if folder is None:
        raise ValueError(
            f"there is no checkpoint in {output_dir} to resume from. Pass its folder, or leave resume_from_checkpoint "
            "out to start from the beginning: costs that were evaluated before are kept."
        )
    if problem := damage(str(folder)):
        others = [path for path in reversed(sort_checkpoints(str(Path(str(folder)).parent))) if not damage(path)]
        offer = f"The newest undamaged one is {others[0]}" if others else "There is no undamaged one; start again"
        raise ValueError(
            f"{folder} cannot be resumed from: {problem}. {offer} (costs that were evaluated before are kept)."
        )
    return str(folder)


def damage(folder: str) -> str | None:
    """Why no run can be resumed from a checkpoint, by its files and the manifest that was written last; `None` if one
    can."""
    path = Path(folder)
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text())
    except FileNotFoundError:
        return f"it is not a complete checkpoint of ALDRIFTTrainer: it has no {MANIFEST_FILE}"
    except ValueError:
        return f"{MANIFEST_FILE} is damaged"
    if not isinstance(manifest, dict):
        return f"{MANIFEST_FILE} is damaged"
    files = _files(path)  # looked up in this list, so that no name in a manifest becomes a path elsewhere
    for name, digest in manifest.items():
        if name not in files:
            return f"{name} is missing"
        if _digest(files[name]) != digest:
            return f"{name} has changed since it was written"
    if json.loads((path / STATE_FILE).read_text())["save_only_model"]:
        return "it was saved with save_only_model=True, and so without the optimizer"
    return None


def commit(folder: str, output_dir: str) -> str:
    """Move a finished checkpoint to `output_dir` under its own name, which is returned.

    A kill at any instant leaves it there whole, or not at all.
    """
    path, final = Path(folder), Path(output_dir, Path(folder).name)
    manifest = {name: _digest(file) for name, file in _files(path).items()}
    (path / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))
    if final.exists():  # of the same run, before it was resumed
        final.rename(path.parent / "replaced")
    path.rename(final)
    shutil.rmtree(path.parent)
    return str(final)


class Checkpointer:
    """Writes checkpoints of a run under a temporary name, moves them into place, and reads them back.

    Args:
        run: the run.
        output_dir: the run's folder.
        save_total_limit: checkpoints to keep.

    Attributes:
        staging: the folder in which a checkpoint is being written; `None` between checkpoints.
        adapter_name: the name that the trained adapter has in the checkpoint that was read; `None` without one.
    """

    def __init__(self, run: Run, output_dir: str, save_total_limit: int | None) -> None:
        self.run, self.output_dir, self.save_total_limit = run, output_dir, save_total_limit
        self.staging: str | None = None
        self.adapter_name: str | None = None

    @contextlib.contextmanager
    def saving(self, trainer: Any) -> Iterator[None]:
        """Within a `with` block the `Trainer` writes its part of a checkpoint; all processes enter and leave it.

        Args:
            trainer: the `ALDRIFTTrainer`.
        """
        args, wait = trainer.args, trainer.accelerator.wait_for_everyone
        if args.world_size > 1:
            loss_sum = torch.tensor(self.run.state.loss_sum, device=args.device)
            self.run.state.loss_sum = cast(Tensor, reduce(loss_sum, "mean")).item()
        self.staging = os.path.join(self.output_dir, STAGING)
        folder = os.path.join(self.staging, f"checkpoint-{trainer.state.global_step}")
        if args.should_save:
            self.write(folder)
        wait()
        try:
            yield
        finally:
            self.staging = None
        wait()
        is_best = trainer.state.best_model_checkpoint == folder
        if is_best:
            trainer.state.best_model_checkpoint = os.path.join(self.output_dir, os.path.basename(folder))
        if args.should_save:
            self._finish(folder, trainer, is_best)
        wait()

    def _finish(self, folder: str, trainer: Any, is_best: bool) -> None:
        """Move a written checkpoint into place, delete the oldest, and push it."""
        state = trainer.state
        if is_best:
            state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))
        final = commit(folder, self.output_dir)
        rotate_checkpoints(self.output_dir, self.save_total_limit, state.best_model_checkpoint)
        if trainer.args.push_to_hub:  # last: its thread lists output_dir, and fails where a folder goes meanwhile
            trainer._push_from_checkpoint(final)

    def write(self, folder: str) -> None:
        """Write our files into a checkpoint's folder; the first process calls it."""
        shutil.rmtree(os.path.join(self.output_dir, STAGING), ignore_errors=True)
        path, run = Path(folder), self.run
        path.mkdir(parents=True, exist_ok=True)
        about = {
            "settings": self._must_agree(),
            "objective_identity": run.objective.store.identity,
            "adapter_name": run.record.settings["adapter_name"],
            "prior_row_scores": run.record.prior_row_scores,
            "updates_per_rung": run.updates_per_rung,
            "rows_per_update": run.rows_per_update,
            "save_only_model": run.args.save_only_model,
        }
        (path / STATE_FILE).write_text(json.dumps({**run.to_json(), **about}))
        if run.samples.samples is not None:
            save_file(run.samples.samples.state_dict(), path / SAMPLES_FILE)
        save_file(run.objective.state_dict(), path / OBJECTIVE_FILE)
        # A rung's model each, for all of them together may not fit into memory.
        for part, tensors in _parts(run.sampler.state_dict()).items():
            save_file(tensors, path / SAMPLER_FILES.format(part))

    def read(self, folder: str) -> None:
        """Take up a checkpoint's state.

        Raises:
            ValueError: if it was written under other settings, with another prior, other data or batch sizes.
        """
        path, run = Path(folder), self.run
        values = json.loads((path / STATE_FILE).read_text())
        theirs, scores, adapter_name = (values.pop(key) for key in ("settings", "prior_row_scores", "adapter_name"))
        ours = json.loads(json.dumps(self._must_agree()))
        differences = [
            f"{name} = {theirs.get(name)!r}, not {ours[name]!r}" for name in ours if theirs.get(name) != ours[name]
        ]
        if differences:
            depends = run.args.max_objective_calls is not None and theirs["num_generations"] != ours["num_generations"]
            budget = (
                " Where num_generations is not set, it follows from max_objective_calls: set it." if depends else ""
            )
            raise ValueError(
                f"{folder} was written with other settings than this run's: {'; '.join(differences)}. Resume with the "
                f"same ones, or start again, without resume_from_checkpoint: costs are kept.{budget}"
            )
        check_unchanged(run.objective, values.pop("objective_identity"), run.prompts, folder)
        check_same_prior(run.rollout.prior, run.rollout.policy(), scores, folder)
        updates, rows, _ = (values.pop(key) for key in ("updates_per_rung", "rows_per_update", "save_only_model"))
        if (updates, rows) != (run.updates_per_rung, run.rows_per_update):
            raise ValueError(
                f"{folder} was written for {updates} updates per rung on {rows} training rows each; this run has "
                f"{run.updates_per_rung} on {run.rows_per_update}. Resume with the same num_generations, "
                "updates_per_rung, batch sizes and number of processes."
            )
        size = values.pop("generation_batch_size")
        state, samples = RunState.from_json(values), Samples.from_state_dict(load_file(path / SAMPLES_FILE))
        run.state, self.adapter_name = state, adapter_name
        run.on_prompts.is_prior = run.on_prompts.is_prior and state.rung < 1 and not state.updates
        run.samples.fill(samples)
        run.objective.load_state_dict(load_file(path / OBJECTIVE_FILE))
        run.sampler.load_state_dict(self._read_sampler(path))
        if run.args.per_device_generation_batch_size is None and size is not None:
            run.rollout.batches = Batches(size, fixed=False)

    def _read_sampler(self, path: Path) -> dict[str, Tensor]:
        files = sorted(path.glob(SAMPLER_FILES.format("*")))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    def _must_agree(self) -> dict[str, Any]:
        settings = self.run.record.settings
        decides = ("success_threshold",) if settings["target_success"] is not None else ()
        return {name: settings[name] for name in (*MUST_AGREE, *decides)}


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Named tensors in groups, by the first part of their names."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts.setdefault(name.split(".")[0], {})[name] = tensor.contiguous()
    return parts


def _files(folder: Path) -> dict[str, Path]:
    """Regular files in a folder and below, by their names relative to it."""
    return {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        os.fsync(file.fileno())
    return digest.hexdigest()
