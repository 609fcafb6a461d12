"""What distinguishes the costs of one objective from those of another."""

import collections
import functools
import importlib.util
import inspect
import logging
import re
import sqlite3
import sys
import threading
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from conftest import count_a, printed_by_two_processes

from aldrift_hf import from_reward
from aldrift_hf.objective.identity import identity_of
from aldrift_hf.toy import word_tokenizer


def identity(function):
    return identity_of([function])


class Problem:
    scale = 1.0

    def __init__(self, *words, model=None):
        self.words, self.model = set(words), model

    def cost(self, prompts, completions):
        return [self.scale * len(self.words & set(text.split())) for text in completions]

    __call__ = cost


class ScaledProblem(Problem):
    scale = 2.0


class Slotted:
    __slots__ = ("words",)

    def __init__(self, *words):
        self.words = words

    def __call__(self, prompts, completions):
        return [float(len(self.words))] * len(completions)


class Model(torch.nn.Module):
    def __init__(self, threshold):
        super().__init__()
        self.head, self.threshold = torch.nn.Linear(2, 2), threshold

    def forward(self, prompts, completions):
        return [self.threshold] * len(completions)


def seeded(seed, make=lambda: torch.nn.Linear(2, 2)):
    torch.manual_seed(seed)
    return make()


def closing_over(value):
    def cost(prompts, completions):
        return [value] * len(completions)

    return cost


def calls_itself(depth):
    def cost(prompts, completions):
        return cost(prompts, completions[1:]) if completions else [depth]

    return cost


def default(number):
    """As in a loop over `number`."""
    return lambda prompts, completions, number=number: [float(text.count("a") != number) for text in completions]


def keyword_default(number):
    def cost(prompts, completions, *, number=number):
        return [float(text.count("a") != number) for text in completions]

    return cost


def scaled(factor):
    """A decorator, whose wrapper looks like the function that it wraps."""

    def decorate(function):
        @functools.wraps(function)
        def wrapper(prompts, completions):
            return [factor * value for value in function(prompts, completions)]

        return wrapper

    return decorate


def cached(number):
    @functools.lru_cache
    def one(text):
        return float(text.count("a") != number)

    return closing_over(one)


def attribute(number):
    def cost(prompts, completions):
        return [cost.number] * len(completions)

    cost.number = number
    return cost


def code(text, **names):
    """A function of a notebook: its text is in no file."""
    names["__name__"] = "__main__"
    exec(text, names)
    return names["cost"]


