"""The recipes at a small size: they write tables and figures, runs resume, and printed statements are true."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from evaluation.tables import Comparison

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[1] / "recipes"
QUIET = ("--use_cpu", "--disable_tqdm", "True")
TINY = {
    "prior_steps": 60,
    "num_generations": 96,
    "chain_length": 3,
    "updates_per_rung": 4,
    "per_device_train_batch_size": 16,
    "per_device_generation_batch_size": 128,
}
LINE = {**TINY, "stations": 3, "longest_visit": 6, "headway": 3, "tau_max": 1, "tau_step": 0.5, "draws": 200}
TREES = {**TINY, "graph": "random:6,0.5", "tau_step": 3}
CLUSTERS = {**TINY, "points": 9, "tau_max": 0.2, "tau_step": 0.1, "draws": 100}


def records(folder):
    """The records of the rungs, without the times, which differ between equal runs."""
    rungs = [json.loads(line) for line in (folder / "rungs.jsonl").read_text().splitlines()]
    return [{key: value for key, value in rung.items() if not key.startswith("seconds")} for rung in rungs]


def check_report(folder, name, out, *rows):
    """There is a table on the terminal and in Markdown, and a figure."""
    markdown = (folder / f"{name}.md").read_text()
    for row in rows:
        assert row in markdown, row
    assert "┃" in out
    assert (folder / f"{name}.png").stat().st_size > 10_000


def test_line_scheduling(run_recipe, capsys):
    folder = run_recipe("line_scheduling", *QUIET, **LINE)
    out = " ".join(capsys.readouterr().out.split())
    check_report(
        folder, "line_scheduling", out, "| prior | model | corrected | exact p_T |", "mean wait", "KL(exact p_T"
    )
    assert "preference for longer visits" in out
    assert "missing mass: " in out
    assert records(folder)[-1]["tau"] == 1


def test_line_scheduling_with_topift(run_recipe, capsys):
    """By default the paper's setting: the 4 best of 12 proposals per round."""
    settings = {key: value for key, value in LINE.items() if key not in TINY} | {"prior_steps": 60}
    folder = run_recipe("line_scheduling", *QUIET, "--sampler", "top", **settings)
    out = capsys.readouterr().out
    check_report(folder, "line_scheduling", out, "| prior | model | exact p_T |")
    assert records(folder)[0]["proposals"] == 12
    assert records(folder)[0]["acceptance_rate"] is None


def test_line_scheduling_resumed(run_recipe, capsys):
    alone = records(run_recipe("line_scheduling", *QUIET, **LINE))
    table = capsys.readouterr().out.partition("draws each")[2]
    assert records(run_recipe("line_scheduling", *QUIET, "--resume_from_checkpoint", "True", **LINE)) == alone
    assert capsys.readouterr().out.partition("draws each")[2] == table


def test_clustering(run_recipe, capsys):
    folder = run_recipe("clustering", *QUIET, **CLUSTERS)
    out = capsys.readouterr().out
    check_report(folder, "clustering", out, "| prior | model | corrected | k-means |", "must-links kept", "Rand index")


def test_correction_ablation(run_recipe, capsys):
    folder = run_recipe("correction_ablation", *QUIET, **TREES)
    out = " ".join(capsys.readouterr().out.split())
    check_report(folder, "correction_ablation", out, "| metropolis_hastings | reweight | top |", "τ = 6 (last)")
    assert "KL of reweight minus KL of metropolis_hastings:" in out
    runs = {sampler: records(folder / sampler) for sampler in ("metropolis_hastings", "reweight", "top")}
    first = [run[0] for run in runs.values()]
    assert len({entry["objective_mean"] for entry in first}) == 1, "all have the same first proposals"
    assert len({entry["exact_kl"] for entry in first}) == 3, "and choose different samples among them"
    assert all(entry["exact_kl"] >= 0 for run in runs.values() for entry in run)


