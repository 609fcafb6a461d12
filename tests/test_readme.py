"""The README's example, executed as it stands."""

import re
from pathlib import Path

from aldrift_hf.testing import check_objective

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_custom_objective_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALDRIFT_CACHE", str(tmp_path / "cache"))
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {"__name__": "readme"}
    exec(compile(example, "README.md", "exec"), names)
    trainer = names["trainer"]
    first, last = trainer.progress.records[0], trainer.progress.records[-1]
    # Of six throws of a die, 462 in 46,656 never fall: 1 %.
    assert 0.002 < first["success"] < 0.03
    assert last["success"] > 10 * first["success"]
    assert names["samples"].num_rows == 8
    assert (tmp_path / "out" / "dice" / "adapter_model.safetensors").is_file()
    check_objective(names["cost"], ["1 2 3 4 5 6", "6 5 4 3 2 1"], objective_range=5.0)


def test_commands_are_those_that_ci_runs():
    """One line sets up and runs the main job, one sets up and passes the tests."""
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(lines) == 2
    assert lines[0].endswith("recipes/spanning_tree.py")
    assert lines[1].endswith(".venv/bin/pytest")
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_top_level_is_as_designed():
    kept = {"recipes", "aldrift_hf", "tests", "accelerate_configs", "pyproject.toml", "README.md", "LICENSE"}
    kept |= {"constraints.txt"}
    made = {"out", "build", "dist", "trainer_output", "aldrift_hf.egg-info"}
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert found - made == kept
