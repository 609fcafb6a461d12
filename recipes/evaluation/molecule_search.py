"""Searches for molecules: edits of the best, and a genetic algorithm that ends when its evaluations are spent."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable

import mol_ga
import numpy as np
from problems.molecules import ZincProblem, canonical_smiles, zinc
from rdkit import Chem
from rdkit.Chem import rdFingerprintGenerator
from scipy.spatial.distance import cdist

from aldrift_hf import EditedTop

LEARNED = 600
"""Molecules that a model of the cost learns from: the best two thirds of these, and others by chance."""
NOISE = 1e-3
"""Variance of its noise, in units of the prior's."""
STRANGERS = 3
"""Of ten texts that are edited, so many are molecules of ZINC."""
GENERATOR = rdFingerprintGenerator.GetMorganGenerator(radius=2)
"""ECFP4, whose counts are folded into 2,048 here."""


def edited_top(edits: int) -> EditedTop:
    """A search by that genetic algorithm's edits; with more than one for each evaluation, on a model of the cost."""
    if edits == 1:
        return EditedTop(graph_edits)
    return EditedTop(edits_with_strangers, surrogate=by_fingerprints, edits_per_evaluation=edits)


def graph_edits(texts: list[str], rng: random.Random) -> set[str]:
    """The mutations and crossovers of that genetic algorithm, for half as many new molecules as there are texts; what
    is no molecule has no part in them."""
    molecules = [text for text in texts if canonical_smiles(text) is not None]
    return set(mol_ga.graph_ga.gen_candidates.graph_ga_blended_generation(molecules, len(texts) // 2, rng))


def edits_with_strangers(texts: list[str], rng: random.Random) -> set[str]:
    """The same, where some of the texts are replaced by molecules of ZINC, for parts that the best ones lack: a model
    of the cost says which of the children are worth an evaluation."""
    return graph_edits([*texts[STRANGERS:], *rng.choices(zinc()[0], k=STRANGERS)], rng)


@functools.lru_cache(maxsize=50_000)
def _fingerprint(text: str) -> np.ndarray | None:
    """Counts of the surroundings of atoms (ECFP4, folded); `None` for what is no molecule."""
    molecule = Chem.MolFromSmiles(text)
    if molecule is None or not molecule.GetNumAtoms():
        return None
    counts: np.ndarray = GENERATOR.GetCountFingerprintAsNumPy(molecule).astype(np.uint8)
    return counts


class _Covariance:
    """Of what the cost of a molecule is expected to be, and that of some others. One half is their similarity
    (Tanimoto's, of counts); the other half is that of a sum over a molecule's parts, by which the parts of several
    good molecules are expected to make a better one (Free and Wilson 1964, J. Med. Chem. 7, 395).

    Args:
        counts: `[n, features]`, the others'.
    """

    def __init__(self, counts: np.ndarray) -> None:
        self.used = counts.any(axis=0)
        self.counts, self.sizes = counts[:, self.used], counts.sum(axis=1)
        self.roots, self.scale = np.sqrt(self.counts.astype(np.float32)), self.sizes.mean()

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """`[m, n]`, of `[m, features]`."""
        known = counts[:, self.used]
        apart = cdist(known, self.counts, "cityblock") + (counts.sum(axis=1) - known.sum(axis=1))[:, None]
        both = counts.sum(axis=1)[:, None] + self.sizes
        parts = np.sqrt(known.astype(np.float32)) @ self.roots.T / self.scale
        half: np.ndarray = (both - apart) / (both + apart) / 2 + parts / 2
        return half

    def of_itself(self, counts: np.ndarray) -> np.ndarray:
        """`[m]`, of `[m, features]`: the variance."""
        half: np.ndarray = 1 / 2 + counts.sum(axis=1) / self.scale / 2
        return half


def by_fingerprints(texts: list[str], costs: list[float], rng: random.Random) -> Callable[[list[str]], np.ndarray]:
    """Predict costs by a Gaussian process: what it expects less a standard deviation, so that the unknown has a
    chance."""
    known = [(cost, found) for text, cost in zip(texts, costs) if (found := _fingerprint(text)) is not None]
    known.sort(key=lambda pair: pair[0])
    few = 2 * LEARNED // 3
    known = known[:few] + rng.sample(known[few:], min(LEARNED - few, max(len(known) - few, 0)))
    if not known:
        return lambda new: np.zeros(len(new))
    cost, counts = np.array([pair[0] for pair in known]), np.array([pair[1] for pair in known])
    covariance = _Covariance(counts)
    inverse = np.linalg.inv(covariance(counts) + NOISE * np.eye(len(known)))
    scale = cost.std() + 1e-9
    weights = inverse @ (cost - cost.mean()) / scale

    def predict(new: list[str]) -> np.ndarray:
        found = [_fingerprint(text) for text in new]
        predicted = np.full(len(new), max(costs))
        if molecules := [each for each in found if each is not None]:
            near, alone = covariance(np.array(molecules)), covariance.of_itself(np.array(molecules))
            spread = np.sqrt(np.clip(alone - ((near @ inverse) * near).sum(axis=1), 0, None))
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
