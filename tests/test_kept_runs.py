"""Runs of a comparison that are kept in a file."""

import pytest
from evaluation.kept_runs import KeptRuns


def kept(folder, **settings):
    return KeptRuns(folder / "runs.jsonl", ("method", "seed"), settings)


def test_each_run_is_made_once(tmp_path):
    made = []
    for _ in range(2):
        runs = kept(tmp_path, budget=10)
        assert runs.get(("ours", 0), lambda method, seed: made.append(method) or {"kl": 0.5})["kl"] == 0.5
    assert made == ["ours"]
    with pytest.raises(SystemExit, match="budget = 10, not 20"):
        kept(tmp_path, budget=20).get(("ours", 0), pytest.fail)


def test_half_a_line_of_a_process_that_was_killed_is_left_out(tmp_path):
    for seed in (0, 1):
        kept(tmp_path).get(("ours", seed), lambda method, seed: {"kl": seed})
    file = tmp_path / "runs.jsonl"
    whole = file.read_text()
    assert whole.count("\n") == 2
    file.write_text(whole[:-5])
    runs = kept(tmp_path)
    assert [*runs.runs] == [("ours", 0)]
    runs.get(("ours", 1), lambda method, seed: {"kl": seed})
    assert file.read_text() == whole
