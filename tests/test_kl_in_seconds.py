"""The recipe that compares methods by time."""

import itertools
import json

import pytest


def test_a_model_counts_from_its_measurement_on(recipe_module):
    reached = recipe_module("kl_in_seconds").reached
    course = [[2.0, 1.5], [5.0, 0.7], [9.0, 0.9]]
    assert [reached(course, limit, 3.3) for limit in (1, 2, 8.9, 9, 100)] == [3.3, 1.5, 0.7, 0.9, 0.9]


@pytest.mark.slow
def test_each_method_has_its_best_setting_by_then(run_recipe, recipe_module):
    recipe = recipe_module("kl_in_seconds")
    flags = {
        "problem": "trips", "seconds": "0.3 0.8", "learning_rates": "1e-3 3e-3", "rungs": "70,2", "calls": 70,
        "seeds": 0, "prior_steps": 20,
    }  # fmt: skip
    methods = ["aldrift", "aldrift, defaults", "rloo", "expert_iteration"]
    folder = run_recipe("kl_in_seconds", "--methods", *methods, **flags)
    lines = (folder / "runs.jsonl").read_text()
    runs = [json.loads(line) for line in lines.splitlines()]
    for method in methods:
        own = [run for run in runs if run["method"] == method]
        assert len(own) == (1 if method == "aldrift, defaults" else 2)
        for run in own:
            seconds, kl = zip(*run["course"], strict=True)
            spaced = itertools.pairwise(seconds[:-1])  # the last one may come as soon as the time is over
            assert all(later >= 1.2 * earlier for earlier, later in spaced)
            assert min(kl) > 0
    table = (folder / "kl_in_seconds.md").read_text()
    best = min((run for run in runs if run["method"] == "rloo"),
               key=lambda run: recipe.reached(run["course"], 0.8, float("inf")))  # fmt: skip
    assert f"({best['learning_rate']:g}, 64, 1) |" in next(row for row in table.splitlines() if "rloo" in row)
    assert (folder / "kl_in_seconds.png").stat().st_size > 5000
    run_recipe("kl_in_seconds", "--methods", *methods, **flags)
    assert (folder / "runs.jsonl").read_text() == lines


def test_an_unknown_method_is_refused(run_recipe):
    with pytest.raises(SystemExit, match="unknown: ppo"):
        run_recipe("kl_in_seconds", methods="ppo")
