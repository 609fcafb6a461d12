"""Runs of a comparison, each made once and kept in a file, so that an interrupted command goes on where it was."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from aldrift_hf.reporting.record import replace_file

Run = dict[str, Any]
"""The measures of one run, and what it is a run of."""


def settings_of(options: Any, model: Any = None, without: Collection[str] = (), **more: Any) -> dict[str, Any]:
    """What runs depend on beside their keys, as JSON has it.

    Args:
        options: of the command. Lists among them say which runs are made, and are left out.
        model: the prior's settings.
        without: options that are parts of keys.
        more: anything else.
    """
    left_out = {*without, "output_dir"}
    own = {each.name: getattr(options, each.name) for each in fields(options)}
    of_command = {name: value for name, value in own.items() if name not in left_out and not isinstance(value, list)}
    of_model = {} if model is None else {each.name: getattr(model, each.name) for each in fields(model)}
    settings: dict[str, Any] = json.loads(json.dumps({**of_command, **of_model, **more}, default=str))
    return settings


def check_same(where: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse a run that was made with other settings.

    Raises:
        SystemExit: with the differences.
    """
    names = sorted({*theirs, *ours})
    other = [
        f"{name} = {theirs.get(name)!r}, not {ours.get(name)!r}" for name in names if theirs.get(name) != ours.get(name)
    ]
    if other:
        sys.exit(f"{where} has a run that was made with {'; '.join(other)}. Choose another --output_dir.")


class KeptRuns:
    """Measures by key, in a file of one line per run.

    Args:
        path: the file.
        key: names of the parts of a key.
        settings: what runs depend on besides, which is kept with them ([`settings_of`]).
    """

    def __init__(self, path: Path, key: Sequence[str], settings: Mapping[str, Any]) -> None:
        self.path, self.key, self.settings = path, key, settings
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if text != whole:  # a process was killed while it wrote its last line
            replace_file(path, whole.splitlines())
        self.runs: dict[tuple[Any, ...], Run] = {
            tuple(run[part] for part in key): run for run in map(json.loads, whole.splitlines())
        }

    def get(self, key: tuple[Any, ...], measure: Callable[..., dict[str, Any]]) -> Run:
        """A run, from the file if it was made before.

        Args:
            key: which one.
            measure: makes it, from the parts of the key.

        Raises:
            SystemExit: if it was made with other settings.
        """
        if key in self.runs:
            check_same(self.path, self.runs[key].get("settings", {}), self.settings)
        else:
            measures = measure(*key)
            self.runs[key] = dict(zip(self.key, key, strict=True)) | measures | {"settings": dict(self.settings)}
            with self.path.open("a") as file:
                file.write(json.dumps(self.runs[key]) + "\n")
            numbers = {name: round(value, 3) for name, value in measures.items() if isinstance(value, (int, float))}
            print(*key, numbers, flush=True)
        return self.runs[key]


class TunedRuns(ABC):
    """Runs of methods on problems, each method with the setting of its grid that is best on one problem and seed.

    Args:
        folder: the runs are kept in its file `runs.jsonl`.
        kind: what a problem is called there.
        budgets: evaluations per run, by problem. Settings are chosen on the first problem.
        seeds: the random seeds. Settings are chosen on the first one.
        settings: what runs depend on besides ([`settings_of`]).

    Attributes:
        kept: all runs so far.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        budgets: Mapping[str, int],
        seeds: Sequence[int],
        settings: Mapping[str, Any],
    ) -> None:
        self.folder, self.budgets, self.seeds = folder, budgets, seeds
        self.kept = KeptRuns(folder / "runs.jsonl", (kind, "method", "setting", "budget", "seed"), settings)

    @abstractmethod
    def grid(self, method: str) -> list[str]:
        """The settings that are tried for a method, as words."""

    @abstractmethod
    def measure(self, problem: str, method: str, setting: str, budget: int, seed: int) -> dict[str, Any]:
        """Make a run; its measures."""

    @staticmethod
    @abstractmethod
    def rank(run: Run) -> Any:
        """What a method's settings are compared by; less is better."""

    def runs(self, problem: str, method: str) -> list[Run]:
        """A run per seed, with the method's best setting."""
        tuned_on = next(iter(self.budgets))
        best = min((self.run(tuned_on, method, setting, self.seeds[0]) for setting in self.grid(method)), key=self.rank)
        return [self.run(problem, method, best["setting"], seed) for seed in self.seeds]

    def run(self, problem: str, method: str, setting: str, seed: int) -> Run:
        """One run."""
        return self.kept.get((problem, method, setting, self.budgets[problem], seed), self.measure)
