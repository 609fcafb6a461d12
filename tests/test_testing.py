"""check_objective names the property that a function violates; the functions of the recipes violate none."""

import asyncio
import functools
import itertools
import json
import math
import random
import re

import numpy as np
import pytest
from conftest import fuzz
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from problems.clustering import ClusteringProblem
from problems.line_scheduling import LineSchedulingProblem
from problems.round_trips import RoundTripProblem
from problems.spanning_tree import load_problem

from aldrift_hf import from_reward
from aldrift_hf.objective.testing import check_objective
from aldrift_hf.types import RESERVED_COLUMNS

EXAMPLES = ["[1, 2]", "[3]", "[2, 2, 2]"]


def total(text: str) -> float:
    """The sum of a JSON list of numbers, at most 10; 10 for anything else."""
    try:
        numbers = json.loads(text)
        return float(min(10, max(0, sum(numbers)))) if isinstance(numbers, list) else 10.0
    except (ValueError, TypeError, RecursionError):
        return 10.0


def cost(prompts, completions):
    return [total(text) for text in completions]


async def async_cost(prompts, completions):
    async def one(text):
        await asyncio.sleep(0)
        return total(text)

    return await asyncio.gather(*map(one, completions))


@pytest.mark.parametrize("function", [cost, async_cost, functools.partial(cost), from_reward(cost, best=10)])
def test_a_function_with_all_properties_passes(function):
    check_objective(function, EXAMPLES, objective_range=10)


# At least one function per property, all of them likely mistakes.

CALLS = itertools.count()


def wants_a_column(prompts, completions, target):
    return cost(prompts, completions)


def takes_no_columns(prompts, completions):
    return cost(prompts, completions)


def raises_on_malformed_text(prompts, completions):
    return [float(len(json.loads(text))) for text in completions]


def raises_on_deep_nesting(prompts, completions):
    """As a recursive parser does."""
    if any(text.count("(") > 1000 for text in completions):
        raise RecursionError("maximum recursion depth exceeded")
    return cost(prompts, completions)


def reads_numbers_that_int_does_not(prompts, completions):
    return [float(int(word)) if (word := text.partition(" ")[0]).isnumeric() else 10.0 for text in completions]


def one_too_few(prompts, completions):
    return cost(prompts, completions)[1:]


def drops_duplicates(prompts, completions):
    return [total(text) for text in dict.fromkeys(completions)]


def nan(prompts, completions):
    return [math.nan if text == "[3]" else total(text) for text in completions]


def infinite_for_malformed_text(prompts, completions):
    return [math.inf if not text.startswith("[") else total(text) for text in completions]


def negative(prompts, completions):
    return [-total(text) for text in completions]


def none(prompts, completions):
    return [None if text == "[3]" else total(text) for text in completions]


def above_the_range(prompts, completions):
    return [11 * total(text) for text in completions]


def clears_its_arguments(prompts, completions):
    costs = cost(prompts, completions)
    prompts.clear()
    return costs


def writes_into_a_prompt(prompts, completions, **columns):
    for prompt, text in zip(prompts, completions):
        prompt.append({"role": "assistant", "content": text})
    return cost(prompts, completions)


def counts_its_calls(prompts, completions):
    return [next(CALLS) % 7 for _ in completions]


def random_noise(prompts, completions):
    return [random.random() for _ in completions]


def of_one_text(text):
    return float(len(text))


def sorts(prompts, completions):
    return sorted(cost(prompts, completions))