def test_exact_distances_without_learning(run_recipe):
    """With a learning rate of 0 the model stays the prior: KL(p_τ‖L) = -τ·E_p[d] - log Z grows, its cost does not."""
    folder = run_recipe("correction_ablation", *QUIET, **{**TREES, "learning_rate": 0})
    first, last = records(folder / "reweight")
    assert first["exact_cost"] == last["exact_cost"] == pytest.approx(first["objective_mean"], abs=0.3)
    assert last["exact_kl"] > first["exact_kl"] > 0
    # p_τ/L is largest where the cost is least, and there it is 1/Z.
    assert last["exact_coverage"] == pytest.approx(-np.log(last["exact_success"]), abs=0.1)


def test_correction_ablation_resumed(run_recipe):
    """Finished runs are not repeated: even the times in their records are those of the first run."""
    folder = run_recipe("correction_ablation", *QUIET, **TREES)
    alone = {path: path.read_text() for path in folder.glob("*/rungs.jsonl")}
    assert len(alone) == 3
    run_recipe("correction_ablation", *QUIET, "--resume_from_checkpoint", "True", **TREES)
    assert {path: path.read_text() for path in folder.glob("*/rungs.jsonl")} == alone


def test_correction_ablation_resumed_from_a_rungs_last_update(run_recipe):
    """Such a checkpoint was written before the exact distances of the rung were measured."""
    steps = ("--save_strategy", "steps", "--save_steps", "4")
    folder = run_recipe("correction_ablation", *QUIET, *steps, **TREES)
    alone = {path.parent.name: records(path.parent) for path in folder.glob("*/rungs.jsonl")}
    shutil.rmtree(folder / "top" / "checkpoint-8")  # as if this run had been interrupted after its first rung
    run_recipe("correction_ablation", *QUIET, *steps, "--resume_from_checkpoint", "True", **TREES)
    assert {path.parent.name: records(path.parent) for path in folder.glob("*/rungs.jsonl")} == alone


def test_correction_ablation_within_a_budget(run_recipe, capsys):
    """The samplers reach the limit after different numbers of rungs; the rungs that all have are compared."""
    run_recipe("correction_ablation", *QUIET, "--max_objective_calls", "20", **{**TREES, "tau_step": 1})
    assert "KL(p_τ || L_τ), nats, τ = 1" in capsys.readouterr().out


def test_clustering_without_hints(run_recipe):
    folder = run_recipe("clustering", *QUIET, **{**CLUSTERS, "must_link_share": 0, "clusters": 2, "data": "wine"})
    assert "must-links" not in (folder / "clustering.md").read_text()


def test_line_scheduling_without_a_preference(run_recipe, capsys):
    folder = run_recipe("line_scheduling", *QUIET, **{**LINE, "stations": 1, "longest_visit": 9})
    assert "preference" not in (folder / "line_scheduling.md").read_text()
    assert "nan" not in capsys.readouterr().out.partition("draws each")[2]


def test_ladder_stress(run_recipe, capsys):
    settings = {**TREES, "steps": "1 4", "proposals": 400, "updates": 12}
    del settings["tau_step"], settings["num_generations"], settings["updates_per_rung"]
    folder = run_recipe("ladder_stress", *QUIET, **settings)
    out = " ".join(capsys.readouterr().out.split())
    check_report(folder, "ladder_stress", out, "| 1/D | 4/D |", "KL(p_T", "k-hat")
    assert "closest to p_T: steps of" in out
    fine, coarse = records(folder / "step-1"), records(folder / "step-4")
    assert len(fine) == pytest.approx(4 * len(coarse), abs=3)
    assert 300 <= fine[-1]["proposals"] <= 400
    assert 300 <= coarse[-1]["proposals"] <= 400


