"""Draws of a run on disk, round by round: a run that is killed among them does not draw them again.

In fp32 the texts would be the same. In half precision logits depend on the batch, in the last bits, so that other texts
would be drawn here and there, each a new call of the objective.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..content import Content
from ..streams import PROPOSE

FOLDER = "_draws"
"""Folder in `output_dir`. The Trainer never pushes it, but a push in the background walks through it, and fails if a
folder goes meanwhile: during a run only files do."""

Columns = dict[str, Tensor]
"""What is kept of a block of consecutive rows."""


class DrawJournal:
    """Rounds of draws, kept until a checkpoint has them. The first process writes and reads them.

    Args:
        output_dir: the run's folder.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self._root = Path(output_dir) / FOLDER
        self._name, self._rounds = "", 0

    def begin(self, stream: Sequence[int], law: Any) -> list[Columns]:
        """Blocks of these draws that an earlier start has kept, from the first row on; all processes call it.

        Args:
            stream: the address of the draws: their purpose, a number, and of a chain's moves the step.
            law: what they depend on: draws of another law are not these.
        """
        digest = Content().digest([list(stream), law]).hex()
        self._name = f"{stream[0]}-{stream[1]}-{digest}"
        blocks: list[list[Columns]] = []
        if PartialState().is_main_process:
            for number in itertools.count():
                try:
                    kept = load_file(self._file(number))
                except (OSError, SafetensorError):  # none, or the machine stopped while it was written
                    break
                blocks.append(_split(kept))
        blocks = broadcast_object_list([blocks])[0]
        self._rounds = len(blocks)
        return [block for round in blocks for block in round]

    def add(self, blocks: Sequence[Columns]) -> None:
        """Keep a further round.

        Raises:
            OSError: where it cannot be written.
        """
        if PartialState().is_main_process:
            self._root.mkdir(parents=True, exist_ok=True)
            partial = self._root / "partial"
            joined = {f"{name}.{place}": column for place, block in enumerate(blocks) for name, column in block.items()}
            try:
                save_file({name: column.contiguous() for name, column in joined.items()}, partial)
                os.replace(partial, self._file(self._rounds))
            except (OSError, SafetensorError) as error:
                raise OSError(
                    f"draws could not be written to {self._root}: {error}. Free disk space, or choose another "
                    "output_dir. What was written earlier is intact."
                ) from error
        self._rounds += 1

    def forget(self, rung: int) -> None:
        """A checkpoint has the draws of all rungs up to this one."""
        if PartialState().is_main_process:
            for path in self._root.glob(f"{PROPOSE}-*"):
                if int(path.name.split("-")[1]) <= rung:
                    path.unlink()

    def clear(self) -> None:
        """The run has ended: nothing of it will be drawn again."""
        if PartialState().is_main_process:
            shutil.rmtree(self._root, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self._root / f"{self._name}-{number}.safetensors"


def _split(kept: Columns) -> list[Columns]:
    """A round's blocks."""
    blocks: dict[int, Columns] = {}
    for key, column in kept.items():
        name, _, place = key.partition(".")
        blocks.setdefault(int(place), {})[name] = column
    return [blocks[place] for place in sorted(blocks)]
