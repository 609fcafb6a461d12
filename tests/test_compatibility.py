"""What an upgrade may break: the oldest and newest allowed versions, and everything that is not a public interface.

A release that moves a name or renames a method fails here, by name. Some of it would fail nowhere else: a method that
no longer overrides anything is simply never called.
"""

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import Trainer, TrainerCallback

import aldrift_hf
from aldrift_hf import ALDRIFTConfig, ALDRIFTTrainer, RunCallback
from aldrift_hf.models import _trl
from aldrift_hf.reporting.defaults import default_callbacks
from aldrift_hf.trainer.loop import RungLoop

ROOT = Path(__file__).parents[1]

# ---- Versions --------------------------------------------------------------------------------------------------------

PROJECT = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def floors(*extras: str) -> dict[str, Version]:
    """Of the dependencies and of the extras, by name."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    bounds = {}
    for requirement in map(Requirement, lines):
        if requirement.name != "aldrift_hf":  # extras of its own
            (bound,) = requirement.specifier
            assert bound.operator == ">=", f"{requirement}: one lower bound, which both environments try"
            bounds[canonical(requirement.name)] = Version(bound.version)
    return bounds


def pins(path: str) -> dict[str, Version]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / path).read_text().splitlines()]
    return {canonical(name): Version(version) for name, version in (line.split("==") for line in lines if line)}


def test_the_oldest_versions_are_the_lower_bounds():
    """CI's second environment has exactly the lower bounds, but for torch's, which is tried by hand."""
    bounds = floors("recipes", "quantization", "gguf", "test")
    oldest = pins(".ci/oldest.txt")
    assert oldest.pop("torch") > bounds.pop("torch")
    assert oldest == bounds


def test_the_newest_versions_are_allowed():
    newest = pins("constraints.txt")
    for name, bound in floors("recipes", "quantization", "gguf", "test", "docs").items():
        assert newest[name] >= bound, name


# ---- Names -----------------------------------------------------------------------------------------------------------

FILES = sorted(path for folder in ("aldrift_hf", "recipes", "tests") for path in (ROOT / folder).rglob("*.py"))


def imports(source: str, package: str) -> Iterator[tuple[str, str]]:
    """Module and name of each import from a package, also of those within functions; no name for a whole module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == package:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == package)


def is_there(module: str, name: str) -> bool:
    try:
        exec(f"from {module} import {name}" if name else f"import {module}", {})
    except ImportError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("package", ["transformers", "trl"])
def test_imports_are_there(package):
    found = {pair for path in FILES for pair in imports(path.read_text(), package)}
    assert len(found) > 5
    missing = sorted(f"{module}.{name}" for module, name in found if not is_there(module, name))
    assert not missing, f"{package} {importlib.import_module(package).__version__} has no {', '.join(missing)}"


def test_imports_are_found():
    source = "import trl.a, os\nfrom trl import b\nfrom trlx import c\ndef f():\n    from trl.d import e"
    assert set(imports(source, "trl")) == {("trl.a", ""), ("trl", "b"), ("trl.d", "e")}
    assert is_there("trl", "TrlParser")
    assert not is_there("trl", "NoSuchName")
    assert not is_there("trl.no_such_module", "")


@pytest.mark.slow
def test_one_file_goes_beyond_trls_top_level():
    beyond = [path for path in FILES if any(module != "trl" for module, _ in imports(path.read_text(), "trl"))]
    assert [str(path.relative_to(ROOT)) for path in beyond] == ["aldrift_hf/models/_trl.py"]


def test_that_file_fits_the_installed_trl():
    """The installed TRL takes the arguments that it is called with; it is for ZeRO-3, of which DeepSpeed has a test."""
    assert _trl.__all__ == ["add_hooks", "remove_hooks"]
    for name in _trl.__all__:
        inspect.signature(getattr(_trl, name)).bind("model")


