"""The four tasks for a chat model: their costs, and the gold that is kept beside the recipe."""

import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from evaluation import gold as golden
from evaluation.drawing_gold import GoldMaker
from evaluation.gold import Gold
from problems import steering
from problems.real_model import real_model
from problems.steering import TASKS

from aldrift_hf import check_objective
from aldrift_hf.models.loading import load_model, tokenizer_of

FILES = sorted((Path(__file__).parents[1] / "recipes" / "gold").glob("*.json"))
TEXTS = (
    "The food was amazing, and the dog ran to the beach.",
    "A place to avoid: cold, slow and rude!",
    "P.S. <<x>> *b*",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_tasks(name):
    """Chat messages, columns for the cost, and a cost that batches and caches may rely on."""
    task = TASKS[name]()
    assert task.name == name
    assert all([message["role"] for message in row["prompt"]] == ["user"] for row in task.rows)
    assert all({*row} == {"prompt", *task.columns} for row in task.rows)
    examples = [{**row, "completion": text} for row in task.rows[:4] for text in TEXTS]
    check_objective(task.cost, examples, objective_range=task.worst_cost)


def test_tone():
    praise, blame = steering.positive([None] * 2, ["A wonderful, delicious dinner!", "Awful food and rude waiters."])
    assert praise > 0.8
    assert blame < 0.2
    assert steering.positive([None], [""]) == [0.5]


def test_a_rare_word():
    texts = ["It was Amazing!", "amazingly good", "good", "an amazing\nplace", ""]
    assert steering.lacks_amazing([None] * 5, texts) == [0.0, 1.0, 1.0, 0.0, 1.0]


def test_two_keywords_and_a_length():
    texts = [
        "The dog ran along the beach.",
        "Dogs on a beach",
        "A cat " + "very " * 20,
        "The dog and the beach" + " x" * 8,
    ]
    assert steering.unmet([None] * 4, texts, [["dog", "beach"]] * 4) == [0.0, 1.0, 3.0, 1.0]
    assert len({tuple(row["keywords"]) for row in steering.keywords().rows}) == 16


@pytest.mark.parametrize(
    ("number", "followed", "not_followed"),
    [
        (0, "A cat is a cat.", "The feline sleeps."),
        (3, "White and quiet.", "White and cold."),
        (4, "Zebras hide there.", "Deer hide there."),
        (6, "It keeps" + " money" * 12, "It keeps" + " money" * 13),
        (8, "Thank you! P.S. Come by.", "Thank you!"),
        (11, "* Rome\n* Oslo\n* Lima", "* Rome\n* Oslo"),
        (12, '"Never alone"', "Never alone"),
        (14, "Loud and bright.", "Loud, bright."),
    ],
)
def test_instructions(number, followed, not_followed):
    """IFEval's checkers decide; the columns are those of its data set."""
    task = TASKS["instruction"]()
    row = task.rows[number]
    columns = {name: [row[name]] * 3 for name in task.columns}
    assert {*columns} == {"instruction_id_list", "kwargs"}
    assert task.cost([row["prompt"]] * 3, [followed, not_followed, ""], **columns) == [0.0, 1.0, 1.0]


def test_instructions_may_be_several_and_rows_a_data_set():
    """In a data set, arguments of other rows are `None`; of two instructions one may be followed."""
    both = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}
    task = TASKS["instruction"]()
    rows = Dataset.from_list([*task.rows, {"prompt": task.rows[0]["prompt"], **both}])
    texts = ['"A cat, and a cat"'] * len(rows)
    costs = task.cost(rows["prompt"], texts, rows["instruction_id_list"], rows["kwargs"])
    assert costs[-1] == 0.5
    assert costs[0] == 0.0


def test_the_words_of_an_instruction_are_the_checkers():
    prompts = [row["prompt"][0]["content"] for row in TASKS["instruction"]().rows]
    assert len({*prompts}) == 16
    assert prompts[8] == (
        "Thank a friend for a gift. At the end of your response, please explicitly add a postscript starting with P.S."
    )
    again = [row["prompt"][0]["content"] for row in TASKS["instruction"]().rows]
    assert prompts == again, "nothing in them is drawn at random"


# ---- The gold beside the recipe --------------------------------------------------------------------------------------


