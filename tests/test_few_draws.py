"""The recipe on log Z of few draws."""

import json

import many_prompts
import pytest
from problems import digit_sums


@pytest.mark.slow
def test_the_bias_is_told_from_the_error(run_recipe, monkeypatch):
    monkeypatch.setattr(digit_sums, "NUM_PROMPTS", 12)
    monkeypatch.setattr(many_prompts, "RUNGS", 2)
    monkeypatch.setattr(many_prompts.MODEL, "prior_steps", 20)
    flags = {"draws": "4 500", "updates": 1, "seeds": 0}
    folder = run_recipe("few_draws", **flags)
    lines = (folder / "runs.jsonl").read_text()
    runs = {(run["estimate"], run["draws"]): run for run in map(json.loads, lines.splitlines())}
    assert len(runs) == 3 * 2
    for draws in (4, 500):
        plain, less, exact = (runs[name, draws] for name in ("mean weight", "less its bias", "exact"))
        assert less["bias_1"] - plain["bias_1"] == pytest.approx(plain["stated_1"] ** 2 / 2)
        assert exact["bias_1"] == plain["bias_1"], "what is told is how far the estimate was, which nobody used"
        assert exact["seen"] != plain["seen"]
    most = runs["mean weight", 500]
    assert most["rms_1"] < 1.0, "the exact log Z is that of the prompt"
    assert abs(most["bias_1"]) < 0.4
    assert "| 4 draws, exact |  |" in (folder / "few_draws.md").read_text()
    run_recipe("few_draws", **flags)
    assert (folder / "runs.jsonl").read_text() == lines
