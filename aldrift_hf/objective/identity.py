"""What distinguishes the costs of one objective from those of another, where both are kept in the same folder.

A cost function is identified by what it computes with, all by content ([`aldrift_hf.content`]): its bytecode and
constants, defaults, closure and attributes, and the global names that it refers to, also those of modules of the
user's own (`settings.SCALE`). The same holds for the functions, classes, objects and containers found there: a
decorator and the function that it wraps, the arguments of a partial, the object that a method is bound to, the weights
of a model.

The text of the function's file is not part of the identity. With it, a change to an unrelated line, such as a setting
in a script that defines its cost and trains on it, would discard every cost; and it does not show that a global name
has another value.

What cannot be seen: files, services, names that are looked up at run time (`getattr`, an `import` inside a function),
and what the modules of installed packages refer to. `objective_cache_key` is the remedy.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Executor
from multiprocessing.managers import BaseManager, BaseProxy
from multiprocessing.pool import Pool
from multiprocessing.process import BaseProcess
from subprocess import Popen
from types import CodeType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import httpx
import torch
from datasets.fingerprint import Hasher
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from ..content import Content, Parts, hashed, type_name
from .names import Names, is_library, is_library_class, text_of
from .protocol import CostFunction


def identity_of(functions: Sequence[CostFunction], cache_key: str | None = None) -> str:
    """The identity of an objective: `cache_key` if given, otherwise a hash of the functions' content."""
    if cache_key is not None:
        return f"key:{cache_key}"
    return f"content:{_Computation().digest(list(functions)).hex()}"


class _Computation(Content):
    """Digests of functions, classes, modules and models by what they compute with, and of data by content."""

    def __init__(self) -> None:
        super().__init__()
        self._views: dict[tuple[int, frozenset[str]], _ModuleView] = {}

    def parts(self, value: Any) -> Parts:
        """A value as a header and parts."""
        if isinstance(value, CodeType):
            return _code(value)
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            return Parts(hashed("method"), [value.__func__, value.__self__])
        if isinstance(value, type):
            return _class(value)
        if isinstance(value, ModuleType):
            value = _ModuleView(value, frozenset())
        if isinstance(value, _ModuleView):
            return self._module(value)
        return _wrapper(value) or _model(value) or _other(value) or super().parts(value)

    def _function(self, function: FunctionType) -> Parts:
        compiled_from = getattr(function, "_torchdynamo_orig_callable", None)
        if compiled_from is not None:
            return Parts(hashed("function"), [compiled_from])
        if hasattr(function, "registry") and function.__globals__ is vars(functools):  # its cache changes in use
            return Parts(hashed("singledispatch"), [dict(function.registry)])
        cells: list[Any] = []
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # the variable has no value yet
                cells.append(cell.cell_contents)
        attributes = {name: value for name, value in vars(function).items() if name != "__signature__"}
        data: list[Any] = []
        if not is_library(function.__globals__.get("__name__")):
            names = Names.of(function.__code__)
            data = self._named(function.__globals__, names.read, names.all)
        defaults = [function.__defaults__, function.__kwdefaults__]
        return Parts(hashed("function"), [function.__code__, *defaults, cells, attributes, data])

    def _named(self, namespace: dict[str, Any], names: frozenset[str], attributes: frozenset[str]) -> list[Any]:
        """The values of names. Of a module, what code that mentions these attributes may read of it."""
        found = [(name, namespace[name]) for name in sorted(names & namespace.keys())]
        return [
            (name, self._view(value, attributes) if isinstance(value, ModuleType) else value) for name, value in found
        ]

    def _view(self, module: ModuleType, attributes: frozenset[str]) -> _ModuleView:
        return self._views.setdefault((id(module), attributes), _ModuleView(module, attributes))

    def _module(self, view: _ModuleView) -> Parts:
        """A library's module by name; a user's by its text and the attributes in question."""
        name = view.module.__name__
        if is_library(name):
            return Parts(hashed("module", name))
        return Parts(
            hashed("module", name, text_of(view.module)),
            self._named(vars(view.module), view.attributes, view.attributes),
        )


class _ModuleView:
    """A module as code sees it that mentions these names."""

    def __init__(self, module: ModuleType, attributes: frozenset[str]) -> None:
        self.module, self.attributes = module, attributes


def _code(code: CodeType) -> Parts:
    table = getattr(code, "co_exceptiontable", b"")  # from Python 3.11
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    return Parts(hashed("code"), [code.co_code, table, code.co_consts, names, counts])


