"""From a name on the command line to a function of the user's own."""

from __future__ import annotations

import difflib
import importlib.util
import operator
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, cast


def load_function(name: str, option: str) -> Callable[..., Any]:
    """The function `MODULE:FUNCTION` or `FILE.py:FUNCTION`; a module may also be in the working directory.

    Args:
        name: of the function.
        option: that names it, for the message.

    Raises:
        ValueError: if the name is wrong; the message says which part. Errors inside the module are not caught.
    """
    source, colon, attribute = name.rpartition(":")
    if not colon or not source or not attribute:
        raise ValueError(f"{option} {name}: write MODULE:FUNCTION or FILE.py:FUNCTION")
    module = _load_file(source, option) if source.endswith(".py") else _load_module(source, option)
    try:
        function = operator.attrgetter(attribute)(module)
    except AttributeError:
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        similar = difflib.get_close_matches(attribute, known, n=1)
        hint = f"did you mean {similar[0]}?" if similar else f"its functions: {', '.join(known) or 'none'}."
        raise ValueError(f"{option} {name}: {source} has no function {attribute!r}; {hint}") from None
    if not callable(function):
        raise ValueError(f"{option} {name}: {attribute} is not a function, but {type(function).__name__}")
    return cast(Callable[..., Any], function)


def _load_file(path: str, option: str) -> ModuleType:
    """Import a file, under a unique name where another module has its own: a `random.py` does not replace `random`."""
    if not os.path.isfile(path):
        raise ValueError(f"{option} {path}: there is no such file")
    stem = Path(path).stem
    if (beside := str(Path(path).resolve().parent)) not in sys.path:
        sys.path.append(beside)  # last, so that its modules hide no others
    if stem.isidentifier() and stem != "__main__" and _is_file(importlib.util.find_spec(stem), path):
        return importlib.import_module(stem)  # which processes of a pool can import, too
    spec = importlib.util.spec_from_file_location(f"{option.lstrip('-')}:{stem}", path)
    module = importlib.util.module_from_spec(cast(Any, spec))
    sys.modules[module.__name__] = module
    cast(Any, spec).loader.exec_module(module)
    return module


def _is_file(spec: ModuleSpec | None, path: str) -> bool:
    return spec is not None and spec.has_location and Path(str(spec.origin)).resolve() == Path(path).resolve()


def _load_module(name: str, option: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module exists, and one that it imports does not
        raise ValueError(
            f"{option} {name}: there is no module {error.name!r}, neither installed nor in {os.getcwd()}"
        ) from None
