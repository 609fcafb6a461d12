"""Which module may import which: imports point one way, there are no cycles, and nothing heavy is imported early."""

import ast
import graphlib
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import aldrift_hf

ROOT = Path(__file__).parents[1]
PACKAGE = "aldrift_hf"

# ---- The allowed directions ------------------------------------------------------------------------------------------

DATA = {"types", "streams"}
BELOW_TRAINER = DATA | {"content", "algorithm", "models", "objective", "reporting"}
ALLOWED = {
    "types": set(),
    "streams": set(),
    "content": set(),
    "command_line": set(),
    "algorithm": DATA,
    "models": DATA | {"content"},
    "objective": DATA | {"content"},
    "reporting": {"types", "algorithm"},  # it reads records, never a trainer and never a model
    "trainer": BELOW_TRAINER,
    "toy": BELOW_TRAINER | {"trainer"},
    "selftest": BELOW_TRAINER | {"trainer", "toy", "command_line"},
    "cli": BELOW_TRAINER | {"trainer", "toy", "command_line", "selftest"},
}
"""What the modules of each room (a folder, or a file at the top) may import of the package, beside their own room."""

PURE = ("types", "streams", "algorithm")
PURE_THIRD_PARTIES = {"torch", "numpy", "scipy"}
"""All that the modules in `PURE` may import from outside of the package and the standard library."""

RECIPES = {"problems": set(), "evaluation": {"problems"}}
"""The same for the folders in recipes/; both may import the package."""


class Import(NamedTuple):
    """One import statement's module, absolute."""

    line: int
    module: str


def imports(source: str, module: str, is_package: bool, known: set[str]) -> Iterator[Import]:
    """All imports in a module's source, wherever they stand; `from a import b` is of `a.b` where that is a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            source_module = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                submodule = f"{source_module}.{alias.name}"
                yield Import(node.lineno, submodule if submodule in known else source_module)


def files(folder: Path, prefix: str) -> dict[str, Path]:
    """Modules below a folder, by their dotted names, which begin with `prefix`."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = [prefix, *path.relative_to(folder).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = files(ROOT / PACKAGE, PACKAGE)
EXPERIMENTS = {name: path for room in RECIPES for name, path in files(ROOT / "recipes" / room, room).items()}
KNOWN = {*MODULES, *EXPERIMENTS}


def imports_of(module: str, path: Path) -> list[Import]:
    return list(imports(path.read_text(), module, path.name == "__init__.py", KNOWN))


def room(module: str) -> str:
    """The room of one of the package's modules; empty for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def forbidden(module: str, found: list[Import], where: object = "") -> list[str]:
    """What is wrong with the imports of one of the package's modules."""
    wrong = []
    for line, target in found:
        top = target.split(".")[0]
        if top == PACKAGE:
            if module != PACKAGE and room(target) not in ALLOWED[room(module)] | {room(module)}:
                wrong.append(f"{where}:{line}: {room(module)} must not import {target}")
        elif top in RECIPES or (ROOT / "recipes" / f"{top}.py").is_file():
            wrong.append(f"{where}:{line}: the package must not import from recipes, as {target}")
        elif room(module) in PURE and top not in PURE_THIRD_PARTIES | sys.stdlib_module_names:
            wrong.append(f"{where}:{line}: {room(module)} must not import {target}")
    return wrong


