"""Whole runs of the comparison of steering methods, with a small model: each is made once, and resumes."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny_gpt2
from evaluation import gold as golden
from evaluation import steering_run, steering_runs
from evaluation import steering_trainers as trainers
from evaluation.drawing_gold import GoldMaker
from evaluation.gold import Gold
from evaluation.steering_setting import LEARNING, METHODS, Setting
from problems.steering import TASKS

from aldrift_hf.toy import word_tokenizer
from aldrift_hf.types import no_progress

WORDS = ["good", "bad", "amazing", "the", "dog", "beach"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small chat model, whose words VADER knows, and gold of it for three tasks."""
    folder = tmp_path_factory.mktemp("steering")
    tokenizer = word_tokenizer(WORDS, " ")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model = tiny_gpt2(vocab_size=len(tokenizer), n_positions=64)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    for name in ("tone", "keywords", "instruction"):
        maker = GoldMaker(TASKS[name](), model, tokenizer, 0)
        maker.make(folder / "gold" / f"{name}.json", 64, 64, no_progress)
    return folder


def command(place, out, *options):
    line = ["steer_text.py", "--model_name_or_path", str(place / "model"), "--gold_dir", str(place / "gold")]
    line += ["--output_dir", str(out), "--calls", "64", "--batch_size", "16", "--fresh_draws", "32"]
    return [*line, "--learning_rates", "1e-2", "--chain_length", "4", *options]


@pytest.fixture
def here(monkeypatch, no_report):
    """Runs happen in this process, and are counted."""
    own, adapter = {"num_rungs": 8}, {"r": 4}
    made = [*steering_runs.grid(METHODS, ["tone"], [1e-4, 2e-4], [64], [0, 1], own, adapter, model="somewhere")]
    assert len(made) == 2 * (2 * len(LEARNING) + 2)
    assert {setting.seed for setting in made[: len(made) // 2]} == {0}
    assert all(bool(setting.aldrift) == (setting.method == "aldrift") for setting in made)
    assert all(bool(setting.lora) == (setting.method in LEARNING) for setting in made)
    assert replace(plain, lora={"r": 4, "lora_bias": True}).label == "aldrift lora_r=4 lora_bias=True"


def test_the_adapter_of_all_methods_can_be_set():
    setting = Setting("tone", "rloo", 1e-4, 64, 0, "somewhere", lora={"r": 2, "lora_bias": True})
    job = trainers.Job(setting, TASKS["tone"](), tiny_gpt2(), None, Path("out"))
    assert (job.lora.r, job.lora.lora_bias, job.lora.lora_alpha, job.lora.target_modules) == (2, True, 32, "all-linear")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run", "ppo"], "--run ppo: choose from aldrift, rloo"),
        (["--calls", "100"], "--calls must be multiples of --batch_size 32, and at least two of them"),
        (["--calls", "32"], "at least two of them"),
        (["--learning_rates", "0"], "--learning_rates must be above 0"),
        (["--keep", "1.5"], "--keep must be a share"),
        (["--gold_share", "0.5"], "--gold_share must be from 0.9 to 1"),
        (["--chain_length", "0"], "--chain_length must be at least 1"),
        (["--aldrift", "nll"], "--aldrift nll: write settings as NAME=VALUE"),
        (["--lora", "r"], "--lora r: write settings as NAME=VALUE"),
    ],
)
def test_bad_options_are_one_clear_line(recipe_module, monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["steer_text.py", *options])
    with pytest.raises(SystemExit, match=message):
        recipe_module("steer_text").main()


def test_values_on_the_command_line(recipe_module):
    named = recipe_module("steer_text").named
    given = ["loss_type=nll", "tau_step=1e-1", "num_rungs=8", "pareto_smoothing=true", "ladder=adaptive"]
    assert named(["r=1", "target_modules=[o_proj,down_proj]"]) == {"r": 1, "target_modules": ["o_proj", "down_proj"]}
    assert named(given) == {
        "loss_type": "nll",
        "tau_step": 0.1,
        "num_rungs": 8,
        "pareto_smoothing": True,
        "ladder": "adaptive",
    }
