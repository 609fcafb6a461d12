"""All runs of the comparison of `recipes/steer_text.py`, one after another; finished ones are not repeated."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from evaluation.steering_run import BUSY, arguments
from evaluation.steering_setting import LEARNING, METHODS, TUNED, Setting, check_alike, check_stored

RECIPES = Path(__file__).parents[1]


def grid(
    methods: Iterable[str],
    tasks: Sequence[str],
    learning_rates: Sequence[float],
    calls: Sequence[int],
    seeds: Sequence[int],
    aldrift: dict[str, Any],
    lora: dict[str, Any],
    **shared: Any,
) -> Iterator[Setting]:
    """The settings of all runs: first seeds first. Methods at test time, and `defaults`, have no learning rate.

    Args:
        methods, tasks, learning_rates, calls, seeds: what is varied.
        aldrift: settings for the method `aldrift` alone.
        lora: settings of the adapter, for all methods that learn.
        shared: other attributes of [`Setting`].
    """
    for seed in seeds:
        for task in tasks:
            for number in calls:
                for method in methods:
                    for rate in learning_rates if method in TUNED else [0.0]:
                        own, adapter = aldrift if method == "aldrift" else {}, lora if method in LEARNING else {}
                        yield Setting(task, method, rate, number, seed, aldrift=own, lora=adapter, **shared)


def make(
    settings: Iterable[Setting],
    output_dir: Path,
    gold_dir: Path,
    keep_models: bool,
    tell: Callable[[str], None],
) -> list[str]:
    """Make the runs whose results are not there, each in a process of its own.

    Args:
        settings: of the runs.
        output_dir, gold_dir: folders of results and of gold.
        keep_models: whether the trained adapters stay beside the results.
        tell: shows a line.

    Returns:
        A line for each run that failed; the others were made all the same.

    Raises:
        ValueError: for results that were made with other settings, before anything is run.
    """
    settings = [*settings]
    for setting in settings:
        check_stored(setting, output_dir)
    stored = results(output_dir, sorted({setting.task for setting in settings}))
    check_alike([*(run["setting"] for run in stored), *(setting.identity() for setting in settings)])
    failures = []
    for setting in settings:
        path = setting.result(output_dir)
        name = f"{setting.task} {path.stem}"
        if path.exists():
            continue
        began = time.perf_counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".log").open("w") as log:
            environment = os.environ | {
                "OMP_NUM_THREADS": str(setting.threads),
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONPATH": os.pathsep.join(filter(None, [str(RECIPES), os.environ.get("PYTHONPATH")])),
            }
            command = arguments(setting, output_dir, gold_dir, keep_models)
            status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
        if status == BUSY:
            tell(f"{name}: another process is at it")
        elif status:
            failures.append(f"{name}: ended with {status}: see {path.with_suffix('.log')}")
            tell(failures[-1])
        else:
            tell(f"{name}: {time.perf_counter() - began:,.0f} s")
    return failures


def results(output_dir: Path, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """All results that are there, those of the methods in their order.

    Raises:
        ValueError: if some that a table would compare were made with different settings.
    """
    found = [
        json.loads(path.read_text()) for task in tasks for path in sorted((output_dir / task).glob("[!_]*_seed*.json"))
    ]
    check_alike([result["setting"] for result in found])
    return sorted(found, key=lambda result: METHODS.index(result["setting"]["method"]))
