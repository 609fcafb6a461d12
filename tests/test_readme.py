"""The README's commands, and the top level. Its blocks and links: tests/test_docs.py."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


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
