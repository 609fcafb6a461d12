"""Digests by content, and the keys of a data set's rows that are made of them."""

import array
import collections
import datetime
import decimal
import functools
import io
import threading
import uuid
from types import MappingProxyType

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import printed_by_two_processes
from datasets import Dataset, Features, Image, List, Value
from hypothesis import given
from hypothesis import strategies as st

from aldrift_hf.content import Content
from aldrift_hf.models.fingerprint import row_keys


def digest(value):
    return Content().digest(value)


def one_in_the_middle(make):
    """A long sequence of zeros, and one that differs where `repr` leaves values out."""
    return make(0), make(1)


def long_array(number):
    values = np.zeros(5000)
    values[2500] = number
    return values


def image(number, mode="RGB"):
    made = PIL.Image.new(mode, (40, 40))
    made.putpixel((20, 20), number if mode in ("L", "P") else (number,) * 3)
    return made


class Point:
    __slots__ = ("x", "y")

    def __init__(self, x, y):
        self.x, self.y = x, y


def ring(*values):
    """Values in a circle."""
    first = [values[0], None]
    last = first
    for value in values[1:]:
        last[1] = [value, None]
        last = last[1]
    last[1] = first
    return first


def leads_to(target):
    """Two lists of which the first leads to the second, and that one back or to itself."""
    one, other = ["one"], ["one"]
    one.append(other)
    other.append(one if target == "a" else other)
    return one


def nested(depth, core):
    return functools.reduce(lambda inner, _: [inner], range(depth), core)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (None, False),
        (0, False),
        (1, 1.0),
        (0.0, -0.0),
        (10**5000, 10**5000 + 1),
        ("a", b"a"),
        ("\ud800", "\ud801"),
        ("1", 1),
        (["ab", "c"], ["a", "bc"]),
        ([1, 2], [2, 1]),
        ([1], (1,)),
        ([[1], 2], [[1, 2]]),
        ({1, 2}, {1, 3}),
        ({1}, [1]),
        ({1: 2}, {2: 1}),
        ({"a": {"b": 1}}, {"a": {"b": 2}}),
        ({"a": [1]}, {"a": [2]}),
        ({"a": [1], "b": [2]}, {"a": [2], "b": [1]}),
        (long_array(0), long_array(1)),
        (long_array(0).astype(np.float32), long_array(0)),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (np.float64(1), np.float32(1)),
        (np.array(["a", None]), np.array(["b", None])),
        (np.array([(1, 2)], dtype="i1,f8"), np.array([(1, 3)], dtype="i1,f8")),
        (np.ma.array([1, 2], mask=[0, 1]), np.ma.array([1, 2], mask=[1, 0])),
        (np.datetime64("2020-01-01"), np.datetime64("2020-01-02")),
        (torch.tensor(long_array(0)), torch.tensor(long_array(1))),
        (torch.tensor(long_array(0)).bfloat16(), torch.tensor(long_array(1)).bfloat16()),
        (torch.tensor(1.0), torch.tensor(2.0)),
        (torch.tensor(1.0), torch.tensor([1.0])),
        (torch.tensor(1 + 2j), torch.tensor(1 - 2j)),
        (torch.eye(2).to_sparse(), torch.ones(2, 2).to_sparse()),
        (image(0), image(1)),
        (image(0, "L"), image(1, "L")),
        (image(0, "L"), image(0, "RGB")),
        (datetime.datetime(2020, 1, 1), datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)),
        (datetime.timedelta(1), datetime.timedelta(2)),
        (decimal.Decimal("1.0"), decimal.Decimal("1.00")),
        (uuid.UUID(int=1), uuid.UUID(int=2)),
        (collections.Counter("ab"), collections.Counter("ac")),
        (collections.OrderedDict(a=1), {"a": 1}),
        (array.array("d", [1]), array.array("d", [2])),
        (memoryview(b"a"), memoryview(b"b")),
        (Point(1, 2), Point(2, 1)),
        (MappingProxyType({"a": 1}), MappingProxyType({"a": 2})),
        (ring(1, 2, 3), ring(1, 3, 2)),
        (ring(1, 2), ring(1, 1)),
        (leads_to("a"), leads_to("b")),
        (nested(5000, 1), nested(5000, 2)),
        (int, float),
        (threading.Lock(), threading.RLock()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_differ_have_different_digests(one, other):
    assert digest(one) != digest(other)
    assert digest([one, 1]) != digest([other, 1])
    assert digest({"a": one}) != digest({"a": other})
    assert digest(one) == digest(one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({1: "a", 2: "b"}, {2: "b", 1: "a"}),
        ({(1, "x"), (2, "y")}, {(2, "y"), (1, "x")}),
        ({"a": [1], "b": [2]}, {"b": [2], "a": [1]}),
        (float("nan"), -float("nan")),
        (np.arange(6).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3))),
        (np.arange(10)[::2], np.arange(0, 10, 2)),
        (torch.arange(10)[::2], torch.arange(0, 10, 2)),
        (torch.ones(3), torch.ones(3, requires_grad=True)),
        (image(1), image(1)),
        (Point(1, [2]), Point(1, [2])),
        (datetime.datetime(2020, 1, 1), datetime.datetime(2020, 1, 1)),
        (ring(1, 2), ring(1, 2)),
        (ring(1, 2), ring(1, 2, 1, 2)),
        (nested(5000, 1), nested(5000, 1)),
        ([[1]] * 2, [[1], [1]]),
        (threading.Lock(), threading.Lock()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_equal_values_have_equal_digests(one, other):
    assert digest(one) == digest(other)
    assert digest([one, one]) == digest([one, other])


DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
)


