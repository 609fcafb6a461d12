"""Runs of a comparison, each made once and kept in a file, so that an interrupted command goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Run = dict[str, Any]
"""The measures of one run, and what it is a run of."""


class KeptRuns:
    """Measures by key, in a file of one line per run.

    Args:
        path: the file.
        key: names of the parts of a key.
    """

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        self.path, self.key = path, key
        lines = path.read_text().splitlines() if path.exists() else []
        self.runs: dict[tuple[Any, ...], Run] = {
            tuple(run[part] for part in key): run for run in map(json.loads, lines)
        }

    def get(self, key: tuple[Any, ...], measure: Callable[..., dict[str, Any]]) -> Run:
        """A run, from the file if it was made before.

        Args:
            key: which one.
            measure: makes it, from the parts of the key.
        """
        if key not in self.runs:
            measures = measure(*key)
            self.runs[key] = dict(zip(self.key, key, strict=True)) | measures
            with self.path.open("a") as file:
                file.write(json.dumps(self.runs[key]) + "\n")
            numbers = {name: round(value, 3) for name, value in measures.items() if isinstance(value, (int, float))}
            print(*key, numbers, flush=True)
        return self.runs[key]


def runs_of_best(
    run: Callable[[str, str, int], Run],
    problem: str,
    seeds: Sequence[int],
    settings: Sequence[str],
    rank: Callable[[Run], Any],
    tuned_on: str,
) -> list[Run]:
    """A run per seed of a method, with the setting of its grid that is best on one problem and the first seed.

    Args:
        run: makes or finds a run, from a problem, a setting and a seed.
        problem: what is run.
        seeds: the random seeds.
        settings: the grid.
        rank: what runs are compared by; less is better.
        tuned_on: the problem that the setting is chosen on.
    """
    best = min((run(tuned_on, setting, seeds[0]) for setting in settings), key=rank)
    return [run(problem, best["setting"], seed) for seed in seeds]
