"""What distinguishes the costs of one objective from those of another, where both are kept in the same folder.

A cost function is identified by what it computes with, all by content: its bytecode and constants, defaults, closure
and attributes, and the global names that it refers to. The same holds for the functions, classes, objects and
containers found there: a decorator and the function that it wraps, the arguments of a partial, the object that a method
is bound to.

The text of the function's file is not part of the identity. With it, a change to an unrelated line, such as a setting
in a script that defines its cost and trains on it, would discard every cost; and it does not show that a global name
has another value.

What cannot be seen: files, services, the weights of models, names that are looked up at run time (`getattr`, an
`import` inside a function), and what imported modules refer to in turn. `objective_cache_key` is the remedy.
"""

from __future__ import annotations

import contextlib
import copyreg
import dis
import functools
import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import numpy as np
from datasets.fingerprint import Hasher
from torch import Generator, Tensor, nn
from transformers import PreTrainedTokenizerBase

from .protocol import CostFunction

MAX_DEPTH = 50
"""Levels of nesting after which only types are compared: a bound on the recursion."""


def identity_of(functions: Sequence[CostFunction], cache_key: str | None = None) -> str:
    """The identity of an objective: `cache_key` if given, otherwise a hash of the functions' content."""
    if cache_key is not None:
        return f"key:{cache_key}"
    content = _Content()
    digests = [content.digest(list(functions))]
    for reference in content.references:  # grows while it is walked
        digests.append(content.digest(reference))
    return f"content:{_hash('objective', *digests).hex()}"


class _Content:
    """Digests of values by content: the same in any process.

    Attributes:
        references: the functions and classes that are reached by a global name. They are digested one after the other
            rather than inside each other, however long the chain of calls.
    """

    def __init__(self) -> None:
        self.references: list[Any] = []
        self._digests: dict[int, bytes] = {}
        self._seen: list[Any] = []  # keeps the values alive, because an id is reused after its object is gone

    def digest(self, value: Any, depth: int = 0) -> bytes:
        """The digest of a value and, recursively, of its parts."""
        if value is None or value is ... or isinstance(value, (bool, int, float, complex)):
            return _hash(type(value).__name__, repr(value))
        if type(value) is str:
            return _hash("str", value)
        if id(value) not in self._digests:
            self._digests[id(value)] = b"cycle"  # for a value that contains itself
            self._seen.append(value)
            try:
                self._digests[id(value)] = self._compound(value, depth + 1)
            except Exception:  # locks, connections and the like: whatever inspecting or pickling them raises
                self._digests[id(value)] = self._parts("opaque", depth + 1, _type(value), getattr(value, "__dict__", 0))
        return self._digests[id(value)]

    def _parts(self, kind: str, depth: int, *parts: Any) -> bytes:
        return _hash(kind, *(self.digest(part, depth) for part in parts))

    def _compound(self, value: Any, depth: int) -> bytes:
        if depth > MAX_DEPTH:
            return _hash("deep", _type(value))
        if type(value) is bytes:
            return _hash("bytes", value)
        if type(value) in (list, tuple):
            return self._parts(type(value).__name__, depth, *value)
        if type(value) in (set, frozenset):
            return _hash("set", *sorted(self.digest(item, depth) for item in value))
        if type(value) in (dict, MappingProxyType):  # equal dicts may differ in their order
            return _hash("dict", *sorted(self._parts("item", depth, *item) for item in value.items()))
        if isinstance(value, CodeType):
            return self._code(value, depth)
        if isinstance(value, FunctionType):
            return self._function(value, depth)
        if isinstance(value, MethodType):
            return self._parts("method", depth, value.__func__, value.__self__)
        if isinstance(value, type):
            return self._class(value, depth)
        if isinstance(value, ModuleType):
            return _hash("module", value.__name__, b"" if _is_library(value.__name__) else _text(value))
        return self._object(value, depth)

    def _code(self, code: CodeType, depth: int) -> bytes:
        table = getattr(code, "co_exceptiontable", b"")  # from Python 3.11
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        return self._parts("code", depth, code.co_code, table, code.co_consts, names, counts)

    def _function(self, function: FunctionType, depth: int) -> bytes:
        cells: list[Any] = []
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # the variable has no value yet
                cells.append(cell.cell_contents)
        attributes = {name: value for name, value in vars(function).items() if name != "__signature__"}
        names = [] if _is_library(function.__module__) else sorted(_global_names(function.__code__))
        data = {}
        for name in names:
            value = function.__globals__.get(name)
            if isinstance(value, (FunctionType, type)):
                self.references.append(value)
                value = f"{value.__module__}.{value.__qualname__}"
            data[name] = value
        defaults = (function.__defaults__, function.__kwdefaults__)
        return self._parts("function", depth, function.__code__, defaults, cells, attributes, data)

    def _class(self, cls: type, depth: int) -> bytes:
        """A library's class by name; a user's by its own and its bases' methods and attributes."""
        if _is_library(cls.__module__):
            return _hash("class", cls.__module__, cls.__qualname__)
        members = {
            name: value
            for name, value in vars(cls).items()
            if not (name.startswith("__") and name.endswith("__")) or isinstance(value, (FunctionType, classmethod))
        }
        return self._parts("class", depth, cls.__qualname__, members, cls.__bases__)

    def _object(self, value: Any, depth: int) -> bytes:
        if isinstance(value, nn.Module):  # weights are not read; what a user set beside them is
            state = {name: part for name, part in vars(value).items() if name not in _MODULE_ATTRIBUTES}
            return self._parts("model", depth, type(value), state)
        if isinstance(value, property):
            return self._parts("property", depth, value.fget, value.fset)
        if isinstance(value, (staticmethod, classmethod, functools._lru_cache_wrapper)):
            return self._parts("wrapped", depth, _type(value), value.__wrapped__)
        if _has_canonical_hash(value):
            return _hash("data", _type(value), Hasher.hash(value))
        if type(value) in copyreg.dispatch_table:
            reduced = copyreg.dispatch_table[type(value)](value)
        else:
            reduced = value.__reduce_ex__(4)  # what pickle stores: the class, its arguments, the state and the items
        if isinstance(reduced, str):
            return _hash("name", str(getattr(value, "__module__", "")), reduced)
        return self._parts("object", depth, *(list(part) if isinstance(part, Iterator) else part for part in reduced))