def test_imports_point_one_way():
    wrong = [
        message
        for module, path in MODULES.items()
        for message in forbidden(module, imports_of(module, path), path.relative_to(ROOT))
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_room_has_its_row_in_the_table():
    assert {room(module) for module in MODULES} - {""} == set(ALLOWED)


def test_no_module_imports_itself_in_a_circle():
    graph = {module: edges(module, [target for _, target in imports_of(module, MODULES[module])]) for module in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" is imported by ".join(error.args[1]))


def edges(module: str, targets: list[str]) -> set[str]:
    """Modules of the package that are run when `module` is imported, directly."""
    run = set()
    for target in targets:
        if target.split(".")[0] != PACKAGE:
            continue
        run.add(target)
        parents = target.split(".")[1:-1]
        folders = [".".join([PACKAGE, *parents[: depth + 1]]) for depth in range(len(parents))]
        run |= {folder for folder in folders if module != folder and not module.startswith(f"{folder}.")}
    return run


def test_experiments_beside_the_recipes():
    wrong = []
    for module, path in EXPERIMENTS.items():
        own = module.split(".")[0]
        for line, target in imports_of(module, path):
            top = target.split(".")[0]
            recipe = top not in RECIPES and (ROOT / "recipes" / f"{top}.py").is_file()
            if recipe or (top in RECIPES and top not in RECIPES[own] | {own}):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {own} must not import {target}")
    assert len(EXPERIMENTS) > 10
    assert not wrong, "\n" + "\n".join(wrong)


SOURCE = """
from __future__ import annotations
import json, torch
from typing import TYPE_CHECKING
from . import pareto
from .. import streams
from ..types import Proposals
from ..trainer.config import ALDRIFTConfig
if TYPE_CHECKING:
    from aldrift_hf.models import prior
def late():
    import transformers
    from problems.spanning_tree import load_problem
"""


def test_imports_that_point_elsewhere_are_found():
    found = list(imports(SOURCE, "aldrift_hf.algorithm.metrics", False, KNOWN | {"aldrift_hf.algorithm.pareto"}))
    assert {target for _, target in found} >= {"aldrift_hf.algorithm.pareto", "aldrift_hf.streams", "aldrift_hf.types"}
    assert forbidden("aldrift_hf.algorithm.metrics", found, "metrics.py") == [
        "metrics.py:8: algorithm must not import aldrift_hf.trainer.config",
        "metrics.py:10: algorithm must not import aldrift_hf.models.prior",
        "metrics.py:12: algorithm must not import transformers",
        "metrics.py:13: the package must not import from recipes, as problems.spanning_tree",
    ]
    package = imports("from . import a\nfrom .b import c\nfrom ..d import e", "x.y", True, {"x.y.a"})
    assert [target for _, target in package] == ["x.y.a", "x.y.b", "x.d"]
    assert edges("aldrift_hf.models.generation", ["aldrift_hf.models.engines.base"]) == {
        "aldrift_hf.models.engines",
        "aldrift_hf.models.engines.base",
    }
    assert edges("aldrift_hf.models.engines.base", ["aldrift_hf.models.engines.x"]) == {"aldrift_hf.models.engines.x"}


# ---- What is imported, and when --------------------------------------------------------------------------------------

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy", "rich", "yaml")


@pytest.mark.parametrize(
    "program",
    [
        "import aldrift_hf; dir(aldrift_hf); aldrift_hf.__version__",
        "from aldrift_hf.cli import main; main(['--help'])",
        "import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_module('aldrift_hf.cli', run_name='__main__')",
    ],
    ids=["import", "aldrift --help", "python -m aldrift_hf.cli --help"],
)
def test_nothing_heavy_is_imported_before_it_is_needed(program):
    told = f"{program}\nimport sys\nprint('loaded:', *({{*{HEAVY}}} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_every_exported_name_is_there():
    """By attribute, from the module that the table names, and for type checkers."""
    tree = ast.parse(Path(aldrift_hf.__file__).read_text())
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name))
    typed = {alias.name: f"{PACKAGE}.{node.module}" for node in guarded.body for alias in node.names}
    assert sorted(aldrift_hf.__all__) == sorted(typed)
    assert {*aldrift_hf.__all__, "__version__"} <= {*dir(aldrift_hf)}
    for name, module in typed.items():
        assert getattr(aldrift_hf, name) is getattr(importlib.import_module(module), name)
        assert aldrift_hf._MODULES[name] == module.removeprefix(f"{PACKAGE}.")
    with pytest.raises(AttributeError, match="module 'aldrift_hf' has no attribute 'ALDRIFTTrianer'"):
        aldrift_hf.ALDRIFTTrianer
