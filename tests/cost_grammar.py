"""A small grammar of cost functions' source texts."""

import math
import random
import re
import types
import typing

import torch
from cost_kinds import Slots, run
from cost_values import Data, default, long_array

LITERALS = ["1", "1.0", "True", "-0.0", "0.0", "'1'", "b'1'", "None", "(1, (2,))", "(1, 2)", "...", "1j"]
PARTS = [
    *(lambda text=text: eval(text) for text in LITERALS),
    lambda: {"a", "b", "c"},
    lambda: frozenset("abc"),
    lambda: {"a": {1, 2}, "b": [3]},
    lambda: {"a": {1, 2}, "b": [4]},
    lambda: [1, [2]],
    lambda: long_array(0),
    lambda: long_array(1),
    lambda: torch.tensor(long_array(1)),
    lambda: re.compile("a"),
    lambda: Slots(1),
    lambda: Data(1, {"x", "y"}),
    lambda: default(1),
    lambda: default(2),
    lambda: Slots(1).method,
    lambda: math.nan,
    lambda: types.MappingProxyType({"a": {1, 2}, "b": [3]}),
]
SHAPES = {
    "def": "cost = make({closure})",
    "lambda": "cost = lambda p, c, f=make({closure}): f(p, c)",
    "partial": "cost = functools.partial(make({closure}), extra={extra})",
    "wrapper": (
        "def decorate(f, extra):\n    @functools.wraps(f)\n    def wrapper(*args):\n        return f(*args), extra\n"
        "    return wrapper\ncost = decorate(make({closure}), {extra})"
    ),
    "method": (
        "class Cost:\n    def __init__(self, extra):\n        self.extra = extra\n"
        "    def value(self, p, c):\n        return make({closure})(p, c)\ncost = Cost({extra}).value"
    ),
    "callable": (
        "class Base:\n    def __call__(self, p, c):\n        return make({closure})(p, c)\n"
        "class Cost(Base):\n    extra = {extra}\ncost = Cost()"
    ),
}
TEMPLATE = """
import functools
def make(value):
    def cost(prompts, completions, default={default}, *, keyword={keyword}, extra=None):
        def inner(text):
            return {literal}, value, {name}, extra
        return [inner(text) for text in completions]
    return cost
"""


class Spec(typing.NamedTuple):
    """A cost function: the shape of its text, and the numbers of a literal and of values in `LITERALS` and `PARTS`."""

    shape: str
    literal: int
    default: int
    keyword: int
    closure: int
    name: int
    extra: int

    def build(self):
        """The function. In the shapes without `extra` that value is not used."""
        values = {field: PARTS[getattr(self, field)]() for field in ("default", "keyword", "closure", "name", "extra")}
        text = (TEMPLATE + SHAPES[self.shape]).format(
            literal=LITERALS[self.literal], **{field: field.upper() for field in values}
        )
        return run(text, **{field.upper(): value for field, value in values.items()})

    def effective(self):
        """The specification without what the shape does not use."""
        return self if "extra}" in SHAPES[self.shape] else self._replace(extra=0)


def random_specs(number):
    source = random.Random(0)
    sizes = [len(LITERALS), *[len(PARTS)] * 5]
    return [Spec(source.choice(list(SHAPES)), *map(source.randrange, sizes)) for _ in range(number)]