_MODULE_ATTRIBUTES = vars(nn.Module()).keys()


def _has_canonical_hash(value: Any) -> bool:
    """Whether `datasets` hashes equal objects of this type alike, although they may be pickled differently."""
    package = type(value).__module__.partition(".")[0]
    return isinstance(value, (Tensor, Generator, np.ndarray, PreTrainedTokenizerBase)) or (
        package in ("regex", "_regex", "spacy", "tiktoken", "pyarrow")
    )


def _global_names(code: CodeType) -> set[str]:
    """The global names that a function reads, its inner functions included, except those that it assigns itself.

    A name that a function assigns, such as a counter of its calls, is not what a cost depends on.
    """
    read, assigned = set(), set()
    codes = [code]
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                read.add(instruction.argval)
            elif instruction.opname == "STORE_GLOBAL":
                assigned.add(instruction.argval)
    return read - assigned


def _is_library(module: str | None) -> bool:
    """Whether a module is not the user's own: in the standard library, in an installed package or in this one."""
    package = (module or "").partition(".")[0]
    if package == "__main__":  # a notebook's or a script's, although its file may be that of a launcher
        return False
    if package in sys.stdlib_module_names or package == __name__.partition(".")[0]:
        return True
    path = getattr(sys.modules.get(module or ""), "__file__", None)
    return path is not None and not {"site-packages", "dist-packages"}.isdisjoint(Path(path).parts)


def _text(module: ModuleType) -> bytes:
    """The text of a module's file; nothing where there is none."""
    try:
        return Path(module.__file__ or "").read_bytes()
    except (OSError, AttributeError):
        return b""


def _type(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _hash(kind: str, *parts: str | bytes) -> bytes:
    """A digest of parts, each with its length, so that no two lists of parts give the same bytes."""
    state = hashlib.sha256(kind.encode())
    for part in parts:
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        state.update(len(content).to_bytes(8, "big"))
        state.update(content)
    return state.digest()
