"""Several unlike molecules that are known to be active: how near to every one of them does a search come?

The question and the molecules are those of MolExp (Thomas et al. 2025, arXiv 2501.19153), whose score is the similarity
to the nearest reference, and whose measure is the product of the best similarities to each. The configurations are in
the package `molscore` (MIT, 70 MB, read as a zip file).
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from accelerate import PartialState
from peft import PeftConfig
from rdkit import Chem
from rdkit.Chem import rdFingerprintGenerator
from rdkit.DataStructs import BulkTanimotoSimilarity
from transformers import PreTrainedModel

from aldrift_hf.toy import cache_folder, store
from problems.molecules import MoleculeModelConfig, ZincProblem, canonical_smiles
from problems.prior import make_prior
from problems.warm_up import fingerprints, warm_up
from problems.wheels import cache_locked, files_of_wheel

WHEEL = "molscore==1.9.5"
TASKS = ("AP", "A2A", "BACE1", "EGFR")
"""Targets of drugs, with two to four unlike ligands each."""
GENERATOR = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024)
"""What molscore calls ECFP4c with 1,024 bits, of which the counts are compared."""


@functools.lru_cache
def references(task: str) -> tuple[str, ...]:
    """The molecules of a task, as SMILES.

    Raises:
        OSError: if the data cannot be downloaded or read, with what was missing.
    """
    with cache_locked("molexp") as root:
        files_of_wheel(
            WHEEL, {root / f"molexp_{name}.json": f"molscore/configs/MolExp/{name}.json".__eq__ for name in TASKS}
        )
    settings = json.loads((root / f"molexp_{task}.json").read_text())
    (found,) = (each for each in settings["scoring_functions"] if each["name"] == "MolecularSimilarity")
    return tuple(found["parameters"]["ref_smiles"])


@dataclass(frozen=True)
class ManyModesProblem(ZincProblem):
    """Molecules near references: the score is the similarity.

    Attributes:
        references: the molecules, as SMILES.
        prompted: whether there is a prompt for each reference, a digit, after which the nearness to that one counts.
            Otherwise the only prompt is empty, and the nearest reference counts.
        found: the similarities of each distinct molecule to the references, in the order of evaluation.
    """

    references: tuple[str, ...]
    prompted: bool = False
    found: dict[str, list[float]] = field(default_factory=dict, compare=False)

    @property
    def evaluated(self) -> Mapping[str, list[float]]:
        """The similarities."""
        return self.found

    @property
    def prompts(self) -> list[str]:
        """A digit for each reference, or the empty prompt."""
        return [str(number) for number in range(1, len(self.references) + 1)] if self.prompted else [""]

    def random_texts(self, count: int, rng: np.random.Generator) -> list[str]:
        """Draw molecules of ZINC, all with equal probability, each after any of the prompts."""
        texts = super().random_texts(count, rng)
        if not self.prompted:
            return texts
        return [self.prompts[number] + text for number, text in zip(rng.integers(len(self.prompts), size=count), texts)]

    def similarities(self, text: str) -> list[float] | None:
        """To each reference; `None` for what is no molecule. Each distinct molecule is evaluated once."""
        canonical = canonical_smiles(text)
        if canonical is None:
            return None
        if canonical not in self.found:
            counts = GENERATOR.GetCountFingerprint(Chem.MolFromSmiles(canonical))
            self.found[canonical] = [*BulkTanimotoSimilarity(counts, self._counts)]
        return self.found[canonical]

    @functools.cached_property
    def _counts(self) -> list[object]:
        return [GENERATOR.GetCountFingerprint(Chem.MolFromSmiles(each)) for each in self.references]

    def cost_of(self, text: str) -> float:
        """The cost by the nearest reference."""
        near = self.similarities(text)
        return 1.0 if near is None else 1 - max(near)

    def cost(self, prompts: list[str], completions: list[str]) -> list[float]:
        """The objective: by the prompt's reference if there are prompts."""
        if not self.prompted:
            return super().cost(prompts, completions)
        near = map(self.similarities, completions)
        return [1.0 if each is None else 1 - each[int(prompt) - 1] for prompt, each in zip(prompts, near, strict=True)]

    def best(self, budget: int) -> list[float]:
        """The best similarity to each reference among the first `budget` evaluations."""
        rows = [*self.found.values()][:budget]
        return np.max(rows, axis=0).tolist() if rows else [0.0] * len(self.references)


def with_prompts(problem: ManyModesProblem, model_config: MoleculeModelConfig, steps: int) -> MoleculeModelConfig:
    """The settings of a prior that writes after each of a problem's prompts what it wrote without: cached, or made now.

    An adapter learns it, from molecules after random prompts, and is then added to the weights, so that what takes the
    prior by its name takes it as it is.

    Args:
        problem: the problem, with prompts.
        model_config: the prior without prompts.
        steps: optimizer updates, on 128 texts each.
    """
    model, tokenizer, adapter = make_prior(ManyModesProblem(problem.references), model_config)
    which = fingerprints(cast(PreTrainedModel, model), cast(PeftConfig, adapter))
    folder = cache_folder(None, ["prompts", *which, problem.prompts, steps])
    with PartialState().main_process_first():
        if not folder.is_dir():
            fitted = warm_up(
                cast(PreTrainedModel, model), tokenizer, problem.random_texts, cast(PeftConfig, adapter), steps=steps,
                batch_size=128, learning_rate=1e-3,
            )  # fmt: skip
            store(cast(Any, fitted).merge_and_unload(), tokenizer, folder)
    prompted = copy.copy(model_config)
    prompted.model_name_or_path = str(folder)
    return prompted
