"""Checkpoints in the output directory that are not of the run that begins there: kept, but out of its way.

Among its own they would be taken for the newest when a run is resumed, and its own would be deleted as the oldest.
"""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path

from transformers.trainer_utils import sort_checkpoints

logger = logging.getLogger(__name__)

FOLDER = "_set_aside"
"""Folder in `output_dir`; the Trainer never pushes it."""


def set_aside(output_dir: str, resumed_from: str | None) -> None:
    """Move checkpoints to [`FOLDER`] that a run would mistake for its own, and say so.

    Args:
        output_dir: the run's folder.
        resumed_from: the checkpoint that it goes on from; `None` where it starts from the beginning. Beside a
            checkpoint that lies in `output_dir`, those of earlier updates are the run's own.
    """
    checkpoints = [Path(path) for path in sort_checkpoints(output_dir)]  # by number of updates
    resumed = None if resumed_from is None else Path(resumed_from).resolve()
    here = [path.resolve() for path in checkpoints]
    foreign = checkpoints[here.index(resumed) + 1 :] if resumed in here else checkpoints
    if not foreign:
        return
    folders = (Path(output_dir, FOLDER, str(number)) for number in itertools.count(1))
    folder = next(path for path in folders if not path.exists())
    folder.mkdir(parents=True)
    for path in foreign:
        os.rename(path, folder / path.name)
    names = ", ".join(path.name for path in foreign)
    logger.warning(
        f"{output_dir} held checkpoints that are not of this run ({names}). They are now in {folder}. To go on from "
        f"one of them instead, pass resume_from_checkpoint={str(folder / foreign[-1].name)!r}."
    )