@pytest.mark.slow
@given(DATA, DATA)
def test_data_is_told_apart_as_by_its_text(one, other):
    def text(value):
        if isinstance(value, dict):
            return f"{{{sorted((repr(key), text(item)) for key, item in value.items())}}}"
        if isinstance(value, (list, tuple)):
            return f"{type(value).__name__}{[text(item) for item in value]}"
        return repr(value)

    assert (digest(one) == digest(other)) == (text(one) == text(other))


# ---- Rows ------------------------------------------------------------------------------------------------------------

FORMATS = [None, "numpy", "torch", "pandas", "arrow"]


def keys(dataset):
    return row_keys(dataset, [dict(row) for row in dataset])


def png(number):
    file = io.BytesIO()
    image(number).save(file, "PNG")
    return file.getvalue()


def rows(**columns):
    return Dataset.from_dict({"prompt": ["a"] * 3, **columns})


ROWS = {
    "long arrays": rows(target=[long_array(number).tolist() for number in (0, 1, 2)]),
    "matrices": rows(target=[long_array(number).reshape(50, 100).tolist() for number in (0, 1, 2)]),
    "structures": rows(target=[{"a": [{"b": [1.5]}]}, {"a": [{"b": [2.5]}]}, {"a": []}]),
    "missing": rows(target=[float("nan"), None, 0.0]),
    "times": rows(target=[datetime.datetime(2020, 1, day) for day in (1, 2, 3)]),
    "images": rows(target=[image(number) for number in (0, 1, 2)]),
    "lists of images": rows(target=[[image(number), image(9)] for number in (0, 1, 2)]),
    "images within": Dataset.from_dict(
        {"prompt": ["a"] * 3, "target": [{"x": [{"bytes": png(number), "path": None}]} for number in (0, 1, 2)]},
        features=Features(prompt=Value("string"), target={"x": List(Image())}),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_told_apart_in_every_format(name):
    expected = keys(ROWS[name])
    assert len(set(expected)) == 3
    for form in FORMATS:
        formatted = ROWS[name].with_format(form)
        assert row_keys(formatted, [{}] * 3) == expected
    assert keys(ROWS[name].select([2, 0, 2])) == [expected[2], expected[0], expected[2]]
    assert sorted(keys(ROWS[name].shuffle(seed=1))) == sorted(expected)
    assert keys(ROWS[name].select_columns(["target", "prompt"])) == expected
    assert not {*keys(ROWS[name].remove_columns("target"))} & {*expected}


def test_a_row_is_what_the_format_shows():
    data = rows(target=[1, 2, 3], other=[4, 5, 6])
    assert keys(data.with_format("numpy", columns=["prompt", "target"])) == keys(data.remove_columns("other"))
    some = data.with_format("numpy", columns=["target"], output_all_columns=True)
    assert keys(some) == keys(data)


def test_an_image_is_known_by_its_bytes_wherever_its_file_lies(tmp_path):
    paths = []
    for folder, number in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "image.png")
        paths[-1].write_bytes(png(number))
    data = rows(target=list(map(str, paths))).cast_column("target", Image())
    one, same, other = keys(data)
    assert one == same != other
    stored = [{"bytes": png(number), "path": None} for number in (0, 0, 1)]
    assert keys(rows(target=stored).cast_column("target", Image())) == [one, same, other]
    undecoded = data.cast_column("target", Image(decode=False))
    before = keys(undecoded)
    assert len(set(before)) == 3, "the objective gets the paths"
    paths[0].write_bytes(png(2))
    assert keys(data)[0] != one
    assert keys(undecoded)[0] != before[0]


def test_a_path_stands_for_a_file_that_cannot_be_read(tmp_path):
    data = rows(target=[str(tmp_path / name) for name in "abc"]).cast_column("target", Image())
    assert len(set(row_keys(data, [{}] * 3))) == 3


def test_what_a_transform_makes_of_a_row_counts():
    data = rows(target=[1, 2, 3])

    def with_sign(sign):
        return data.with_transform(lambda batch: {**batch, "target": [np.array([sign * x]) for x in batch["target"]]})

    assert len({*keys(data), *keys(with_sign(1)), *keys(with_sign(-1))}) == 9
    assert keys(with_sign(-1)) == keys(with_sign(-1))
    constant = data.with_transform(lambda batch: {"prompt": batch["prompt"]})
    assert len(set(keys(constant))) == 3, "what is stored tells apart what a transform may read from elsewhere"


IN_ANOTHER_PROCESS = """
from datasets import Dataset
from aldrift_hf.content import Content
from aldrift_hf.models.fingerprint import row_keys

class Node:
    def __init__(self, name):
        self.name, self.neighbours = name, set()

a, b, c = map(Node, "abc")
for one, other in [(a, b), (b, c), (c, a), (b, a)]:
    one.neighbours.add(other)
data = Dataset.from_dict({"prompt": ["a", "b"], "target": [{"x": 1, "y": [1.0]}, {"x": 2, "y": []}]})
print(row_keys(data, list(data)), Content().digest([{"x", "y", ("z", frozenset("abc"))}, {a, b, c}]))
"""


@pytest.mark.slow
def test_digests_and_keys_are_the_same_in_every_process():
    """Also of sets, whose order changes from one process to the next, and of what leads back to itself."""
    one, other = printed_by_two_processes(IN_ANOTHER_PROCESS)
    assert one == other != ""
