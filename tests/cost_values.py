"""Values that depend on one number, to which a cost function may refer."""

import array
import collections
import dataclasses
import datetime
import decimal
import enum
import io
import itertools
import operator
import random
import re
import types
import uuid
import weakref

import numpy as np
import pandas as pd
import PIL.Image
import pyarrow as pa
import torch
import transformers
from datasets import Dataset

from aldrift_hf.toy import word_tokenizer


class Words(set):
    pass


class Index(dict):
    pass


class Tree:
    """A trie, deeper than a bound on recursion would allow."""

    def __init__(self, word):
        self.children = {word[0]: Tree(word[1:])} if word else {}


class Node:
    def __init__(self, n):
        self.n, self.neighbours = n, set()


def graph(n):
    nodes = [Node(k) for k in (0, 1, 2, n + 2)]
    for node, other in itertools.pairwise([*nodes, nodes[0]]):
        node.neighbours.add(other)
        other.neighbours.add(node)
    return set(nodes)


K = {1: 1.0, 2: 2.0}


def colour(n):
    return enum.Enum("Colour", {"RED": n, "BLUE": 3})


class Shade(enum.Enum):
    DARK, LIGHT = 1, 2


class Level(enum.IntEnum):
    LOW, HIGH = 1, 2


def default(n):
    return lambda prompts, completions, n=n: [n] * len(completions)


@dataclasses.dataclass
class Data:
    n: float
    words: set = dataclasses.field(default_factory=set)

    def __call__(self, prompts, completions):
        return [self.n]


KEPT = {}  # what weak references point to

# ---- Values ----------------------------------------------------------------------------------------------------------


def network(n):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.BatchNorm1d(300))
    with torch.no_grad():
        model[0].weight[150, 150] = n
    return model


def tied_network(n):
    model = network(1)
    model.add_module("tied", torch.nn.Linear(300, 300))
    model.tied.weight = model[0].weight if n == 1 else torch.nn.Parameter(model[0].weight + 1)
    torch.nn.init.zeros_(model.tied.bias)
    return model


def classifier(n, **settings):
    config = transformers.GPT2Config(
        vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=1, **settings
    )
    torch.manual_seed(n)
    return transformers.GPT2ForSequenceClassification(config)


def hooked(n):
    model = network(1)
    model[0].register_forward_hook(lambda module, inputs, output: output * K[n])
    return model


def buffered(n):
    model = network(1)
    model.register_buffer("n", torch.tensor(n), persistent=False)
    return model


def long_array(n):
    values = np.zeros(5000)
    values[2500] = n
    return values


def picture(n):
    image = PIL.Image.new("L", (50, 50))
    image.putpixel((25, 25), n)
    file = io.BytesIO()
    image.save(file, "PNG")
    return PIL.Image.open(file)


