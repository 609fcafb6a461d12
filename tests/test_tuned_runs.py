"""Runs of a comparison: each method has the setting that is best on one problem and seed, and each is made once."""

from __future__ import annotations

from collections import Counter

import pytest
from evaluation.kept_runs import TunedRuns


class Bench(TunedRuns):
    """Costs that depend on the problem and on the seed, so that a setting chosen on others would be another one."""

    COST = {("one", "a"): 2.0, ("one", "b"): 1.0, ("two", "a"): 1.0, ("two", "b"): 2.0}

    def __init__(self, folder, **settings):
        super().__init__(folder, "task", {"one": 10, "two": 20}, [3, 4], settings)
        self.made = Counter()

    def grid(self, method):
        return ["a", "b"] if method == "tuned" else [""]

    def measure(self, problem, method, setting, budget, seed):
        self.made[problem, method, setting, budget, seed] += 1
        sign = 1 if seed == 3 else -1  # on the other seed the other setting would be chosen
        return {"cost": sign * self.COST.get((problem, setting), 0.0)}

    @staticmethod
    def rank(run):
        return run["cost"]


def test_a_run_that_was_made_with_other_settings_is_refused(tmp_path):
    Bench(tmp_path, updates=60, model=None).runs("one", "plain")
    again = Bench(tmp_path, updates=60, model=None)
    again.runs("one", "plain")
    assert not again.made
    with pytest.raises(SystemExit, match=r"made with updates = 60, not 240\. Choose another --output_dir"):
        Bench(tmp_path, updates=240, model=None).runs("one", "plain")


def test_a_setting_is_chosen_on_the_first_problem_and_seed(tmp_path):
    bench = Bench(tmp_path)
    runs = bench.runs("two", "tuned")
    assert [(run["task"], run["setting"], run["budget"], run["seed"]) for run in runs] == [
        ("two", "b", 20, 3),
        ("two", "b", 20, 4),
    ]
    assert set(bench.made) == {
        ("one", "tuned", "a", 10, 3),
        ("one", "tuned", "b", 10, 3),
        ("two", "tuned", "b", 20, 3),
        ("two", "tuned", "b", 20, 4),
    }


def test_each_run_is_made_once_whatever_process_asks(tmp_path):
    first = Bench(tmp_path)
    before = first.runs("one", "tuned"), first.runs("two", "")
    assert max(first.made.values()) == 1
    second = Bench(tmp_path)
    assert (second.runs("one", "tuned"), second.runs("two", "")) == before
    assert not second.made
