"""recipes/external_objective.py: a failure of the text has a cost, a failure of the service is retried."""

import asyncio
import itertools
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import tenacity

from aldrift_hf.objective.calling import ObjectiveError
from aldrift_hf.objective.objective import Objective
from aldrift_hf.objective.testing import check_objective
from aldrift_hf.types import Prompts

EXAMPLE = "x=2\nwhile(x<40):\n\tx*=3\n\tx-=1\nprint(x)"  # 2, 5, 14, 41
NOTHING = Prompts([{"prompt": ""}], [[0]], [""])


@pytest.fixture
def recipe(recipe_module, no_report):
    return recipe_module("external_objective")


@pytest.fixture(autouse=True)
def _no_child_is_left():
    """No test leaves a child process behind, not even a zombie."""
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before


def programs(recipe, processes=2, timeout=20.0, outages=0.0):
    """The objective with a timeout that is long enough for a busy machine."""
    return recipe.Programs(processes, timeout, outages)


def costs(objective, *texts):
    return asyncio.run(objective([""] * len(texts), list(texts)))


def simulated(recipe, text):
    """The cost of a program, by arithmetic. A program that has not ended after 1,000 steps never ends."""
    start, loop, *body, _ = text.split("\n")
    x, limit = int(start[2:]), int(loop[8:-2])
    for _ in range(1000):
        if x >= limit:
            return recipe.cost_of(str(x).encode())
        for step in body:
            x = {"+=": x.__add__, "-=": x.__sub__, "*=": x.__mul__}[step[2:4]](int(step[4:]))
    return recipe.D


def test_costs_are_those_of_the_programs(recipe):
    texts = recipe.random_programs(60, np.random.default_rng(0))
    texts = [text for text in texts if simulated(recipe, text) < recipe.D]
    assert len(texts) > 40
    assert costs(programs(recipe), *texts) == [simulated(recipe, text) for text in texts]


def test_the_target_that_the_readme_tells(recipe):
    """The target for the rule that the prior learns, by brute force over its 4,050 programs."""
    bodies = [*itertools.product(recipe.STEPS), *itertools.product(recipe.STEPS, repeat=2)]
    every = [
        ("\n".join([start, loop, *body, recipe.END]), len(recipe.STEPS) ** -len(body))
        for start in recipe.STARTS
        for loop in recipe.LOOPS
        for body in bodies
    ]
    assert len(every) == 4050
    cost, prior = np.array([(simulated(recipe, text), weight) for text, weight in every]).T
    prior /= prior.sum()
    target = prior * np.exp(-2 * cost)
    target /= target.sum()
    assert (cost == 0).sum() == 110
    assert prior[cost == 0].sum() == pytest.approx(0.024, abs=5e-4)
    assert prior[cost == recipe.D].sum() == pytest.approx(0.077, abs=5e-4)
    assert target[cost == 0].sum() == pytest.approx(0.71, abs=5e-3)
    assert target @ cost == pytest.approx(0.37, abs=5e-3)
    assert (1 - (1 - target[cost == 0]) ** 512).sum() == pytest.approx(98, abs=0.5)


def test_the_pattern_in_the_readme(recipe):
    text = (Path(__file__).parents[1] / "recipes" / "README.md").read_text()
    (pattern,) = re.findall(r"```python\n(@retry.*?)```", text, re.DOTALL)
    names = {**vars(asyncio.subprocess), **vars(tenacity), **vars(recipe)}
    names["EVALUATOR"] = [sys.executable, "-I", "-S", "-c", recipe.EVALUATOR, "0.1", "9"]
    exec(pattern, names)
    assert costs(names["cost"], *["print(42)"] * 30, "print(43)", "1/0") == [0.0] * 30 + [1.0, recipe.D]


@pytest.mark.slow
def test_it_keeps_the_laws_whatever_the_service_does(recipe):
    flaky = programs(recipe, processes=4, outages=0.1)
    check_objective(flaky, [EXAMPLE, EXAMPLE.replace("40", "41")], objective_range=recipe.D)
    assert flaky.counts["tried again"] == flaky.counts["processes"] - 4 * 14
    assert flaky.counts["timed out"] == 0


@pytest.mark.parametrize(
    "text",
    [
        "", "1/0", "print(", "print(42); 1/0", "print(42); raise SystemExit(75)", "exit(75)", "print('42 or so')",
        "x = 'x'\nwhile True: x += x", "print(42)\0", "import os; print(os.environ['ACCESS_TOKEN'])",
    ],
)  # fmt: skip
def test_what_fails_costs_the_worst(recipe, text, monkeypatch):
    monkeypatch.setenv("ACCESS_TOKEN", "42")
    objective = programs(recipe)
    assert costs(objective, text) == [recipe.D]
    assert objective.counts == {"processes": 1}, "a failure of the text was taken for one of the service"


