"""The names that a function refers to, and which modules are a user's own."""

from __future__ import annotations

import dis
import os
import sys
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple

_OWN = __name__.partition(".")[0]
_STANDARD_LIBRARY = Path(os.__file__).parent
_HEAP_TYPE = 1 << 9
"""The flag of classes that are made at run time, unlike those built into the interpreter."""


class Names(NamedTuple):
    """Names in a function's code, its inner functions included.

    Attributes:
        read: the global names that it reads, except those that it assigns itself: a name that a function assigns, such
            as a counter of its calls, is not what a cost depends on.
        all: these, and the names of attributes.
    """

    read: frozenset[str]
    all: frozenset[str]

    @classmethod
    def of(cls, code: CodeType) -> Names:
        """The names in a function's code."""
        read: set[str] = set()
        assigned: set[str] = set()
        mentioned: set[str] = set()
        codes = [code]
        while codes:
            code = codes.pop()
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
            mentioned.update(code.co_names)
            for instruction in dis.get_instructions(code):
                if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
                    read.add(instruction.argval)
                elif instruction.opname == "STORE_GLOBAL":
                    assigned.add(instruction.argval)
        return cls(frozenset(read - assigned), frozenset(mentioned))


def is_library(module: str | None) -> bool:
    """Whether a module is not the user's own: in the standard library, in an installed package or in this one."""
    package = (module or "").partition(".")[0]
    if package == "__main__":  # a notebook's or a script's, although its file may be that of a launcher
        return False
    if package == _OWN:
        return True
    path = getattr(sys.modules.get(module or ""), "__file__", None)
    if path is None:
        return package in sys.stdlib_module_names
    installed = not {"site-packages", "dist-packages"}.isdisjoint(Path(path).parts)
    return installed or Path(path).is_relative_to(_STANDARD_LIBRARY)


def is_library_class(cls: type) -> bool:
    """Whether a class is one of a library's: the one that its name stands for there.

    A class that a library makes for the user (`make_dataclass`), or that code without a module defines, is not.
    """
    if not is_library(cls.__module__):
        return False
    if not cls.__flags__ & _HEAP_TYPE:
        return True
    found: object = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is cls


def text_of(module: ModuleType) -> bytes:
    """The text of a module's file; nothing where there is none."""
    try:
        return Path(module.__file__ or "").read_bytes()
    except (OSError, AttributeError):
        return b""