CELL = "def cost(prompts, completions):\n    return [K] * len(completions)"
NESTED = "def cost(prompts, completions):\n    return [(lambda: K)() for _ in completions]"
HELPER = (
    "def helper(text):\n    return {}\ndef cost(prompts, completions):\n    return [helper(t) for t in completions]"
)
CLASS = "class Helper:\n    def value(self):\n        return {}\ndef cost(prompts, completions):\n    return Helper()"
DEPTH = 200
CHAIN = "\n".join(f"def f{i}(): return f{i + 1}()" for i in range(DEPTH)) + "\n"
CHAIN += f"def f{DEPTH}(): return {{}}\ndef cost(prompts, completions): return f0()"
DEEP = functools.reduce(lambda inner, _: [inner], range(5 * DEPTH), [])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (count_a, closing_over(1.0)),
        (closing_over(1.0), closing_over(2.0)),
        (Problem("a", "b").cost, Problem("a", "c").cost),
        (Problem("a"), Problem("b")),
        (functools.partial(count_a, k=1), functools.partial(count_a, k=2)),
        (functools.partial(count_a, 1), functools.partial(count_a, 2)),
        (calls_itself(1), calls_itself(2)),
        (closing_over(closing_over(1.0)), closing_over(closing_over(2.0))),
        (default(1), default(2)),
        (keyword_default(1), keyword_default(2)),
        (scaled(1)(count_a), scaled(2)(count_a)),
        (scaled(1)(default(1)), scaled(1)(default(2))),
        (cached(1), cached(2)),
        (attribute(1), attribute(2)),
        (from_reward(count_a, best=1), from_reward(count_a, best=2)),
        (from_reward(default(1)), from_reward(default(2))),
        (lambda prompts, completions: [1.0], lambda prompts, completions: [2.0]),
        (lambda prompts, completions: [x.upper() for x in "a"], lambda prompts, completions: [x.lower() for x in "a"]),
        (Problem("a").cost, ScaledProblem("a").cost),
        (Problem("a"), ScaledProblem("a")),
        (Slotted("a"), Slotted("b")),
        (seeded(1, lambda: Model(1.0)), seeded(1, lambda: Model(2.0))),
        (code(CELL, K=1), code(CELL, K=2)),
        (code(CELL, K={"a": [1]}), code(CELL, K={"a": [2]})),
        (code(NESTED, K=1), code(NESTED, K=2)),
        (code(HELPER.format(1)), code(HELPER.format(2))),
        (code(CLASS.format(1)), code(CLASS.format(2))),
        (code(CHAIN.format(1)), code(CHAIN.format(2))),
        *(
            (closing_over(a), closing_over(b))
            for a, b in [
                (1, 1.0),
                (1, True),
                ("ab", b"ab"),
                (["a", "b"], ["ab"]),
                ([1], (1,)),
                ({1}, {2}),
                ({"a": 1}, {"a": 2}),
                (MappingProxyType({"a": 1}), MappingProxyType({"a": 2})),
                (collections.defaultdict(lambda: 1), collections.defaultdict(lambda: 2)),
                (re.compile("a"), re.compile("b")),
                (np.ones(3), np.zeros(3)),
                (torch.ones(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16)),
                (range(3), range(4)),
                ("abc".join, "abd".join),
                (Path("a"), Path("b")),
                (word_tokenizer(["a"], " "), word_tokenizer(["b"], " ")),
                ([closing_over(1)], [closing_over(2)]),
                ({"fn": Problem("a").cost}, {"fn": Problem("b").cost}),
            ]
        ),
    ],
)
def test_costs_that_differ_have_different_identities(one, other):
    assert identity(one) != identity(other)
    assert identity(one) == identity(one)


@pytest.mark.parametrize(
    "make",
    [
        *(lambda f=f: f(1) for f in (closing_over, calls_itself, default, keyword_default, attribute, cached)),
        lambda: scaled(1)(default(1)),
        lambda: Problem("a", "b"),
        lambda: Slotted("a"),
        lambda: seeded(1, lambda: Model(1.0)),
        lambda: functools.partial(count_a, k={"a": {1, 2}}),
        lambda: from_reward(count_a, tokenizer=word_tokenizer(["a"], " ")),
        lambda: code(CELL, K={"a": [1, {2}]}),
        lambda: code("# A comment.\n\n" + CELL, K={"a": [1, {2}]}),
        lambda: code(CLASS.format(1)),
        lambda: code(CHAIN.format(1)),
        lambda: closing_over(dict(reversed([("a", 1), ("b", 2)]))),
    ],
)
def test_equal_costs_have_equal_identities(make):
    assert identity(make()) == identity(make())


def test_what_does_not_change_the_cost_does_not_change_the_identity():
    assert identity(closing_over({"a": 1, "b": 2})) == identity(closing_over({"b": 2, "a": 1}))
    assert identity(code("\n\n# Comment\n" + CELL, K=1)) == identity(code(CELL, K=1, UNUSED=3))
    counter = CELL.replace("    return", "    global calls\n    calls = calls + 1\n    return")
    assert identity(code(counter, K=1, calls=0)) == identity(code(counter, K=1, calls=7))
    tokenizer = word_tokenizer(["a"], " ")
    tokenizer.pad_token = tokenizer.eos_token
    cost = from_reward(count_a, tokenizer=tokenizer)
    before = identity(cost)
    tokenizer(["a", "a a"], padding=True, truncation=True, max_length=1)
    assert identity(cost) == before