def _class(cls: type) -> Parts:
    """A library's class by name; a user's by its own, its bases' and its metaclass's methods and attributes."""
    if is_library_class(cls):
        return Parts(hashed("class", cls.__module__, cls.__qualname__))
    members = {
        name: value
        for name, value in vars(cls).items()
        if not (name.startswith("__") and name.endswith("__")) or callable(value) or hasattr(type(value), "__get__")
    }
    return Parts(hashed("class", cls.__qualname__), [members, cls.__bases__, type(cls)])


def _wrapper(value: Any) -> Parts | None:
    """What wraps functions and is no function itself."""
    kind = hashed("wrapper", type_name(value))
    if isinstance(value, property):
        return Parts(kind, [value.fget, value.fset, value.fdel])
    if isinstance(value, (staticmethod, classmethod)):
        return Parts(kind, [value.__func__])
    if isinstance(value, functools._lru_cache_wrapper):
        return Parts(kind, [vars(value)])  # with the wrapped function
    if isinstance(value, GeneratorType):
        return Parts(kind, [value.gi_code, {} if value.gi_frame is None else value.gi_frame.f_locals])
    if isinstance(value, torch.jit.ScriptFunction):
        return Parts(kind, [value.code])
    return None


_MODULE_ATTRIBUTES = vars(nn.Module()).keys() - {"training"}
_HOOKS = sorted(name for name in _MODULE_ATTRIBUTES if name.endswith("_hooks"))
_WHERE_FROM = {"name_or_path", "_name_or_path", "warnings_issued", "_is_hf_initialized", "transformers_version"}
"""Of a model or its configuration: where it was loaded from, and what it has said. Neither changes what it computes."""


def _model(value: Any) -> Parts | None:
    """A model's class and settings, its weights, its hooks, and the modules within it."""
    if isinstance(value, (PretrainedConfig, GenerationConfig)):
        settings = {name: setting for name, setting in value.to_dict().items() if name not in _WHERE_FROM}
        return Parts(hashed("config"), [type(value), settings])
    if not isinstance(value, nn.Module):
        return None
    modules = dict(value._modules.items())
    if "_orig_mod" in modules:  # torch.compile
        return Parts(hashed("compiled"), [modules["_orig_mod"]])
    state = {name: part for name, part in vars(value).items() if name not in _MODULE_ATTRIBUTES | _WHERE_FROM}
    hooks = [list(vars(value).get(name, {}).values()) for name in _HOOKS]  # their keys count the hooks of the process
    weights = dict(value.named_parameters(recurse=False, remove_duplicate=False))
    buffers = dict(value.named_buffers(recurse=False, remove_duplicate=False))
    code = getattr(value, "code", None) if isinstance(value, torch.jit.ScriptModule) else None
    return Parts(hashed("model"), [type(value), state, hooks, weights, buffers, modules, code])


_WHILE_RUNNING = (
    *(asyncio.AbstractEventLoop, asyncio.Future, asyncio.Lock, asyncio.Semaphore, asyncio.Event, asyncio.Condition),
    *(asyncio.Queue, Executor, threading.Thread, Pool, BaseProcess, BaseManager, BaseProxy),
)
"""What holds the state of a process and changes no cost: the loop that a semaphore waits on, the threads or processes
of a pool, and what they share."""


def _other(value: Any) -> Parts | None:
    """Objects that pickle stores differently each time, or not at all."""
    if isinstance(value, torch.Generator):
        return Parts(hashed("generator", str(value.device)), [value.get_state()])
    if isinstance(value, weakref.ref):
        return Parts(hashed("weak"), [value()])
    if isinstance(value, (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)):
        return Parts(hashed("weak", type_name(value)))  # a cache
    if isinstance(value, (httpx.Client, httpx.AsyncClient)):
        return Parts(hashed("client", type_name(value)), [str(value.base_url), dict(value.headers)])
    if isinstance(value, _WHILE_RUNNING):
        return Parts(hashed("running", type_name(value)))
    if isinstance(value, Popen):  # a program that answers
        return Parts(hashed("running", type_name(value)), [value.args])
    package = type(value).__module__.partition(".")[0]
    if isinstance(value, PreTrainedTokenizerBase) or package in ("regex", "_regex", "spacy", "tiktoken"):
        return Parts(hashed("data", type_name(value), Hasher.hash(value)))
    return None
