"""The README's commands, the excerpt of the algorithm, and the top level. Blocks and links: tests/test_docs.py."""

import re
from pathlib import Path

import aldrift_hf

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_commands_are_those_that_ci_runs():
    """One command sets up and runs the main job, one sets up and passes the tests."""
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(lines) == 2
    assert lines[0].endswith("recipes/spanning_tree.py")
    assert lines[1].endswith(".venv/bin/pytest")
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_a_run_shows_run_rung_as_it_is():
    """Line for line, to the end of the function."""
    (shown,) = re.findall(r"```text\n(    rung = .*?)```", (ROOT / "docs" / "runs.md").read_text(), re.DOTALL)
    source = Path(aldrift_hf.__file__).with_name("algorithm") / "rung.py"
    body = source.read_text().partition("def run_rung(")[2].partition("\n\n\n")[0]
    assert body.rpartition('"""\n')[2] == shown.rstrip("\n")


def test_every_room_has_its_row():
    """The table in CONTRIBUTING names every folder and file at the top of the package."""
    table = (
        (ROOT / ".github" / "CONTRIBUTING.md")
        .read_text()
        .partition("| room of `aldrift_hf/` | holds |")[2]
        .partition("\n\n")[0]
    )
    for path in Path(aldrift_hf.__file__).parent.iterdir():
        if not path.name.startswith("_") and path.name != "py.typed":
            assert f"`{path.name}{'/' * path.is_dir()}`" in table, path.name


def test_the_top_level_is_as_designed():
    kept = {"recipes", "aldrift_hf", "tests", "accelerate_configs", "pyproject.toml", "README.md", "LICENSE"}
    kept |= {"constraints.txt", "CHANGELOG.md", "CITATION.cff", "docs", "mkdocs.yml"}
    made = {"out", "build", "dist", "site", "trainer_output", "aldrift_hf.egg-info"}
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert found - made == kept