@pytest.mark.slow
def test_what_hangs_is_killed_with_all_that_it_started(recipe, tmp_path):
    """In the trainer's thread; the other programs of the batch are evaluated."""
    pids = tmp_path / "pids"
    note = f"open({str(pids)!r}, 'a').write(f'{{os.getpid()}} ')"
    hangs = f"import os\nos.fork()\n{note}\nimport time; time.sleep(600)"
    left = f"import os\nif os.fork(): print(42)\nelse:\n  os.close(1)\n  {note}\n  import time; time.sleep(600)"
    start = time.monotonic()
    objective = programs(recipe, timeout=1.5)
    found = Objective(objective, None, recipe.D)(NOTHING, [0] * 4, [hangs, EXAMPLE, "print(42)", left])
    assert found.tolist() == [recipe.D, 1.0, 0.0, 0.0]
    assert objective.counts["timed out"] == 1
    assert time.monotonic() - start < 60
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) in (2, 3)  # the third may be killed before it has written
    for pid in started:
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() - start < 20, "a grandchild is still running"
            time.sleep(0.05)


@pytest.mark.slow
def test_what_hangs_ends_by_itself_where_nobody_is_left_to_kill_it(recipe):
    evaluator = [sys.executable, "-I", "-S", "-c", recipe.EVALUATOR, "0", "1"]
    done = subprocess.run(evaluator, input=b"while True: pass", timeout=60)
    assert done.returncode == -signal.SIGXCPU


def test_a_service_that_fails_one_time_in_three_is_asked_again(recipe, monkeypatch, tmp_path):
    log = tmp_path / "calls"
    counted = f"import os, sys\nwith open({str(log)!r}, 'a') as f: f.write('.')\n"
    counted += f"if os.path.getsize({str(log)!r}) % 3 == 0: sys.exit(os.EX_TEMPFAIL)\n"
    monkeypatch.setattr(recipe, "EVALUATOR", counted + recipe.EVALUATOR)
    objective = programs(recipe, processes=1)
    texts = [f"print({number})" for number in range(42, 52)]
    assert costs(objective, *texts) == [recipe.cost_of(str(number).encode()) for number in range(42, 52)]
    assert objective.counts == {"processes": 14, "tried again": 4}


def test_a_service_that_never_answers_stops_training_and_nothing_is_evaluated(recipe, monkeypatch):
    """After waiting times that double. Other running programs are stopped."""
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setitem(recipe.PATIENCE, "sleep", sleep)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    down = "import os, sys, time\nprogram = sys.stdin.read()\nif program: time.sleep(600)\nsys.exit(os.EX_TEMPFAIL)"
    monkeypatch.setattr(recipe, "EVALUATOR", down)
    objective = Objective(programs(recipe, processes=3, timeout=300), None, recipe.D)
    with pytest.raises(ObjectiveError, match=r"TryLaterError: the evaluator exited with 75 on every attempt"):
        objective(NOTHING, [0] * 3, ["", "sleeps", "sleeps too"])
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4])
    assert objective.calls == 0


def test_a_machine_without_a_process_to_spare_is_the_services_fault(recipe, monkeypatch):
    spawn, failures = asyncio.create_subprocess_exec, iter([BlockingIOError("no more processes")] * 3)

    async def short_of_processes(*arguments, **settings):
        for failure in failures:
            raise failure
        return await spawn(*arguments, **settings)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", short_of_processes)
    objective = programs(recipe)
    assert costs(objective, "print(42)") == [0.0]
    assert objective.counts["processes"] == 4


def test_no_more_processes_than_allowed_run_at_once(recipe, monkeypatch, tmp_path):
    log = tmp_path / "times"
    timed = "import time\nbegan = time.monotonic()\ntime.sleep(0.2)\n"
    timed += f"with open({str(log)!r}, 'a') as f: f.write(f'{{began}} {{time.monotonic()}}\\n')"
    monkeypatch.setattr(recipe, "EVALUATOR", timed)
    costs(programs(recipe, processes=3), *map(str, range(9)))
    spans = [tuple(map(float, line.split())) for line in log.read_text().splitlines()]
    assert len(spans) == 9
    assert max(sum(a <= began < b for a, b in spans) for began, _ in spans) == 3


@pytest.mark.parametrize("settings", [{"processes": 0}, {"timeout": 0}, {"outages": 1}])
def test_settings_that_cannot_work_are_refused(recipe, settings):
    with pytest.raises(ValueError, match="processes must be at least 1"):
        recipe.Programs(**settings)


@pytest.mark.slow
def test_the_recipe(recipe, tmp_path, monkeypatch, capsys):
    """The recipe at a small size."""
    monkeypatch.setenv("ALDRIFT_CACHE", str(tmp_path / "cache"))
    settings = {
        "prior_steps": 60, "draws": 64, "tau_step": 1, "num_generations": 128, "updates_per_rung": 5, "timeout": 0.5,
        "processes": 8,
    }  # fmt: skip
    line = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["x", *line, "--disable_tqdm", "True", "--output_dir", str(tmp_path / "out")])
    recipe.main()
    out = capsys.readouterr().out
    for part in (
        "│ prior │ model │ corrected │",
        "print 42",
        "timed out",
        "tried again",
        "missing mass: ",
        "one of them:",
    ):
        assert part in out.replace("┃", "│")
    assert "do not end in time" in (tmp_path / "out" / "external_objective.md").read_text()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
