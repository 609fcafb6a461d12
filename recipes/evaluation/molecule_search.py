"""Searches for molecules whose evaluations count by molecule, however it is written, and end when they are spent."""

from __future__ import annotations

import contextlib
import random

import mol_ga
import numpy as np
from problems.molecules import ZincProblem, canonical_smiles


def graph_edits(texts: list[str], rng: random.Random) -> set[str]:
    """The mutations and crossovers of that genetic algorithm, for half as many new molecules as there are texts; what
    is no molecule has no part in them."""
    molecules = [text for text in texts if canonical_smiles(text) is not None]
    return set(mol_ga.graph_ga.gen_candidates.graph_ga_blended_generation(molecules, len(texts) // 2, rng))


class _SpentError(Exception):
    """The budget of evaluations is spent."""


def evolve(problem: ZincProblem, start: int, offspring: int, budget: int, seed: int) -> None:
    """Run `mol-ga`'s genetic algorithm on molecular graphs (Tripp and Hernández-Lobato 2023, arXiv 2310.09267).

    Args:
        problem: the problem, which keeps what was evaluated.
        start: molecules of the prior's data that it starts from.
        offspring: children per generation.
        budget: evaluations.
        seed: random seed.
    """

    def score(smiles: list[str]) -> list[float]:
        values = {}
        for text in sorted(smiles):  # it gives them in the order of a set, which differs from process to process
            if len(problem.evaluated) >= budget:
                raise _SpentError
            values[text] = 1 - problem.cost_of(text)
        return [values[text] for text in smiles]

    molecules = problem.random_texts(start, np.random.default_rng(seed))
    with contextlib.suppress(_SpentError):
        mol_ga.default_ga(molecules, score, max_generations=budget, offspring_size=offspring, rng=random.Random(seed))
