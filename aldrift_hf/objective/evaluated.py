"""What a run has evaluated, read from its folder: neither its model nor its cost functions are needed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .copied import copied
from .store import FOLDER, described, files_in, rows_of
from .weighted import weighted_sum


def evaluated_texts(output_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All texts that a run has evaluated, best first; also of a run that goes on, or was killed.

    They are those of all starts with the same objective, and of what was drawn from the model since; what failed is not
    among them. Where the folder has costs of several objectives, the one that evaluated last counts.

    Args:
        output_dir: the run's.

    Returns:
        For each text a dictionary with its `prompt` and the columns that came with it, the `completion`, and its cost,
        `objective`; with several cost functions also `objectives`, the cost under each by name, `None` under one that
        does not judge it.

    Raises:
        ValueError: if nothing was evaluated there.
        OSError: for a file that is damaged or cannot be read.
    """
    texts = []
    folder = Path(output_dir, FOLDER)
    with copied(folder, [path.name for path in files_in(folder)]) as paths:
        newest = next(filter(None, map(described, paths)), None)
        if newest is None:
            message = f"{output_dir} is not the output directory of a run that has evaluated anything: no {FOLDER}"
            raise ValueError(message)
        identity, about = newest
        names, weights = json.loads(about)
        for row, completion, costs in (found for path in paths for found in rows_of(path, identity)):
            text = {**json.loads(row), "completion": completion, "objective": weighted_sum(weights, costs)}
            texts.append(text if len(names) == 1 else text | {"objectives": dict(zip(names, costs, strict=True))})
    return sorted(texts, key=lambda text: float(text["objective"]))
