"""All that a run has paid for can be read from its folder, without its model and its cost."""

import csv
import json
import os
import subprocess
import sys

import pytest
from test_objective import prompts

from aldrift_hf import cli, evaluated_texts
from aldrift_hf.objective import copied, store
from aldrift_hf.objective.objective import Objective

CHAT = [{"role": "user", "content": "Größe?"}]
ROWS = prompts("x", CHAT, topic=["red", "blau"])


def lengths(prompts, completions, topic):
    return [float(len(text)) for text in completions]


def vowels(prompts, completions, topic):
    """Of chats it says nothing."""
    return [
        float(sum(letter in "aeiou" for letter in text)) if isinstance(prompt, str) else None
        for prompt, text in zip(prompts, completions)
    ]


def evaluate(folder, functions, weights, rows, texts):
    objective = Objective(functions, weights, 10.0, output_dir=str(folder))
    costs = objective(ROWS, rows, texts).tolist()
    objective.close()
    return costs


TEXTS = ["aaaa", "büro \ud800", "c", ""]


def test_all_texts_best_first_with_their_prompts_columns_and_costs(tmp_path):
    evaluate(tmp_path, [lengths, vowels], [1.0, 0.5], [0, 0], TEXTS[:2])
    evaluate(tmp_path, [lengths, vowels], [1.0, 0.5], [1, 0, 0], [TEXTS[2], TEXTS[3], TEXTS[0]])
    found = evaluated_texts(tmp_path)
    red, blue = {"prompt": "x", "topic": "red"}, {"prompt": CHAT, "topic": "blau"}
    assert found == [
        {**red, "completion": "", "objective": 0.0, "objectives": {"lengths": 0.0, "vowels": 0.0}},
        {**blue, "completion": "c", "objective": 1.0, "objectives": {"lengths": 1.0, "vowels": None}},
        {**red, "completion": "aaaa", "objective": 6.0, "objectives": {"lengths": 4.0, "vowels": 4.0}},
        {**red, "completion": TEXTS[1], "objective": 6.5, "objectives": {"lengths": 6.0, "vowels": 1.0}},
    ]


def test_of_several_objectives_the_last_that_evaluated_counts(tmp_path):
    evaluate(tmp_path, lengths, None, [0], ["abc"])
    evaluate(tmp_path, [lengths, vowels], None, [0], ["abc"])
    assert evaluated_texts(tmp_path)[0]["objective"] == 4.0
    evaluate(tmp_path, lengths, None, [0, 0], ["abc", "d"])
    assert [(text["completion"], text["objective"]) for text in evaluated_texts(tmp_path)] == [("d", 1.0), ("abc", 3.0)]
    assert "objectives" not in evaluated_texts(tmp_path)[0]


def test_an_objective_that_has_evaluated_nothing_does_not_count(tmp_path):
    def fails(prompts, completions, topic):
        return [float("nan")] * len(completions)

    evaluate(tmp_path, lengths, None, [0], ["abc"])
    with pytest.raises(ValueError, match="NaN"):
        evaluate(tmp_path, fails, None, [0], ["d"])
    assert [text["completion"] for text in evaluated_texts(tmp_path)] == ["abc"]


def test_rows_of_a_table_may_have_other_columns(tmp_path):
    """As the data sets of training and of evaluation may."""
    evaluate(tmp_path, lambda prompts, completions, **columns: [1.0] * len(completions), None, [0], ["abc"])
    objective = Objective(
        lambda prompts, completions, **columns: [1.0] * len(completions), None, 10.0,
        output_dir=str(tmp_path), cache_key="both",
    )  # fmt: skip
    objective(prompts("y"), [0], ["a"])
    objective(ROWS, [0], ["b"])
    objective.close()
    cli.main(["costs", str(tmp_path), "--output", str(tmp_path / "all.csv")])
    with (tmp_path / "all.csv").open(newline="") as file:
        assert {(row["completion"], row["topic"]) for row in csv.DictReader(file)} == {("a", ""), ("b", "red")}


def test_while_a_run_goes_on(tmp_path):
    objective = Objective(lengths, None, 10.0, output_dir=str(tmp_path))
    objective(ROWS, [0], ["abc"])
    assert [text["completion"] for text in evaluated_texts(str(tmp_path))] == ["abc"]
    objective.close()