def test_order_and_number_of_functions_matter():
    one, two = default(1), default(2)
    assert len({identity_of(each) for each in ([one], [two], [one, two], [two, one], [one, one, two])}) == 5


def test_a_cache_key_is_the_identity():
    assert identity_of([default(1)], "v1") == identity_of([default(2)], "v1") != identity_of([default(2)], "v2")
    assert identity_of([default(1)], "") != identity_of([default(1)])


def test_a_lock_in_a_cost_is_not_read_but_what_is_beside_it():
    one, other, third = (Problem(words, model=threading.Lock()).cost for words in "aab")
    assert identity(one) == identity(other) != identity(third)


def test_the_weights_of_a_model_in_a_cost_count():
    one, same, other = (Problem("a", model=seeded(seed)).cost for seed in (1, 1, 2))
    assert identity(one) == identity(same) != identity(other)
    words = Problem("b", model=seeded(1)).cost
    assert identity(words) != identity(one)


@pytest.mark.parametrize(
    "value",
    [
        threading.Lock(),
        sqlite3.connect(":memory:"),
        logging.getLogger("test"),
        sys.stdout,
        (value for value in "ab"),
        Model(1.0).head.weight,
        sys,
        DEEP,
        inspect.currentframe(),
        type("Odd", (), {"__reduce_ex__": lambda self, protocol: 1 / 0})(),
        property(lambda self: 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_a_cost_closes_over_the_rest_is_seen(value):
    one, other, third = (closing_over((value, number)) for number in (1, 1, 2))
    assert identity(one) == identity(other) != identity(third)


def test_an_edited_cost_is_another(tmp_path):
    costs = []
    for worst in (1, 2):
        path = tmp_path / f"{worst}" / "costs.py"
        path.parent.mkdir()
        path.write_text(f"WORST = {worst}\ndef cost(prompts, completions):\n    return [WORST] * len(completions)\n")
        names = {}
        exec(compile(path.read_text(), str(path), "exec"), names)
        costs.append(names["cost"])
    assert identity(costs[0]) != identity(costs[1])


def test_an_edited_setting_beside_the_cost_does_not_make_it_another(tmp_path):
    """A script that defines its cost, and then trains on it."""
    script = "import helper\nNUM_RUNGS = {}\ndef cost(prompts, completions):\n    return helper.cost(completions, {})\n"

    def loaded(num_rungs, worst, text="def cost(completions, worst): ..."):
        (tmp_path / "helper.py").write_text(text)
        (tmp_path / "script.py").write_text(script.format(num_rungs, worst))
        module = {}
        for name in ("helper", "script"):
            spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
            module[name] = importlib.util.module_from_spec(spec)
            sys.modules[name] = module[name]
            exec(compile((tmp_path / f"{name}.py").read_text(), spec.origin, "exec"), vars(module[name]))
        return identity(module["script"].cost)

    try:
        first = loaded(4, 9)
        assert loaded(8, 9) == first
        assert loaded(4, 10) != first
        assert loaded(4, 9, "def cost(completions, worst): return 1") != first, "a module of the user's own"
    finally:
        del sys.modules["helper"], sys.modules["script"]


IN_ANOTHER_PROCESS = """
from aldrift_hf.objective.identity import identity_of

WORDS = {"a", "b", ("c", "d")}

class Problem:
    def __init__(self, *words):
        self.words = set(words)

    def __call__(self, prompts, completions):
        return [float(len((self.words | WORDS) & set(text.split()))) for text in completions]

print(identity_of([Problem("a", "b", "c", "d")]))
"""


@pytest.mark.slow
def test_the_same_cost_in_another_process_is_the_same():
    """Also where it refers to a set, whose order changes from one process to the next."""
    one, other = printed_by_two_processes(IN_ANOTHER_PROCESS)
    assert one == other != ""