# What is used of Transformers below its top level. It may be used, but it must be known.
TRANSFORMERS = {
    "cache_utils": {"DynamicLayer", "DynamicSlidingWindowLayer"},
    "modeling_outputs": {"CausalLMOutputWithPast"},
    "trainer": {"DEFAULT_PROGRESS_CALLBACK", "TRAINER_STATE_NAME"},
    "trainer_utils": {
        *("SchedulerType", "TrainOutput", "get_last_checkpoint", "rotate_checkpoints", "sort_checkpoints"),
    },
    "trainer_jit_checkpoint": {"CheckpointManager", "JITCheckpointCallback"},
    "utils.peft_utils": {"find_adapter_config_file"},
}


def test_what_lies_deeper_in_transformers():
    package = [path for path in FILES if (ROOT / "tests") not in path.parents]
    deeper: dict[str, set[str]] = {}
    for module, name in (pair for path in package for pair in imports(path.read_text(), "transformers")):
        if module != "transformers":
            deeper.setdefault(module.removeprefix("transformers."), set()).add(name)
    assert deeper == TRANSFORMERS


# ---- Methods that the Trainer calls ----------------------------------------------------------------------------------

# The Trainer's that are overridden. The first few are private to it.
PRIVATE = {"_get_output_dir", "_get_train_sampler", "_load_from_checkpoint", "_push_from_checkpoint", "_save"}
PRIVATE |= {"_determine_best_metric", "_load_best_model", "_save_checkpoint"}
PUBLIC = {"compute_loss", "create_model_card", "create_scheduler", "evaluate", "init_hf_repo", "push_to_hub", "train"}
PUBLIC |= {"hyperparameter_search", "predict", "training_step"}


def ours() -> dict[str, type]:
    """Methods of ALDRIFTTrainer, and the class that has each."""
    classes = [cls for cls in reversed(ALDRIFTTrainer.__mro__) if cls.__module__.startswith("aldrift_hf.")]
    return {name: cls for cls in classes for name, value in vars(cls).items() if inspect.isfunction(value)}


def test_what_is_overridden_is_there():
    theirs = {name for name in ours() if hasattr(Trainer, name)} - {"__init__"}
    gone, new = (PRIVATE | PUBLIC) - theirs, theirs - PRIVATE - PUBLIC
    assert not gone, f"Transformers {transformers.__version__}'s Trainer has no {sorted(gone)}: ours are never called"
    assert not new, f"Transformers {transformers.__version__}'s Trainer has {sorted(new)} too: override, or rename ours"


@pytest.mark.parametrize("name", sorted(PRIVATE | {"create_scheduler", "evaluate", "training_step"}))
def test_overrides_take_what_the_trainer_hands_them(name):
    theirs = inspect.signature(getattr(Trainer, name)).parameters
    assert list(inspect.signature(getattr(ALDRIFTTrainer, name)).parameters) == list(theirs)


def subclasses(cls: type) -> set[type]:
    return {each for sub in cls.__subclasses__() for each in (sub, *subclasses(sub))}


def test_callbacks_wait_for_events_that_come():
    """The Trainer's, and those that this trainer tells a `RunCallback`."""
    for module in pkgutil.walk_packages(aldrift_hf.__path__, "aldrift_hf."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    callbacks = {cls for cls in subclasses(TrainerCallback) if cls.__module__.startswith("aldrift_hf.")}
    assert {
        RunCallback,
        RungLoop,
        *map(type, default_callbacks(ALDRIFTConfig(report_to="none", log_completions=True))),
    } <= callbacks
    events = {name for cls in callbacks - {RunCallback} for name in vars(cls) if name.startswith("on_")}
    own = {name for name in vars(RunCallback) if name.startswith("on_")}
    assert events
    assert own
    assert events <= set(vars(TrainerCallback)) | own
    assert not own & set(vars(TrainerCallback)), "the Trainer would call it, with other arguments"
    trainer = "".join(path.read_text() for path in (ROOT / "aldrift_hf" / "trainer").glob("*.py"))
    assert all(f'"{name}"' in trainer for name in own), "an event that is never told"
