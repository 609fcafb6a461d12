"""Digests of values by their content: equal for equal values, whatever their addresses, and the same in any process.

A value is seen as a graph: it has a *header* (its type and plain data) and parts, which are values too. Parts may lead
back to the value itself. Two values have the same digest if their graphs are alike, whether an equal part occurs twice
or the same one; sets and dicts have no order.
"""

from __future__ import annotations

import copyreg
import hashlib
import sys
from collections import OrderedDict
from collections.abc import ItemsView, Iterable, Iterator, KeysView, ValuesView
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

MAX_DEPTH = 100_000
"""Levels of nesting after which only types are compared: a bound for values that make new parts for ever."""

CHUNK = 1 << 26
"""Bytes of a tensor that are copied from its device at once."""


class Digest(bytes):
    """The digest of a value, in place of the value as a part."""


class Parts:
    """A value as a header and its parts.

    Args:
        header: tells values apart whose parts are equal.
        parts: values of any kind.
        ordered: whether the order of the parts counts.
    """

    __slots__ = ("header", "ordered", "parts")

    def __init__(self, header: bytes, parts: Iterable[Any] = (), ordered: bool = True) -> None:
        self.header, self.parts, self.ordered = header, list(parts), ordered


class Content:
    """Digests of data: None, numbers, texts, bytes, containers, arrays, tensors, images, and objects by what pickle
    stores of them. Classes and functions count by name.

    One instance remembers the digests of the values that it has seen, and keeps these alive.
    """

    def __init__(self) -> None:
        self._nodes: dict[int, _Node] = {}
        self._seen: list[Any] = []  # keeps the values alive, because an id is reused after its object is gone

    def digest(self, value: Any) -> bytes:
        """The digest of a value."""
        node = self._node(value)
        return node if isinstance(node, bytes) else _settle(node, self._expand)

    def parts(self, value: Any) -> Parts:
        """A value, other than plain data, as a header and parts. Whatever it raises makes the value opaque."""
        kind = type(value)
        if kind in (list, tuple):
            return Parts(hashed(kind.__name__), value)
        if kind in (set, frozenset):
            return Parts(hashed(kind.__name__), value, ordered=False)
        if kind in (dict, MappingProxyType):
            return _dict(kind.__name__, value.items())
        if isinstance(value, ItemsView):
            return Parts(hashed("view", type_name(value)), map(_item, value), ordered=False)
        if isinstance(value, (KeysView, ValuesView)):
            return Parts(hashed("view", type_name(value)), value, ordered=False)
        if isinstance(value, type):
            return Parts(hashed("class", value.__module__, value.__qualname__))
        if kind is memoryview:
            return Parts(hashed("memoryview", value.format, repr(value.shape), value.tobytes()))
        return _array(value) or _tensor(value) or _image(value) or _arrow(value) or _object(value)

    def _node(self, value: Any) -> _Node | bytes:
        """A plain value's bytes; the node of any other value, the same one for the same object."""
        plain = _plain(value)
        if plain is not None:
            return plain
        node = self._nodes.get(id(value))
        if node is None:
            node = self._nodes[id(value)] = _Node(value)
            self._seen.append(value)
        return node if node.digest is None else node.digest

    def _expand(self, node: _Node, depth: int) -> None:
        """Give a node its header and its parts."""
        value = node.value
        try:
            parts = value if isinstance(value, Parts) else self.parts(value)
        except Exception:  # locks, connections and the like: whatever inspecting or pickling them raises
            parts = Parts(hashed("opaque"), [type(value), getattr(value, "__dict__", None)])
        node.header, node.ordered = parts.header, parts.ordered
        if depth < MAX_DEPTH:
            node.parts = [self._node(part) for part in parts.parts]


class _Node:
    """A value in the graph.

    Attributes:
        parts: the parts' nodes, or the bytes of those that are plain or done.
        index, low: when the node was reached, and the earliest unfinished node that it leads to.
        digest: of the value, once known.
    """

    __slots__ = ("digest", "header", "index", "low", "ordered", "parts", "value")

    def __init__(self, value: Any) -> None:
        self.value, self.header, self.ordered = value, b"", True
        self.parts: list[_Node | bytes] = []
        self.index = self.low = -1
        self.digest: bytes | None = None


def _settle(root: _Node, expand: Any) -> bytes:
    """Compute the digests of a node and of all that it leads to, by Tarjan's strongly connected components."""
    path: list[tuple[_Node, Iterator[_Node | bytes]]] = []
    unfinished: list[_Node] = []
    reached = 0

    def enter(node: _Node) -> None:
        nonlocal reached
        expand(node, len(path))
        node.index = node.low = reached
        reached += 1
        unfinished.append(node)
        path.append((node, iter(node.parts)))

    enter(root)
    while path:
        node, rest = path[-1]
        for part in rest:
            if isinstance(part, bytes) or part.digest is not None:
                continue
            if part.index < 0:
                enter(part)
                break
            node.low = min(node.low, part.index)
        else:
            path.pop()
            if path:
                path[-1][0].low = min(path[-1][0].low, node.low)
            if node.low == node.index:
                component = [unfinished.pop()]
                while component[-1] is not node:
                    component.append(unfinished.pop())
                _finish(component)
    assert root.digest is not None
    return root.digest


def _finish(component: list[_Node]) -> None:
    """Digest nodes of which each leads to every other one, or a single node.

    Where they lead back to themselves, each begins as its header and takes in its parts' colours, round by round, until
    no more nodes can be distinguished. Equal colours then mean that the graphs are alike.
    """
    (first, *others) = component
    if not others and not any(part is first for part in first.parts):
        first.digest = _combined(first, first.header, {})
        return
    colours = {id(node): node.header for node in component}
    distinguished = 0
    while len(set(colours.values())) > distinguished:
        distinguished = len(set(colours.values()))
        colours = {id(node): _combined(node, colours[id(node)], colours) for node in component}
    whole = sorted(set(colours.values()))
    for node in component:
        node.digest = Digest(hashed("cycle", colours[id(node)], *whole))


