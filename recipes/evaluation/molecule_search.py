"""Searches for molecules: edits of the best, and a genetic algorithm that ends when its evaluations are spent."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable

import mol_ga
import numpy as np
from problems.molecules import FINGERPRINTS, ZincProblem, canonical_smiles
from rdkit import Chem
from rdkit.DataStructs import BulkTanimotoSimilarity

from aldrift_hf import EditedTop

LEARNED = 600
"""Molecules that a model of the cost learns from: the best two thirds of these, and others by chance."""
NOISE = 1e-3
"""Variance of its noise, in units of the prior's."""


def edited_top(edits: int) -> EditedTop:
    """A search by that genetic algorithm's edits; with more than one for each evaluation, on a model of the cost."""
    return EditedTop(graph_edits, surrogate=None if edits == 1 else by_fingerprints, edits_per_evaluation=edits)


def graph_edits(texts: list[str], rng: random.Random) -> set[str]:
    """The mutations and crossovers of that genetic algorithm, for half as many new molecules as there are texts; what
    is no molecule has no part in them."""
    molecules = [text for text in texts if canonical_smiles(text) is not None]
    return set(mol_ga.graph_ga.gen_candidates.graph_ga_blended_generation(molecules, len(texts) // 2, rng))


@functools.lru_cache(maxsize=100_000)
def _fingerprint(text: str) -> object:
    """Counts of the surroundings of atoms; `None` for what is no molecule."""
    known = canonical_smiles(text)
    return None if known is None else FINGERPRINTS["ECFP4"].GetSparseCountFingerprint(Chem.MolFromSmiles(known))


def by_fingerprints(texts: list[str], costs: list[float], rng: random.Random) -> Callable[[list[str]], np.ndarray]:
    """Predict costs by a Gaussian process whose covariance is the similarity of molecules (Tanimoto's, of counts): what
    it expects less a standard deviation, so that the unknown has a chance."""
    known = [(cost, found) for text, cost in zip(texts, costs) if (found := _fingerprint(text)) is not None]
    known.sort(key=lambda pair: pair[0])
    few = 2 * LEARNED // 3
    known = known[:few] + rng.sample(known[few:], min(LEARNED - few, max(len(known) - few, 0)))
    if not known:
        return lambda new: np.zeros(len(new))
    cost, fingerprints = np.array([pair[0] for pair in known]), [pair[1] for pair in known]
    covariance = np.array([BulkTanimotoSimilarity(one, fingerprints) for one in fingerprints])
    inverse = np.linalg.inv(covariance + NOISE * np.eye(len(known)))
    scale = cost.std() + 1e-9
    weights = inverse @ (cost - cost.mean()) / scale

    def predict(new: list[str]) -> np.ndarray:
        found = [_fingerprint(text) for text in new]
        molecules = [each for each in found if each is not None]
        near = np.array([BulkTanimotoSimilarity(one, fingerprints) for one in molecules]).reshape(-1, len(known))
        spread = np.sqrt(np.clip(1 - np.einsum("ij,jk,ik->i", near, inverse, near, optimize=True), 0, None))
        predicted = np.full(len(new), max(costs))
        predicted[[each is not None for each in found]] = cost.mean() + scale * (near @ weights - spread)
        return predicted

    return predict


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
