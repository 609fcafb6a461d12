"""Evolution of sequences of one length, without a model of them: a genetic algorithm, and AdaLead.

Both are told an alphabet, a length and a score to maximise, and end when their budget of evaluations is spent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestRegressor

Codes = NDArray[np.int64]
"""Sequences, `[n, length]`: positions in the alphabet."""
Sequence = tuple[int, ...]
"""One of them."""


class Oracle:
    """Scores that are evaluated once for each sequence, and for a limited number of them.

    Args:
        score: of a sequence; larger is better.
        budget: sequences that are evaluated.
        twin: makes the other sequence that has a sequence's score, which is then known as well; `None` for none.

    Attributes:
        known: the score of each sequence that was evaluated, in their order, and of their twins.
        evaluations: how many there were.
    """

    def __init__(
        self, score: Callable[[Sequence], float], budget: int, twin: Callable[[Sequence], Sequence] | None = None
    ) -> None:
        self.score, self.budget, self.twin = score, budget, twin
        self.known: dict[Sequence, float] = {}
        self.evaluations = 0

    @property
    def left(self) -> int:
        """Evaluations that are left."""
        return self.budget - self.evaluations

    def evaluate(self, sequences: Iterable[Sequence]) -> None:
        """Evaluate those that are new, as long as the budget lasts."""
        for sequence in sequences:
            if self.left and sequence not in self.known:
                self.known[sequence] = self.score(sequence)
                self.evaluations += 1
                if self.twin is not None:
                    self.known[self.twin(sequence)] = self.known[sequence]

    def best(self, count: int) -> Codes:
        """The best sequences so far; of equal ones the newest, so that a search on a plateau drifts."""
        newest_first = reversed([*self.known])
        return np.array(sorted(newest_first, key=self.known.__getitem__, reverse=True)[:count])


def genetic_algorithm(
    oracle: Oracle,
    letters: int,
    length: int,
    *,
    population: int,
    mutations: float,
    seed: int,
    start: Iterable[Sequence] | None = None,
    allowed: Callable[[Sequence], bool] | None = None,
) -> None:
    """Each generation, the best sequences so far are the parents of as many children.

    A child has each letter from one of two parents, and then mutations; one that is known already is mutated again, so
    that every child is an evaluation.

    Args:
        oracle: the score; what was evaluated is left in it.
        letters: size of the alphabet.
        length: of the sequences.
        population: parents and children per generation.
        mutations: letters of a child that are changed, on average.
        seed: random seed.
        start: the first generation; `None` draws `population` sequences, all with equal probability.
        allowed: which children are evaluated; `None` for all.
    """
    rng = np.random.default_rng(seed)
    oracle.evaluate(random_sequences(population, letters, length, rng) if start is None else start)
    while oracle.left:
        parents = oracle.best(population)
        mothers, fathers = parents[rng.integers(len(parents), size=(2, population))]
        children = np.where(rng.random((population, length)) < 0.5, mothers, fathers)
        for child in mutated(children, letters, mutations, rng):
            while tuple(child.tolist()) in oracle.known:
                child = mutated(child[None], letters, 1.0, rng)[0]
            if allowed is None or allowed(tuple(child.tolist())):
                oracle.evaluate([tuple(child.tolist())])


def adalead(
    oracle: Oracle,
    letters: int,
    length: int,
    *,
    batch: int,
    threshold: float,
    recombination: float = 0.2,
    screened: int = 5,
    seed: int,
) -> None:
    """AdaLead (Sinai et al. 2020, arXiv 2010.02141, algorithm 1), with a random forest that predicts the score.

    Each round, children of the sequences near the best one are mutated for as long as the forest, which is fitted to
    all evaluations, does not expect them to be worse than at first. Of all mutants those are evaluated that are the
    best by the forest.

    Args:
        oracle: the score; what was evaluated is left in it.
        letters: size of the alphabet.
        length: of the sequences.
        batch: evaluations per round.
        threshold: κ; the parents are the sequences whose score is at least `1 - κ` times the best one.
        recombination: chance that a child changes its parent at a place.
        screened: children per round for each evaluation.
        seed: random seed.
    """
    rng = np.random.default_rng(seed)
    oracle.evaluate(random_sequences(batch, letters, length, rng))
    while oracle.left:
        forest = RandomForestRegressor(30, random_state=int(rng.integers(2**31)))
        forest.fit(one_hot(np.array([*oracle.known]), letters), [*oracle.known.values()])
        best = max(oracle.known.values())
        parents = np.array([each for each, score in oracle.known.items() if score >= (1 - threshold) * best])
        starts = recombined(parents[rng.integers(len(parents), size=(2, screened * batch))], recombination, rng)
        expected = forest.predict(one_hot(starts, letters))
        candidates: dict[Sequence, float] = {}
        for _ in range(length):
            moved = mutated(starts, letters, 1.0, rng)
            scores = forest.predict(one_hot(moved, letters))
            found = zip(map(tuple, moved.tolist()), scores.tolist())
            candidates |= {each: score for each, score in found if each not in oracle.known}
            kept = scores >= expected
            starts, expected = moved[kept], expected[kept]
            if not len(starts):
                break
        ranked = sorted(candidates, key=candidates.__getitem__, reverse=True)[:batch]
        oracle.evaluate(ranked or map(tuple, mutated(parents, letters, 2.0, rng).tolist()))


def random_sequences(count: int, letters: int, length: int, rng: np.random.Generator) -> Iterable[Sequence]:
    """Sequences, all with equal probability."""
    return map(tuple, rng.integers(letters, size=(count, length)).tolist())


def mutated(codes: Codes, letters: int, expected: float, rng: np.random.Generator) -> Codes:
    """Sequences with other letters at some places, `expected` of a sequence on average, but at least one."""
    count, length = codes.shape
    chosen = rng.random((count, length)) < expected / length
    chosen[np.arange(count), rng.integers(length, size=count)] |= ~chosen.any(1)
    shift = rng.integers(1, letters, size=codes.shape)  # to another letter
    return np.where(chosen, (codes + shift) % letters, codes)


def recombined(pairs: Codes, rate: float, rng: np.random.Generator) -> Codes:
    """Children of `[2, n, length]` parents: read from one of them, and from the other after a change at this rate."""
    which = rng.integers(2, size=(pairs.shape[1], 1))
    changes = (rng.random(pairs.shape[1:]) < rate).cumsum(1)
    children: Codes = np.where((which + changes) % 2 == 0, pairs[0], pairs[1])
    return children


def one_hot(codes: Codes, letters: int) -> NDArray[np.float64]:
    """`[n, length · letters]` indicators."""
    return np.eye(letters)[codes].reshape(len(codes), -1)
