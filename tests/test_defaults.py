"""The recipe that sets the defaults beside a grid."""

import json

import pytest

from aldrift_hf.trainer import cycles

KEY = ("learning_rate", "updates", "seed")


@pytest.mark.slow
def test_defaults_beside_a_grid(run_recipe, monkeypatch):
    monkeypatch.setattr(cycles, "ROWS_PER_DRAW", 1)
    monkeypatch.setattr(cycles, "FEWEST_UPDATES", 2)
    flags = {
        "problems": "trips", "budget": 70, "learning_rates": "1e-4 3e-3", "updates": "2 4", "ranks": 2, "seeds": "0 1",
        "prior_steps": 20,
    }  # fmt: skip
    folder = run_recipe("defaults", **flags)
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    grid = [run for run in runs if run["rank"]]
    ours = [run for run in runs if not run["rank"]]
    assert [(run["learning_rate"], run["updates"], run["seed"]) for run in ours] == [(0.0, 0, 0), (0.0, 0, 1)]
    best = min((run for run in grid if run["seed"] == 0), key=lambda run: run["kl"])
    assert len(grid) == 4 + 1, "the grid on the first seed, and the best setting on the second"
    assert [grid[-1][name] for name in KEY] == [*(best[name] for name in KEY[:-1]), 1]
    assert all(0 < run["calls"] <= 70 and run["kl"] > 0 for run in runs)
    ratio = sum(run["kl"] for run in ours) / (best["kl"] + grid[-1]["kl"])
    assert f"| {ratio:.2f} | {best['learning_rate']:g}, {best['updates']}, 2 |" in (folder / "defaults.md").read_text()
    run_recipe("defaults", **flags)
    assert len((folder / "runs.jsonl").read_text().splitlines()) == len(runs)


def test_an_unknown_problem_is_refused(run_recipe):
    with pytest.raises(SystemExit, match="--problems sudoku: choose from florentine, line, trips, binding"):
        run_recipe("defaults", problems="sudoku")