def test_nothing_is_opened_where_a_run_may_write(tmp_path, monkeypatch):
    """It may be a colleague's, or on another machine. What was evaluated last is in SQLite's log alone."""
    objective = Objective(lengths, None, 10.0, output_dir=str(tmp_path))
    objective(ROWS, [0], ["abc"])
    folder = tmp_path / "_costs"
    assert sorted(path.name for path in folder.iterdir()) == ["0.sqlite", "0.sqlite-shm", "0.sqlite-wal"]
    before = (folder / "0.sqlite").read_bytes()
    assert b"abc" not in before
    opened = []
    connect = store.sqlite3.connect
    monkeypatch.setattr(store.sqlite3, "connect", lambda path, **k: opened.append(path) or connect(path, **k))
    assert [text["completion"] for text in evaluated_texts(tmp_path)] == ["abc"]
    assert opened
    assert folder not in {path.parent for path in opened}
    assert (folder / "0.sqlite").read_bytes() == before
    objective.close()


@pytest.mark.parametrize("times", [1, 100])
def test_a_log_that_begins_anew_while_it_is_copied(times, tmp_path, monkeypatch):
    """What it held is then in the file, which has been copied before; so both are copied once more."""
    objective = Objective(lengths, None, 10.0, output_dir=str(tmp_path))
    objective(ROWS, [0], ["abc"])
    copy, left = copied.shutil.copyfile, [times]

    def meanwhile(path, to):
        copy(path, to)
        if path.name == "0.sqlite" and left[0]:
            left[0] -= 1
            objective.store._connection.execute("PRAGMA wal_checkpoint(RESTART)")
            objective(ROWS, [0], [f"b{left[0]}"])

    monkeypatch.setattr(copied.shutil, "copyfile", meanwhile)
    monkeypatch.setattr(copied.time, "sleep", lambda seconds: None)
    if times == 1:
        assert [text["completion"] for text in evaluated_texts(tmp_path)] == ["b0", "abc"]
    else:
        with pytest.raises(OSError, match=r"0\.sqlite is written to faster than it can be copied\. Try again"):
            evaluated_texts(tmp_path)
    objective.close()


def test_a_damaged_file_is_named(tmp_path):
    evaluate(tmp_path, lengths, None, [0], ["abc"])
    path = tmp_path / "_costs" / "0.sqlite"
    path.write_bytes(b"x" * 5000)
    with pytest.raises(OSError, match=f"{path}, which holds the costs .*, is damaged.*Move the file away"):
        evaluated_texts(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="there is no head")
def test_a_reader_that_has_seen_enough(tmp_path):
    """`aldrift costs RUN | head` is no error."""
    evaluate(tmp_path, lengths, None, [0] * 4000, [f"{number:04} {'x' * 5}" for number in range(4000)])
    command = [sys.executable, "-m", "aldrift_hf.cli", "costs", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert json.loads(process.stdout.readline())["completion"] == "0000 xxxxx"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


def test_a_folder_without_costs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not the output directory of a run that has evaluated anything"):
        evaluated_texts(tmp_path)


def test_the_command(tmp_path, capsys):
    folder = str(tmp_path / "out")
    evaluate(folder, [lengths, vowels], [1.0, 0.5], [0, 1, 0], ["aa, \n", "b", ""])
    cli.main(["costs", folder])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == evaluated_texts(folder)
    cli.main(["costs", folder, "-n", "1", "--output", str(tmp_path / "best.jsonl")])
    assert json.loads((tmp_path / "best.jsonl").read_text())["completion"] == ""
    cli.main(["costs", folder, "--output", str(tmp_path / "all.csv")])
    with (tmp_path / "all.csv").open(newline="", encoding="utf-8") as file:
        table = [*csv.DictReader(file)]
    assert [row["completion"] for row in table] == ["", "b", "aa, \n"]
    assert table[1] == {
        **{"prompt": json.dumps(CHAT, ensure_ascii=False), "topic": "blau", "completion": "b", "objective": "1.0"},
        **{"objectives/lengths": "1.0", "objectives/vowels": ""},
    }


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nowhere"], "nowhere is not the output directory of a run"),
        (["nowhere", "-n", "0"], "--num_texts must be at least 1, got 0"),
        (["nowhere", "--outptu", "x"], "there is no option --outptu; did you mean --output?"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_what_cannot_be_listed_is_one_clear_line(capsys, argv, said):
    with pytest.raises(SystemExit) as stop:
        cli.main(["costs", *argv])
    assert stop.value.code == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"aldrift costs: {said}")