def test_coverage(run_recipe, capsys):
    settings = {"graph": "random:7,0.5", "samples": "4 64", "doublings": 4, "prior_steps": 60}
    folder = run_recipe("coverage", *QUIET, **settings, per_device_train_batch_size=16)
    out = " ".join(capsys.readouterr().out.split())
    check_report(folder, "coverage", out, "| 5 | 10 | 20 | 40 | 80 |", "m = 4", "m = 64")
    assert out.count("sup p/L is smallest") == 2
    table = (folder / "coverage.md").read_text()
    saved = {path: path.stat().st_mtime_ns for path in folder.glob("*/checkpoint-80/adapter_model.safetensors")}
    assert len(saved) == 2
    run_recipe("coverage", *QUIET, "--resume_from_checkpoint", "True", **settings, per_device_train_batch_size=16)
    assert (folder / "coverage.md").read_text() == table
    assert {path: path.stat().st_mtime_ns for path in saved} == saved, "nothing was trained again"


def test_custom_objective(tmp_path, monkeypatch):
    """The recipe as it is, in its own process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ALDRIFT_CACHE", str(tmp_path / "cache"))
    source = (RECIPES / "custom_objective.py").read_text()
    assert len(source.splitlines()) <= 60
    done = subprocess.run(
        [sys.executable, str(RECIPES / "custom_objective.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    trips = [line for line in done.stdout.splitlines() if line.startswith("from ")]
    assert len(trips) == 8
    lengths = [float(line.split()[2]) for line in trips]
    # By brute force over the 5,040 round trips: 10.58 thousand kilometres on average, 7.65 under p_T, at least 6.43.
    assert max(lengths) < 8.3
    assert all("6.43 by" in line for line in trips)
    assert (tmp_path / "out" / "custom_objective" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("line_scheduling", {"stations": 0}, "the line: stations must be at least 1"),
        ("clustering", {"data": "penguins"}, "the problem: there is no data set 'penguins'"),
        ("correction_ablation", {"graph": "petersen"}, "--graph: there is no graph"),
        ("correction_ablation", {"graph": "karate"}, "take a smaller graph"),
        ("ladder_stress", {"steps": "0"}, "--steps must be whole numbers of at least 1"),
        ("coverage", {"graph": "petersen"}, "--graph: there is no graph"),
        ("coverage", {"graph": "karate"}, "take a smaller graph"),
        ("coverage", {"samples": "0"}, "--samples must be at least 1"),
        ("ladder_stress", {"ladder": "adaptive"}, "--ladder must be linear: this recipe varies its steps"),
        ("line_scheduling", {"num_generations": "0"}, "num_generations must be between 1 and"),
    ],
)
def test_bad_problems_are_one_clear_line(run_recipe, name, settings, message):
    with pytest.raises((SystemExit, ValueError), match=message):
        run_recipe(name, *QUIET, **settings)


@pytest.mark.parametrize("in_4bit", [False, True])
def test_large_model(run_recipe, in_4bit):
    """On a CPU, a small one: each stage has its figures, and weights in 4 bits leave no file behind."""
    settings = {"shape": "tiny", "load_in_4bit": in_4bit, "proposals": 32, "tokens": 8, "batch_size": 2}
    folder = run_recipe("large_model", **settings)
    rows = (folder / f"large_model_tiny_{'NF4' if in_4bit else 'bf16'}.md").read_text().splitlines()[4:]
    figures = {row[0]: row[1:] for row in ([cell.strip() for cell in line.split("|")[1:-1]] for line in rows)}
    assert [*figures] == ["weights and adapter", "drawing and scoring", "learning", "drawing", "scoring"]
    assert all(float(cell) > 0 for row in figures.values() for cell in row if cell)
    on_paper, measured, _ = figures["weights and adapter"]
    assert on_paper == measured
    assert not (folder / "weights").exists()


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.py") if path.stem != "custom_objective"))
def test_help_explains_every_option(run_recipe, capsys, name):
    with pytest.raises(SystemExit):
        run_recipe(name, "--help")
    text = capsys.readouterr().out
    own = {  # the other recipes have all options of ALDRIFT and TRL
        "coarse_learnability": (),  # theory without a model
        "speed": ("--sizes", "--rungs", "--mean_length"),
        "long_prompts": ("--lengths", "--proposals", "--proposals_apart"),
        "long_completions": ("--lengths", "--models", "--draws", "--chains"),
        "large_model": ("--shape", "--load_in_4bit", "--tokens", "--batch_size"),
        "memory": ("--limits_gib", "--ways", "--max_completion_length"),
        "engines": ("--engines", "--dtypes", "--lengths", "--draws", "--adapter", "--output_dir"),
        "steer_text": ("--tasks", "--make_gold", "--gold_dir", "--run", "--calls", "--learning_rates", "--aldrift"),
        "external_objective": (
            "--processes",
            "--timeout",
            "--outages",
            "--tau_max",
            "--num_generations",
            "--learning_rate",
        ),
        "many_prompts": ("--methods", "--draws", "--prompts_per_rung", "--learning_rates", "--prompts_per_update"),
        "few_draws": ("--draws", "--seeds", "--updates", "--learning_rate"),
        "kl_in_seconds": ("--problem", "--methods", "--seconds", "--rungs", "--calls", "--lora_r", "--prior_steps"),
        "defaults": ("--problems", "--learning_rates", "--updates", "--ranks", "--seeds"),
        "binding_sites": ("--factors", "--methods", "--budget", "--populations", "--mutations", "--thresholds"),
        "ehrlich": ("--functions", "--budgets", "--methods", "--tau_max", "--populations", "--seeds"),
        "molecules": ("--objectives", "--objective", "--methods", "--budget", "--tau_maxes", "--prior_width"),
        "many_modes": ("--tasks", "--methods", "--budget", "--tau_maxes", "--prompt_steps", "--seeds"),
        "prompt_scaling": ("--prompts", "--all_up_to", "--prompts_per_rung", "--rungs"),
        "benchmark": ("--methods", "--budgets", "--learning_rates", "--lora_r", "--prior_steps"),
    }
    all_of_them = ("--tau_max", "--num_generations", "--lora_r", "--learning_rate", "--load_in_4bit", "--prior_steps")
    for option in own.get(name, all_of_them):
        assert option in text, option


def test_every_recipe_has_its_row():
    """In the table of claims of recipes/README.md, with its command."""
    table = (RECIPES / "README.md").read_text().partition("## What the paper claims")[2]
    for path in RECIPES.glob("*.py"):
        assert f"recipes/{path.name}" in table, path.name
        assert ast.get_docstring(ast.parse(path.read_text())), path.name


@pytest.mark.parametrize(("width", "is_turned"), [(100, False), (60, True)])
def test_a_table_that_is_too_wide_is_turned(width, is_turned, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    table = Comparison("methods", [f"measure {number}" for number in range(6)])
    for value, method in enumerate(("one", "two")):
        table.add(method, dict.fromkeys(table.columns, value), ".0f")
    table.print()
    cells = [line.strip("│").split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    figures = [[cell.strip() for cell in row[1:]] for row in cells]
    assert figures == ([["0", "1"]] * 6 if is_turned else [["0"] * 6, ["1"] * 6])


def test_the_narrower_of_two_wide_tables_is_printed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    table = Comparison("a table", ["one"])
    for number in range(6):
        table.add(f"measure {number} of six", {"one": number}, ".0f")
    table.print()
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]) >= 6


def test_tables_as_markdown(tmp_path, capsys):
    table = Comparison("KL(p || q)", ["a|b", "[c]"])
    table.add("x|y", {"a|b": 1.0, "[c]": None})
    table.add("count", {"[c]": 12_345}, ",d")
    table.write_markdown(tmp_path / "table.md")
    table.print()
    assert (tmp_path / "table.md").read_text().splitlines() == [
        "**KL(p || q)**",
        "",
        "|  | a\\|b | [c] |",
        "| --- | ---: | ---: |",
        "| x\\|y | 1.00 |  |",
        "| count |  | 12,345 |",
    ]
    assert "[c]" in capsys.readouterr().out
