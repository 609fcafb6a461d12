"""Recipes with many prompts: digit sums, and what a rung costs."""

import json

import numpy as np
import pytest
from problems import digit_sums
from problems.digit_sums import NUM_PROMPTS, DigitSumProblem, split


def test_the_cost_is_the_distance_of_the_sums():
    problem = DigitSumProblem()
    prompts, texts = (
        ["1 2 3", "1 2 3", "0 0 0", "1 2 3", "1 2 3"],
        ["0 0 5 1", "5 5 5 5", "5 5 5 5", "1 2 3", "0 0 5 6"],
    )
    assert problem.cost(prompts, texts) == [0.0, 14.0, 20.0, 20.0, 20.0]
    assert problem.worst_cost == 20.0


def test_half_of_the_prompts_are_never_seen():
    seen, unseen = split()
    assert len(seen.prompts) == len(unseen.prompts) == 108
    assert {*seen.prompts} | {*unseen.prompts} == {*DigitSumProblem().prompts}
    assert len({*seen.prompts} & {*unseen.prompts}) == 0
    assert len(DigitSumProblem().prompts) == NUM_PROMPTS == 216
    assert len([*seen.completions(seen.prompts[0])]) == 6**4


def test_random_texts_are_prompts_with_completions():
    problem = DigitSumProblem()
    texts = problem.random_texts(500, np.random.default_rng(0))
    assert all(len(text.split()) == 7 and {*text.split()} <= {*problem.words} for text in texts)


@pytest.mark.slow
def test_the_comparison(run_recipe, capsys, monkeypatch):
    """Each run is made once; the best learning rate of a method is that of the first seed."""
    monkeypatch.setattr(digit_sums, "NUM_PROMPTS", 12)
    quick = {"learning_rates": "3e-4 3e-3", "seeds": "0 1", "draws": 480, "updates": 14, "prompts_per_rung": 4}
    quick["prompts_per_update"] = 2
    methods = ["prior", "aldrift, some prompts per rung", "rloo"]
    folder = run_recipe("many_prompts", "--methods", *methods, **quick)
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert [run["method"] for run in runs].count("prior") == 1
    assert [run["method"] for run in runs].count(methods[1]) == [run["method"] for run in runs].count("rloo") == 3
    prior, ours = runs[0], [run for run in runs if run["method"] == methods[1]]
    assert prior["unseen"] > 1.0
    assert all(run["spent"] == 480 for run in ours)
    assert all(run["worst"] >= run["unseen"] > 0 for run in runs)
    assert "unseen" in (folder / "many_prompts.md").read_text()
    assert (folder / "many_prompts.png").stat().st_size > 5000
    made = (folder / "runs.jsonl").read_text()
    run_recipe("many_prompts", "--methods", *methods, **quick)
    assert (folder / "runs.jsonl").read_text() == made


def test_an_unknown_method_is_refused(run_recipe):
    with pytest.raises(SystemExit, match="--methods ppo: choose from prior; aldrift;"):
        run_recipe("many_prompts", methods="ppo")


@pytest.mark.slow
def test_a_rung_of_some_prompts_does_not_grow(run_recipe, capsys):
    """Draws of a rung are those of its prompts."""
    folder = run_recipe("prompt_scaling", prompts="20 60", all_up_to=60, prompts_per_rung=4, rungs=2)
    lines = (folder / "prompt_scaling.md").read_text().splitlines()
    assert "| 20 prompts | 60 prompts | growth exponent |" in lines[2]
    assert [line.split("|")[1].strip() for line in lines[4:]] == [
        *("4 prompts per rung: CPU seconds per rung", "4 prompts per rung: memory, MiB"),
        *("all prompts: CPU seconds per rung", "all prompts: memory, MiB"),
    ]
