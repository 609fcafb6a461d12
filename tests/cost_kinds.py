"""Cost functions of every kind that depend on one number."""

import abc
import collections
import dataclasses
import functools
import random
import types
import typing

from cost_values import VALUES, Data, K, default

from aldrift_hf import from_reward


def closing_over(value):
    def cost(prompts, completions):
        return [value] * len(completions)

    return cost


def run(text, name="cost", **names):
    """A function from a text that is in no file; without a `__name__`, as after a bare `exec`."""
    exec(text, names)
    return names[name]


# ---- Functions -------------------------------------------------------------------------------------------------------


def keyword_default(n):
    def cost(prompts, completions, *, n=n):
        return [n] * len(completions)

    return cost


def mutable_closure(n):
    state = {"n": [n]}

    def cost(prompts, completions):
        def inner():
            return state["n"]

        return inner() * len(completions)

    return cost


def nested_constant(n):
    return run(f"def cost(prompts, completions):\n    return [(lambda: [x + {n} for x in [1]])() for _ in completions]")


def wraps(factor, scale=1):
    def decorate(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return [factor * SCALES[scale] * value for value in function(*args, **kwargs)]

        return wrapper

    return decorate


SCALES = {1: 1.0}


class Decorator:
    def __init__(self, function, factor):
        functools.update_wrapper(self, function)
        self.function, self.factor = function, factor

    def __call__(self, *args, **kwargs):
        return [self.factor * value for value in self.function(*args, **kwargs)]


def one(prompts, completions):
    return [1.0] * len(completions)


def helper_in_a_class(n):
    text = (
        "K = {}\ndef helper(text):\n    return K\n"
        "class Base:\n    def value(self, text):\n        return helper(text)\n"
        "class Cost(Base):\n    def __call__(self, prompts, completions):\n"
        "        return [self.value(text) for text in completions]\n"
        "cost = Cost()\n"
    )
    return run(text.format(n))


def wrapper_around_a_library(n):
    """By its name and module it is the library's."""
    text = (
        "import functools, textwrap\n@functools.wraps(textwrap.dedent)\ndef cost(prompts, completions):\n"
        "    return [K] * len(completions)\n"
    )
    return run(text, K=n)


def module_attribute(n):
    settings = types.ModuleType("settings")
    settings.inner = types.ModuleType("settings.inner")
    settings.inner.N, settings.UNUSED = n, random.random()
    return run("def cost(prompts, completions):\n    return [settings.inner.N] * len(completions)", settings=settings)


def module_function(n):
    helper = types.ModuleType("helper")
    exec("def value():\n    return N", vars(helper))
    helper.N = n
    return run("def cost(prompts, completions):\n    return [helper.value()] * len(completions)", helper=helper)


def single_dispatch(n):
    @functools.singledispatch
    def value(text):
        return 0.0

    @value.register
    def _(text: str):
        return n

    value("used")
    return closing_over(value)


def caches(n):
    @functools.lru_cache
    def value(text):
        return n

    value("used")
    return closing_over(value)


def many_decorators(n):
    return functools.reduce(lambda function, _: wraps(1)(function), range(60), default(n))


def mutual_recursion(n):
    text = "def f(x):\n    return g(x - 1) if x else {}\ndef g(x):\n    return f(x - 1) if x else 1\n"
    return run(text.format(n) + "def cost(prompts, completions):\n    return [f(9) + g(9)] * len(completions)")


def recursion_into(n):
    """Two functions of equal code: the second one calls the first, or itself."""
    text = "def f(x):\n    return g(x)\ndef g(x):\n    return {}(x)\ncost = f\n"
    return run(text.format("fg"[n == 1]))


def generator_object(n):
    return closing_over(number for number in [n])


FUNCTIONS = {
    "default": default,
    "keyword-only default": keyword_default,
    "mutable default": lambda n: default([{"a": {n}}]),
    "closure": closing_over,
    "mutable closure": mutable_closure,
    "closure of a closure": lambda n: closing_over(closing_over(n)),
    "nested constant": nested_constant,
    "constant set": lambda n: run(
        f"def cost(prompts, completions):\n    return [t in {{'a', '{n}'}} for t in prompts]"
    ),
    "lambdas in one line": lambda n: (lambda p, c: [1.0], lambda p, c: [2.0])[n - 1],
    "eval": lambda n: eval(f"lambda prompts, completions: [{n}]", {}),
    "global of exec": lambda n: run("cost = lambda prompts, completions: [K]", K=n),
    "function of exec": lambda n: run("def f(): return K\ndef cost(prompts, completions): return [f()]", K=n),
    "class of exec": lambda n: run(f"class C:\n    def f(self): return {n}\ndef cost(p, c): return [C().f()]"),
    "helper in a class": helper_in_a_class,
    "wraps": lambda n: wraps(n)(one),
    "wrapped": lambda n: wraps(1)(default(n)),
    "what a wrapper refers to": lambda n: wraps(1, n)(one),
    "class decorator": lambda n: Decorator(one, n),
    "decorated by a class": lambda n: Decorator(default(n), 1),
    "many decorators": many_decorators,
    "wrapper around a library": wrapper_around_a_library,
    "partial": lambda n: functools.partial(one, k=n),
    "partial of a partial": lambda n: functools.partial(functools.partial(one, n), k=1),
    "many partials": lambda n: functools.reduce(lambda f, _: functools.partial(f, a=[f]), range(40), default(n)),
    "from_reward": lambda n: from_reward(default(n)),
    "module attribute": module_attribute,
    "module function": module_function,
    "single dispatch": single_dispatch,
    "cached": caches,
    "mutual recursion": mutual_recursion,
    "recursion": recursion_into,
    "generator": generator_object,
    "function attribute": lambda n: vars(function := closing_over(1)).update(n=n) or function,
    "async": lambda n: run(f"async def cost(prompts, completions):\n    return [{n}]"),
    "annotations": lambda n: run(f"def cost(prompts: list, completions: list, n: int = {n}) -> list: return [n]"),
}

# ---- Objects ---------------------------------------------------------------------------------------------------------


class Slots:
    __slots__ = ("n",)

    def __init__(self, n):
        self.n = n

    def __call__(self, prompts, completions):
        return [self.n] * len(completions)

    def method(self, prompts, completions):
        return self(prompts, completions)


class Inherits(Slots):
    pass


class Named(typing.NamedTuple):
    n: float


class Unpicklable:
    def __init__(self, n):
        self.n = n

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot be pickled")

    def __call__(self, prompts, completions):
        return [self.n]


class Meta(type):
    def __call__(cls, prompts, completions):
        return [cls.n]


def a_class(n, base=object, **members):
    return type("Cost", (base,), {"__call__": lambda self, prompts, completions: [self.n], "n": n, **members})


def class_with_property(n):
    return type(
        "Cost", (), {"n": property(lambda self: K[n]), "__call__": lambda self, prompts, completions: [self.n]}
    )()


def class_with_partialmethod(n):
    def value(self, prompts, completions, k):
        return [k]

    return type("Cost", (), {"value": value, "__call__": functools.partialmethod(value, k=n)})()


def unpicklable_class(n):
    return a_class(n, __reduce_ex__=lambda self, protocol: 1 / 0)()


OBJECTS = {
    "slots": Slots,
    "bound method": lambda n: Slots(n).method,
    "inherited call": Inherits,
    "dataclass": Data,
    "made dataclass": lambda n: dataclasses.make_dataclass("Cost", ["a"], namespace={"f": lambda self: n})(1),
    "named tuple": lambda n: closing_over(Named(n)),
    "made named tuple": lambda n: closing_over(collections.namedtuple("Cost", ["a"], defaults=[n])),
    "unpicklable": Unpicklable,
    "unpicklable class": unpicklable_class,
    "class attribute": lambda n: a_class(n)(),
    "inherited class attribute": lambda n: type("Other", (a_class(n),), {})(),
    "class method": lambda n: a_class(n, value=classmethod(lambda cls: cls.n)).value,
    "static method": lambda n: a_class(1, value=staticmethod(closing_over(n)))().value,
    "property": class_with_property,
    "callable as call": lambda n: type("Cost", (), {"__call__": Slots(n)})(),
    "static call": lambda n: type("Cost", (), {"__call__": staticmethod(closing_over(n))})(),
    "partial method": class_with_partialmethod,
    "metaclass": lambda n: Meta("Cost", (), {"n": n}),
    "code of a metaclass": lambda n: type("M", (type,), {"__call__": default(n)})("Cost", (), {}),
    "abstract class": lambda n: a_class(n, abc.ABC, f=abc.abstractmethod(default(1))),
    "instance attribute": lambda n: vars(cost := Decorator(one, 1)).update(n=n) or cost,
    "mutable attribute": lambda n: Data(1, {"a", "b", n}),
    "object in an object": lambda n: Data(Data(Data(n))),
}


KINDS = {
    **FUNCTIONS,
    **OBJECTS,
    **{f"{name} in a closure": lambda n, make=make: closing_over(make(n)) for name, make in VALUES.items()},
    **{f"{name} in a default": lambda n, make=make: default(make(n)) for name, make in VALUES.items()},
}