def _combined(node: _Node, header: bytes, colours: dict[int, bytes]) -> Digest:
    parts = [
        part if isinstance(part, bytes) else colours[id(part)] if part.digest is None else part.digest
        for part in node.parts
    ]
    return Digest(hashed("value", header, *(parts if node.ordered else sorted(parts))))


def hashed(kind: str, *parts: str | bytes) -> bytes:
    """A digest of parts, each with its length, so that no two lists of parts give the same bytes."""
    content = [kind.encode()]
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        content += [len(raw).to_bytes(8, "big"), raw]
    return hashlib.sha256(b"".join(content)).digest()


def type_name(value: Any) -> str:
    """The full name of a value's type."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


# ---- Kinds of values -------------------------------------------------------------------------------------------------


def _plain(value: Any) -> bytes | None:
    """The bytes of a value without parts; `None` for other values."""
    kind = type(value)
    if kind is Digest:
        return bytes(value)
    if kind is str:
        return b"str " + value.encode("utf-8", "surrogatepass")  # type: ignore[no-any-return]
    if kind is int:
        return b"int %x" % value
    if kind is bytes:
        return b"bytes " + value  # type: ignore[no-any-return]
    if kind in (bool, float, complex) or value is None or value is ...:
        return f"{kind.__name__} {value!r}".encode()
    return None


def _dict(kind: str, items: Iterable[tuple[Any, Any]]) -> Parts:
    """A dict's items; equal dicts may differ in their order."""
    return Parts(hashed(kind), map(_item, items), ordered=False)


def _item(item: tuple[Any, Any]) -> Any:
    """A dict's key and value as one part."""
    plain = [_plain(part) for part in item]
    if plain[0] is not None and plain[1] is not None:
        return Digest(hashed("item", plain[0], plain[1]))
    return Parts(hashed("item"), item)


def _array(value: Any) -> Parts | None:
    """An array or a scalar of numpy: its type, shape and bytes."""
    if not isinstance(value, np.generic) and type(value) not in (np.ndarray, np.memmap):
        return None
    array = np.asarray(value)
    kind = "scalar" if isinstance(value, np.generic) else "array"
    header = hashed(kind, array.dtype.str, repr(array.dtype.names), repr(array.shape))
    if array.dtype.names is not None:  # the bytes between the fields have no meaning
        return Parts(header, [array[name] for name in array.dtype.names])
    if array.dtype.hasobject:
        return Parts(header, array.ravel().tolist())
    flat = np.ascontiguousarray(array).reshape(-1)
    return Parts(hashed("data", header, xxhash.xxh3_128_digest(flat.view(np.uint8).data)))


def _tensor(value: Any) -> Parts | None:
    """A tensor of torch: its type, shape and bytes, wherever it lies."""
    if not isinstance(value, Tensor):
        return None
    header = hashed("tensor", type_name(value), str(value.dtype), repr(tuple(value.shape)), str(value.layout))
    if value.is_meta:
        return Parts(header)
    if value.layout is not torch.strided:
        return Parts(header, [value.detach().cpu().to_dense()])
    if value.is_quantized:
        return Parts(header, [value.int_repr(), str(value.qscheme()), value.detach().dequantize()])
    beside = [] if type(value) in (Tensor, nn.Parameter) else [vars(value)]  # the scales of quantized weights
    state = xxhash.xxh3_128()
    flat = value.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    for start in range(0, len(flat), CHUNK):
        state.update(flat[start : start + CHUNK].cpu().numpy().data)
    return Parts(hashed("data", header, state.digest()), beside)


def _image(value: Any) -> Parts | None:
    """An image of PIL: its pixels, palette and transparency; not the name or the format of its file."""
    image = getattr(sys.modules.get("PIL.Image"), "Image", None)
    if image is None or not isinstance(value, image):
        return None
    state = xxhash.xxh3_128_digest(value.tobytes())
    header = hashed("image", value.mode, repr(value.size), state)
    return Parts(header, [value.getpalette(), value.info.get("transparency")])


def _arrow(value: Any) -> Parts | None:
    """A table or an array of pyarrow: its type and rows, not the memory that a slice shares with others."""
    if type(value).__module__.partition(".")[0] != "pyarrow":
        return None
    if hasattr(value, "to_batches"):
        state = xxhash.xxh3_128()
        for batch in value.to_batches():
            state.update(memoryview(batch.serialize()))
        return Parts(hashed("table", type_name(value), str(value.schema), state.digest()))
    if hasattr(value, "to_pylist"):
        return Parts(hashed("arrow", type_name(value), str(value.type)), [value.to_pylist()])
    return None


def _object(value: Any) -> Parts:
    """What pickle stores of an object: the class, its arguments, the state and the items."""
    if isinstance(value, (set, frozenset)):  # of a class of its own: pickle stores it in the order of the hashes
        return Parts(hashed("object"), [type(value), frozenset(value), getattr(value, "__dict__", None)])
    if type(value) in copyreg.dispatch_table:
        reduced = copyreg.dispatch_table[type(value)](value)
    else:
        reduced = value.__reduce_ex__(4)
    if isinstance(reduced, str):
        return Parts(hashed("name", str(getattr(value, "__module__", "")), reduced))
    parts: list[Any] = [list(part) if isinstance(part, Iterator) else part for part in reduced]
    if len(parts) > 4 and parts[4] is not None and not isinstance(value, OrderedDict):
        parts[4] = _dict("dict", parts[4])
    return Parts(hashed("object"), parts)