def test_every_task_has_gold():
    assert {path.stem for path in FILES} == {*TASKS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_gold_is_whole(path):
    """Enough draws for every prompt, costs in range, and lengths within the limit."""
    gold, task = Gold.read(path), TASKS[path.stem]()
    cost = gold.by_prompt(gold.cost)
    assert gold.about == {"task": path.stem, "max_completion_length": task.max_completion_length, "seed": 0}
    assert cost.size == len(gold) >= 2048
    assert cost.shape[0] == len(gold.prompts) == len(task.rows)
    assert ((cost >= 0) & (cost <= task.worst_cost)).all()
    assert np.isfinite(gold.log_prior).all()
    assert max(gold.log_prior) < 0
    assert max(map(len, gold.completions)) <= task.max_completion_length
    assert path.stat().st_size < 1_000_000
    assert golden.effective_sample_size(cost, task.tau_max).mean() > 10


@pytest.fixture(scope="module")
def chat():
    """The real model and its tokenizer."""
    try:
        folder = str(real_model())
    except OSError as error:
        pytest.skip(f"the real model cannot be made here: {error}")
    return load_model(folder, None, adapter=False), tokenizer_of(folder, None)


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_gold_is_the_real_models_and_its_costs_are_todays(path, chat):
    """Prompts, costs, and the log-probabilities of the first draws; and the draws can be made again."""
    maker = GoldMaker(TASKS[path.stem](), *chat, seed=0)
    stored = maker.stored(path)
    again = Gold(maker.about, maker.prompts, [], [], [])
    maker.extend(again, range(2))
    assert again.completions == stored.completions[:2]
    assert again.log_prior == pytest.approx(stored.log_prior[:2], abs=1e-2)


def test_the_recipe_describes_gold(recipe_module):
    gold = Gold({}, [[1]], [[0]] * 4, [-1.0] * 4, [0.0, 0.0, 1.0, 1.0])
    table = recipe_module("steer_text").describe({"tone": gold})
    rows = dict(table.rows)
    half = np.log((1 + np.exp(-8.0)) / 2)
    assert rows["log Z, nats"] == [f"{half:.3f}"]
    assert rows["mean cost under the prior"] == ["0.500"]
    assert rows["mean cost under the prior, ± standard error"] == [f"{0.5 / np.sqrt(3):.3f}"]
    assert rows["draws per prompt"] == ["4"]
    assert rows["share of cost 0 under the prior"] == ["0.500"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "tune"], "--tasks tune: choose from tone, word, keywords"),
        (["--draws", "0"], "--draws must be at least 1"),
        (["--draws", "31", "--make_gold"], "--draws must be at least 32 for keywords: two for each of its prompts"),
        (["--block", "-1"], "--block must be at least 1"),
        (["--gold_dir", "nowhere", "--tasks", "tone"], "there is no nowhere/tone.json: make it with --make_gold"),
        (["--make_gold", "--model_name_or_path", "nowhere"], "--model_name_or_path nowhere: .*'nowhere'"),
    ],
)
def test_bad_options_are_one_clear_line(recipe_module, monkeypatch, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["steer_text.py", *options])
    with pytest.raises(SystemExit, match=message):
        recipe_module("steer_text").main()


def test_gold_on_the_command_line(recipe_module, monkeypatch, tmp_path, chat_model, capsys):
    """Drawn for one task, and then known for another with the same prompt."""
    line = ["steer_text.py", "--make_gold", "--tasks", "tone", "word", "--draws", "6", "--block", "4"]
    line += ["--gold_dir", str(tmp_path / "gold"), "--model_name_or_path", str(chat_model)]
    monkeypatch.setattr(sys, "argv", line)
    recipe_module("steer_text").main()
    out = capsys.readouterr().out
    assert "mean cost under p_T" in out
    tone, word = (Gold.read(tmp_path / "gold" / f"{name}.json") for name in ("tone", "word"))
    assert len(tone) == 6
    assert tone.completions == word.completions
    assert tone.cost == [0.5] * 6, "words without a meaning are neutral"
    assert word.cost == [1.0] * 6
    monkeypatch.setattr(sys, "argv", [*line, "--seed", "1"])
    with pytest.raises(SystemExit, match=r"tone\.json have other settings"):
        recipe_module("steer_text").main()
