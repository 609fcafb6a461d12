"""A score of molecules of the user's own, which may be expensive: no molecule is ever scored twice."""

from __future__ import annotations

import json
import numbers
from pathlib import Path
from typing import Any

from rdkit import Chem

from aldrift_hf.cli.functions import load_function
from aldrift_hf.objective.identity import identity_of
from problems.molecules import zinc

SCORES_FILE = "own_scores.jsonl"
TRIED = 10
"""Molecules of ZINC that it is tried on, before anything is computed."""


class OwnScore:
    """A user's function of a SMILES string. Its scores are kept in a file, by canonical SMILES, for all runs.

    Args:
        name: of the function, as `FILE.py:FUNCTION` or `MODULE:FUNCTION`.
        folder: where the file is.

    Attributes:
        identity: the function's: a file may be edited under the same name, and then nothing that is kept counts.

    Raises:
        ValueError: if there is no such function, or it does not return numbers in [0, 1].
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.function = name, load_function(name, "--objective")
        self.identity, self.file = identity_of([self.function]), folder / SCORES_FILE
        lines = self.file.read_text().splitlines(keepends=True) if self.file.is_file() else []
        if lines and not lines[-1].endswith("\n"):  # the program was killed as it wrote
            self.file.write_text("".join(lines[:-1]))
        kept = [json.loads(line) for line in lines if line.endswith("\n")]
        self.known: dict[str, float] = {one["smiles"]: one["score"] for one in kept if one["of"] == self.identity}
        for smiles in zinc()[0][:TRIED]:
            self(Chem.MolFromSmiles(smiles))

    def __call__(self, molecule: Chem.Mol) -> float:
        """The score.

        Raises:
            ValueError: if it is not a number in [0, 1].
        """
        smiles = Chem.MolToSmiles(molecule)
        if smiles not in self.known:
            value: Any = self.function(smiles)
            if not isinstance(value, numbers.Real) or not 0 <= float(value) <= 1:
                raise ValueError(
                    f"--objective {self.name}: the score of {smiles} is {value!r}, which is no number in [0, 1]. "
                    "Return 0 for a molecule that cannot be scored."
                )
            self.known[smiles] = float(value)
            with self.file.open("a") as file:
                print(json.dumps({"of": self.identity, "smiles": smiles, "score": self.known[smiles]}), file=file)
        return self.known[smiles]