VALUES = {
    "itemgetter": operator.itemgetter,
    "attrgetter": lambda n: operator.attrgetter(f"a.b{n}"),
    "methodcaller": lambda n: operator.methodcaller("count", "a", n),
    "pattern": lambda n: re.compile(f"a{n}"),
    "flags": lambda n: re.compile("a", re.IGNORECASE if n == 1 else re.MULTILINE),
    "method of a pattern": lambda n: re.compile(f"a{n}").match,
    "method of a text": lambda n: f"{n}".join,
    "method of a list": lambda n: [n].count,
    "enum": Shade,
    "int enum": Level,
    "made enum": colour,
    "int": int,
    "int or float": lambda n: 1 if n == 1 else 1.0,
    "bool": lambda n: n == 1,
    "text": str,
    "bytes": lambda n: bytes([n]),
    "bytearray": lambda n: bytearray([n]),
    "range": range,
    "slice": slice,
    "set": lambda n: {"a", "b", "c", str(n)},
    "set of sets": lambda n: {frozenset({"a", str(n)}), frozenset("bc")},
    "set class": lambda n: Words(["a", "b", "c", str(n)]),
    "dict class": lambda n: Index(a=1, b=n),
    "keys": lambda n: {"a": 1, "b": 1, n: 1}.keys(),
    "values": lambda n: {"a": 1, "b": n}.values(),
    "items": lambda n: {"a": 1, "b": n}.items(),
    "default dict": lambda n: collections.defaultdict(default(n)),
    "counter": lambda n: collections.Counter("a" * n),
    "deque": lambda n: collections.deque([1, n]),
    "chain map": lambda n: collections.ChainMap({"a": 1}, {"b": n}),
    "ordered dict": lambda n: collections.OrderedDict([("a", 1), ("b", 2)][:: 1 if n == 1 else -1]),
    "array": lambda n: array.array("d", [n]),
    "iterator": lambda n: iter([1, n]),
    "map": lambda n: map(default(n), [1]),
    "trie": lambda n: Tree("a" * 200 + str(n)),
    "graph": graph,
    "weak reference": lambda n: weakref.ref(KEPT.setdefault(n, Data(n))),
    "namespace": lambda n: types.SimpleNamespace(n=n),
    "date": lambda n: datetime.date(2020, 1, n),
    "decimal": decimal.Decimal,
    "uuid": lambda n: uuid.UUID(int=n),
    "random": random.Random,
    "random after use": lambda n: [source := random.Random(1), [source.random() for _ in range(n)]][0],
    "numpy random": np.random.default_rng,
    "old numpy random": np.random.RandomState,
    "torch random": lambda n: torch.Generator().manual_seed(n),
    "numpy": long_array,
    "numpy scalar": np.float32,
    "numpy strings": lambda n: np.array(["a", str(n)], dtype=object),
    "numpy dtype": lambda n: np.dtype([("a", "f4" if n == 1 else "f8")]),
    "data frame": lambda n: pd.DataFrame({"a": ["x", "y"], "b": [1, n]}),
    "series": lambda n: pd.Series([1.0, n], name="a", index=["x", "y"]),
    "series of texts": lambda n: pd.Series(["a", str(n), None]),
    "arrow table": lambda n: pa.table({"a": [1, n], "b": ["x", None]}),
    "slice of an arrow table": lambda n: pa.table({"a": [1, 2, 3]}).slice(n, 1),
    "arrow array": lambda n: pa.array([1, n]),
    "data set": lambda n: Dataset.from_dict({"a": [1, n]}),
    "ufunc": lambda n: np.add if n == 1 else np.multiply,
    "tensor": lambda n: torch.tensor(long_array(n)),
    "bf16 tensor": lambda n: torch.tensor(long_array(n), dtype=torch.bfloat16),
    "parameter": lambda n: torch.nn.Parameter(torch.tensor(long_array(n))),
    "torch dtype": lambda n: torch.float32 if n == 1 else torch.float64,
    "device": lambda n: torch.device("cpu" if n == 1 else "meta"),
    "image": lambda n: PIL.Image.new("RGB", (30, 30), (0, 0, n)),
    "opened image": picture,
    "tokenizer": lambda n: word_tokenizer(["a", f"b{n}"], " "),
    "network": network,
    "tied network": tied_network,
    "classifier": classifier,
    "configuration": lambda n: classifier(1, layer_norm_epsilon=float(n)).config,
    "settings of a model": lambda n: classifier(1, problem_type="regression" if n == 1 else None),
    "mode of a model": lambda n: network(1).train(n == 1),
    "hooks of a model": hooked,
    "buffers of a model": buffered,
    "function of torch": lambda n: torch.relu if n == 1 else torch.sigmoid,
    "builtin": lambda n: len if n == 1 else max,
    "library function": lambda n: re.match if n == 1 else re.search,
    "library class": lambda n: decimal.Decimal if n == 1 else datetime.date,
    "module": lambda n: re if n == 1 else random,
    "generic alias": lambda n: list[int] if n == 1 else list[str],
}