def ranks_within_the_batch(prompts, completions):
    costs = cost(prompts, completions)
    return [sorted(costs).index(value) / len(costs) for value in costs]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (of_one_text, r"signature: .*as def cost\(prompts, completions, \*\*columns\).*\[one\(text\) for text in comp"),
        (wants_a_column, r"signature: .*missing a required argument: 'target'.*Add a column 'target'"),
        (raises_on_malformed_text, r"errors: objective 'raises_on.*JSONDecodeError.*which is ''.*the worst cost, D"),
        (raises_on_deep_nesting, r"errors: .*RecursionError.*'\(\(\(.* … .*the worst cost, D"),
        (reads_numbers_that_int_does_not, r"errors: .*ValueError: invalid literal for int.*'² ½"),
        (one_too_few, r"values: .*returned 0 values for 1 completions.*'\[1, 2\]'.*one number in \[0, D\]"),
        (drops_duplicates, r"values: .*returned 15 values for 16 completions"),
        (nan, r"values: objective 'nan' returned nan for row 0, which is NaN: completion '\[3\]'"),
        (infinite_for_malformed_text, r"values: .*returned inf .*which is infinite.*completion ''.*D for malformed"),
        (negative, r"values: .*returned -3.0.*which is negative.*from_reward"),
        (none, r"values: .*returned None for row 0, which is not a number.*completion '\[3\]'"),
        (above_the_range, r"values: .*returned 33.0 for row 0, above objective_range=10: .*'\[1, 2\]'. Raise"),
        (clears_its_arguments, r"arguments: .*changed prompts from \[''\] to \[\].*Copy before changing"),
        (counts_its_calls, r"determinism: .*returned \d.0 in a batch of 16, and \d.0 when called again.*Fix its seeds"),
        (random_noise, r"determinism: .*for completion '\[1, 2\]'"),
        (sorts, r"order: .*in the order of the completions"),
        (ranks_within_the_batch, r"batch size: .*returned 0.1875 in a batch of 16, and 0.0 alone, .*'\[1, 2, 4\]'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_a_violation_is_named_with_the_completion_the_costs_and_the_remedy(broken, message):
    with pytest.raises(AssertionError) as error:
        check_objective(broken, ["[1, 2]", "[3]", "[1, 2, 4]", "[3]"], objective_range=10)
    assert re.search(message, str(error.value), re.DOTALL), str(error.value)
    assert len(str(error.value)) < 1000


def test_rows_have_prompts_and_columns():
    seen = []

    def collects(prompts, completions, target):
        seen.extend(zip(prompts, completions, target))
        return [0.0] * len(completions)

    rows = [{"prompt": "a", "completion": "x", "target": 1}, {"prompt": "b", "completion": "y", "target": 2}]
    check_objective(collects, Dataset.from_list(rows))
    assert seen[:2] == [("a", "x", 1), ("b", "y", 2)]
    assert {(prompt, target) for prompt, text, target in seen if text not in "xy"} == {("a", 1), ("b", 2)}
    assert len(seen) == 4 * 14
    with pytest.raises(AssertionError, match=r"signature: .*Add \*\*columns"):
        check_objective(takes_no_columns, rows)


def test_chat_prompts_are_not_changed():
    rows = [{"prompt": [{"role": "user", "content": "?"}], "completion": "[1]", "target": 1}]
    with pytest.raises(AssertionError, match=r"arguments: .*changed prompts"):
        check_objective(writes_into_a_prompt, rows)
    assert len(rows[0]["prompt"]) == 1


def test_rounding_is_tolerated():
    def cost(prompts, completions):
        return [len(text) % 5 + 1e-4 * len(completions) for text in completions]

    check_objective(cost, EXAMPLES, tolerance=0.01)
    with pytest.raises(AssertionError, match="batch size"):
        check_objective(cost, EXAMPLES)


def test_costs_may_leave_the_range_by_rounding():
    def ends(excess):
        return lambda prompts, completions: [-excess if "[" in text else 10 + excess for text in completions]

    check_objective(ends(9e-6), EXAMPLES, objective_range=10)
    for excess in (1.1e-5, 9e-5):
        with pytest.raises(AssertionError, match=r"values: .*negative"):
            check_objective(ends(excess), EXAMPLES, objective_range=10)
    with pytest.raises(AssertionError, match=r"values: .*above objective_range=10"):
        check_objective(lambda prompts, completions: [10 + 1.1e-5] * len(completions), EXAMPLES, objective_range=10)


@pytest.mark.parametrize(
    "examples", [[], [{"prompt": "a"}], [{"completion": 1}], [{"completion": "a"}, {"completion": "b", "c": 1}]]
)
def test_invalid_examples_are_refused(examples):
    with pytest.raises(ValueError, match="at least one completion"):
        check_objective(cost, examples)


# The functions of the recipes.

PROBLEMS = {
    "florentine": load_problem("florentine"),
    "random": load_problem("random:6,0.5"),
    "line": LineSchedulingProblem(),
    "line of one": LineSchedulingProblem(stations=1),
    "iris": ClusteringProblem.load("iris", 36),
    "wine": ClusteringProblem.load("wine", 9, clusters=2),
    "trips": RoundTripProblem(),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_problems_costs(name):
    problem = PROBLEMS[name]
    texts = problem.random_texts(8, np.random.default_rng(0))
    prompts = problem.prompts
    rows = [
        {"prompt": prompt, "completion": text.removeprefix(prompt + problem.separator)}
        for text in texts
        for prompt in prompts
        if text.startswith(prompt)
    ]
    check_objective(problem.cost, rows, objective_range=problem.worst_cost)


@pytest.mark.slow
@fuzz(50)
@given(st.text())
def test_the_problems_costs_on_any_text(text):
    for name in ("random", "line", "wine", "trips"):
        check_objective(PROBLEMS[name].cost, [text], objective_range=PROBLEMS[name].worst_cost)


def test_the_recipes_costs(recipe_module):
    trips = [{"prompt": "Berlin", "completion": "Lisbon, London, Madrid, Paris, Rome, Vienna, Warsaw"}]
    check_objective(recipe_module("custom_objective").cost, trips, objective_range=20)
    check_objective(recipe_module("speed").cost, EXAMPLES, objective_range=7)


@pytest.mark.parametrize("name", RESERVED_COLUMNS)
def test_reserved_columns_are_refused(name):
    with pytest.raises(ValueError, match=f"columns called {name}, .*prompts, completions, completion_ids, self"):
        check_objective(lambda prompts, completions, **columns: [0.0], [{"completion": "a", name: "b"}])
