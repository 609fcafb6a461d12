"""The package's types as a user's type checker sees them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = """
[mypy]
strict = true

# The example is checked, against our types; following these into torch would take minutes.
[mypy-accelerate.*,datasets.*,huggingface_hub.*,matplotlib.*,numpy.*,peft.*,rich.*,safetensors.*,scipy.*,tokenizers.*]
follow_imports = skip
[mypy-torch.*,transformers.*,trl.*]
follow_imports = skip

[mypy-aldrift_hf.*]
follow_imports = silent
"""


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """mypy's output for a user's file."""
    pytest.importorskip("mypy")
    folder = tmp_path_factory.mktemp("typed")
    (folder / "mypy.ini").write_text(SETTINGS)

    def run(source: str) -> str:
        (folder / "example.py").write_text(source)
        command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "example.py"]
        environment = {**os.environ, "MYPYPATH": str(ROOT)}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200).stdout

    return run


@pytest.mark.slow
def test_the_readmes_example(check):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert check(example) == "Success: no issues found in 1 source file\n"
    for right, wrong in (
        ("tau_max=10", 'tau_max="10"'),
        ("objective=cost", "objective=3"),
        ("sample(3)", 'sample("3")'),
    ):
        found = check(example.replace(right, wrong))
        assert re.search(r"error: .*\[arg-type\]\nFound 1 error", found), found
