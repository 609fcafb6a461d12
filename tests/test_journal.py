"""Costs on disk before they are used, and none paid for twice."""

import functools
import gc
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import count_a, lora_config, tiny_gpt2

from aldrift_hf import ALDRIFTTrainer
from aldrift_hf.objective.store import FOLDER, Journal, identity

ITEMS = [(("row", "a b"), [1.0, 2.5]), (("row", "\x00\ud800\u2028é"), [0.0, 0.0])]


# ---- The file -------------------------------------------------------------------------------------------------------


def test_costs_are_read_as_they_were_written(tmp_path):
    Journal(tmp_path, [count_a]).write(ITEMS)
    assert Journal(tmp_path, [count_a]).read() == dict(ITEMS)
    assert [path.name for path in (tmp_path / FOLDER).glob("*.sqlite")] == ["0.sqlite"]
    with sqlite3.connect(tmp_path / FOLDER / "0.sqlite") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_nothing_there_is_nothing_known(tmp_path):
    assert Journal(tmp_path, [count_a]).read() == {}
    assert not (tmp_path / FOLDER).exists()


def test_files_of_more_processes_are_read_by_fewer(tmp_path):
    Journal(tmp_path, [count_a]).write(ITEMS[:1])
    gc.collect()  # closes it
    (tmp_path / FOLDER / "0.sqlite").rename(tmp_path / FOLDER / "3.sqlite")
    Journal(tmp_path, [count_a]).write(ITEMS[1:])
    assert Journal(tmp_path, [count_a]).read() == dict(ITEMS)


def test_a_damaged_file_is_named(tmp_path):
    Journal(tmp_path, [count_a]).write(ITEMS)
    path = tmp_path / FOLDER / "0.sqlite"
    path.write_bytes(b"no database at all, but long enough to be looked at" * 100)
    for leftover in (tmp_path / FOLDER).glob("0.sqlite-*"):
        leftover.unlink()
    with pytest.raises(OSError, match=r"0\.sqlite, the record of costs paid for, is damaged.*Move it away"):
        Journal(tmp_path, [count_a]).read()


def test_a_disk_without_room_is_an_error_that_says_so(tmp_path):
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "0.sqlite").mkdir()
    with pytest.raises(OSError, match="costs could not be written to"):
        Journal(tmp_path, [count_a]).write(ITEMS)


# ---- Whose costs they are -------------------------------------------------------------------------------------------


class Problem:
    def __init__(self, *words, model=None):
        self.words, self.model = set(words), model

    def cost(self, prompts, completions):
        return [float(len(self.words & set(text.split()))) for text in completions]

    __call__ = cost


def closing_over(value):
    def cost(prompts, completions):
        return [value] * len(completions)

    return cost


def calls_itself(depth):
    def cost(prompts, completions):
        return cost(prompts, completions[1:]) if completions else [depth]

    return cost


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (count_a, closing_over(1.0)),
        (closing_over(1.0), closing_over(2.0)),
        (Problem("a", "b").cost, Problem("a", "c").cost),
        (Problem("a"), Problem("b")),
        (functools.partial(count_a, k=1), functools.partial(count_a, k=2)),
        (calls_itself(1), calls_itself(2)),
        (closing_over(closing_over(1.0)), closing_over(closing_over(2.0))),
    ],
)
def test_functions_that_differ_do_not_share_costs(one, other, tmp_path):
    assert identity(one) != identity(other)
    Journal(tmp_path, [one]).write(ITEMS)
    assert Journal(tmp_path, [other]).read() == {}
    assert Journal(tmp_path, [one]).read() == dict(ITEMS)


@pytest.mark.parametrize("heavy", [lambda: torch.nn.Linear(2, 2), threading.Lock])
def test_a_model_or_a_lock_in_a_cost_is_not_read_but_what_is_beside_it(heavy):
    one, other, third = (Problem(words, model=heavy()).cost for words in "aab")
    assert identity(one) == identity(other) != identity(third)


def test_an_edited_cost_is_another(tmp_path):
    costs = []
    for worst in (1, 2):
        path = tmp_path / f"{worst}" / "costs.py"
        path.parent.mkdir()
        path.write_text(f"WORST = {worst}\ndef cost(prompts, completions):\n    return [WORST] * len(completions)\n")
        names = {}
        exec(compile(path.read_text(), str(path), "exec"), names)
        costs.append(names["cost"])
    assert identity(costs[0]) != identity(costs[1])


def test_the_same_cost_in_another_process_is_the_same():
    """Also where it closes over a set, whose order changes from one process to the next."""
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_journal as t; "
    script += "print(t.identity(t.Problem('a', 'b', 'c', 'd').cost))"
    done = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    assert done[0].stdout == done[1].stdout != ""


# ---- Runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(config, tokenizer):
    def build(objective, **settings):
        model = tiny_gpt2()
        args = config(**settings)
        return ALDRIFTTrainer(model, objective, args, processing_class=tokenizer, peft_config=lora_config(model))

    return build


PAID = []


def counted(prompts, completions):
    PAID.extend(completions)
    return count_a(prompts, completions)


def test_a_run_started_again_pays_nothing_and_ends_alike(make, caplog):
    PAID.clear()
    first = make(counted)
    first.train()
    paid = len(PAID)
    assert paid == len(set(PAID)) == len(first.objective.cache)
    second = make(counted)
    second.train()
    assert len(PAID) == paid
    assert f"{paid:,} costs were found in" in caplog.text
    assert second.objective_calls == first.objective_calls, "the budget is that of a run by itself"
    ours, theirs = (trainer.model.state_dict() for trainer in (first, second))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_was_paid_before_an_error_is_not_paid_again(make):
    PAID.clear()

    def flaky(prompts, completions):
        if len(PAID) > 10 and not broken[0]:
            broken[0] = True
            raise RuntimeError("no answer")
        return counted(prompts, completions)

    broken = closing = [False]
    trainer = make(flaky, generation_batch_size=8)
    with pytest.raises(RuntimeError, match="no answer"):
        trainer.train()
    before = len(PAID)
    assert before > 10
    trainer.train()
    assert closing[0]
    assert len(PAID) == len(set(PAID)) > before


def test_a_narrower_range_is_checked_for_costs_of_before(make):
    make(counted).train()
    with pytest.raises(ValueError, match=r"above objective_range=1\.0"):
        make(counted, objective_range=1.0).train()
