"""The recipe of Ehrlich functions, on one that is quickly solved."""

import json
import random

import numpy as np
import pytest
from evaluation.ehrlich import MeasuredEhrlich, curve, draws_measured

QUICK = {
    "functions": "8-6-1-2", "budgets": 128, "rungs": 4, "updates": 5, "learning_rates": 3e-3, "populations": "8 16",
    "mutations": 1, "seeds": "0 1", "prior_steps": 100,
}  # fmt: skip
METHODS = (
    *("archive", "top", "span", "uniform_span", "edited", "genetic_algorithm", "expert_iteration", "rloo"),
    *("edited+rules", "genetic_algorithm+rules", "expert_iteration+rules"),
)


@pytest.mark.slow
def test_the_comparison(run_recipe, capsys):
    folder = run_recipe("ehrlich", "--methods", *METHODS, **QUICK)
    kept = (folder / "runs.jsonl").read_text()
    runs = [json.loads(line) for line in kept.splitlines()]
    for method in METHODS:
        made = [run for run in runs if run["method"] == method]
        # Where several settings are tried: each on the first seed, and the best one on the other.
        assert len(made) == {"genetic_algorithm": 2, "span": 6}.get(method.removesuffix("+rules"), 1) + 1
        for run in made:
            assert 0 < run["calls"] <= 128
            assert run["best"] == run["rises"][-1][1]
            assert (run["solved_at"] is None) == (run["best"] < 1)
            assert ("feasible" in run) == (not method.startswith("genetic_algorithm"))
            assert (1 if method.endswith("+rules") else 0.5) <= run.get("feasible", 1) <= 1
    assert any(run["solved_at"] is not None for run in runs)
    written = (folder / "ehrlich.md").read_text()
    assert "| top 5 0.003 | " in written
    assert (folder / "ehrlich.png").stat().st_size > 5000
    capsys.readouterr()
    run_recipe("ehrlich", "--methods", *METHODS, **QUICK)
    assert (folder / "runs.jsonl").read_text() == kept, "kept, and not made again"


def test_each_evaluation_counts_once_and_draws_do_not():
    problem = MeasuredEhrlich(7, 4, 1, 3, 1)
    texts = problem.random_texts(50, np.random.default_rng(0))
    best = next(text for text in problem.all_texts() if problem.function(problem.codes_of(text)[None]) == 1)
    problem.cost([""] * 53, [*texts, texts[0], "x", best])
    count = len({*texts}) + 2
    found = problem.search(budget=100)
    assert found["calls"] == count
    assert found["solved_at"] == (count if best not in texts else [*problem.values].index(best) + 1)
    assert problem.search(budget=1)["best"] == problem.value_of(texts[0])
    draws = draws_measured(problem, [best, best, "y", texts[0]])
    assert draws["feasible"] == 0.75
    assert draws["solutions"] == len({best, texts[0]}) if problem.value_of(texts[0]) == 1 else 1
    assert draws["mean_value"] == (2 + problem.value_of(texts[0])) / 4
    assert len(problem.values) == count


def test_edits_keep_to_the_neighbours_of_the_data_and_to_the_length(recipe_module):
    """All three kinds of children are made; what is no sequence is no parent."""
    recipe, problem = recipe_module("ehrlich"), MeasuredEhrlich(16, 8, 2, 2, 0)
    texts = problem.random_texts(8, np.random.default_rng(0))
    edit = recipe.state_edits(problem)
    made = [*edit(["x", *texts, texts[0][:3], ""], random.Random(0))]
    assert 20 < len(made) < recipe.TRIES
    assert all(map(problem.is_feasible, made))
    assert len({*made} - {*texts}) > 10
    assert not [*edit(texts[:1], random.Random(0))]
    one, other = list("aaaaaa"), list("bbbbbb")
    children = {"".join(recipe.changed(one, other, ["c"], random.Random(seed))) for seed in range(300)}
    assert {len(child) for child in children} == {6}
    assert "aacaaa" in children, "a state for another"
    assert "abbaaa" in children, "a part of the other"
    assert any({*child} == {*"abc"} for child in children), "mixed and changed"
    assert one == list("aaaaaa")


def test_the_best_value_after_each_evaluation():
    run = {"rises": [[1, 0.25], [3, 0.5], [7, 1.0]]}
    assert curve(run, np.arange(1, 9)) == [0.25, 0.25, 0.5, 0.5, 0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--functions", "32-32-2"], "write V-L-c-k"),
        (["--budgets", "100"], "one for each of 3 functions, not 1"),
        (["--methods", "reinvent"], "choose from defaults, archive, top"),
        (["--functions", "8-7-2-4", "--budgets", "100"], "2 motifs of 4 states do not fit into 7"),
        (
            ["--functions", "4-8-2-1", "--budgets", "100"],
            "4-8-2-1: V must be at least 3, c at least 1 and k",
        ),
        (["--functions", "32-32-0-4", "--budgets", "100"], "32-32-0-4: V must be at least 3"),
        (["--functions", "2-8-2-2", "--budgets", "100"], "2-8-2-2: V must be at least 3"),
    ],
)
def test_bad_input_is_refused(run_recipe, flags, words):
    with pytest.raises(SystemExit, match=words):
        run_recipe("ehrlich", *flags)
