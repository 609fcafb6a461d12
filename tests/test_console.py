"""What a run prints, on a terminal and elsewhere; and what reaches the trackers."""

import io
import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ALDRIFTTrainer, count_a, lora_config, tiny_gpt2
from rich.console import Console

from aldrift_hf.reporting import progress
from aldrift_hf.reporting.console import LadderLines
from aldrift_hf.reporting.progress import ProgressBars
from aldrift_hf.types import no_progress

pytestmark = pytest.mark.slow


@pytest.fixture
def make(config, tokenizer):
    def build(train_dataset=None, objective=count_a, **settings):
        model = tiny_gpt2()
        args = config(**{"disable_tqdm": False, **settings})
        return ALDRIFTTrainer(
            model, objective, args, train_dataset, processing_class=tokenizer, peft_config=lora_config(model)
        )

    return build


@pytest.fixture
def on_terminal(make, monkeypatch):
    """Makes trainers that show bars and lines on a terminal of 100 columns, and what is written to it."""
    monkeypatch.setenv("TERM", "xterm")
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100)

    def build(**settings):
        trainer = make(**settings)
        for callback in (ProgressBars, LadderLines):
            trainer.remove_callback(callback)
            trainer.add_callback(callback(console))
        return trainer, written

    return build


def test_without_a_terminal_there_are_plain_lines(make, capsys):
    trainer = make()
    trainer.train()
    trainer.sample(4)
    trainer.evaluate()
    lines = capsys.readouterr().out.splitlines()
    header = "rung   tau   cost best success accept ESS/n k-hat missing distinct   loss  calls"
    assert lines[0] == header
    assert [line.split()[:2] for line in lines[1:4]] == [["0", "0.5"], ["1", "1"], ["2", "1.5"]]
    assert all(len(line) == 80 for line in lines[:4])
    assert lines[4].startswith("trained in ")
    assert lines[5].startswith("final model: mean cost ")
    assert "missing mass" in lines[5]
    assert " ± " in lines[5]
    assert lines[6] == "All of num_rungs=3 rungs were climbed."
    assert lines[7].startswith("samples: mean cost ")
    assert lines[8].startswith("evaluation: mean cost ")
    assert len(lines) == 9


def test_a_long_phase_says_how_far_it_is(make, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    make().train()
    out = capsys.readouterr().out
    assert "  proposals: 32 of 64, about" in out
    assert "  updates: 3 of 4, about" in out
    assert "64 of 64" not in out


def test_a_terminal_has_bars_for_rungs_proposals_costs_and_updates(on_terminal):
    trainer, written = on_terminal()
    trainer.train()
    text = written.getvalue()
    for what in ("rungs", "proposals", "objective batches", "updates"):
        assert what in text
    assert "2 of 3" in text


def test_bars_are_gone_after_an_error_and_come_again(on_terminal):
    def cost(prompts, completions):
        if broken:
            raise RuntimeError("no answer")
        return count_a(prompts, completions)

    broken = True
    trainer, written = on_terminal(objective=cost)
    with pytest.raises(RuntimeError, match="no answer"):
        trainer.train()
    assert "\x1b[?25h" in written.getvalue()[-200:]  # the cursor is back
    broken = False
    written.seek(0)
    written.truncate()
    trainer.train()
    assert "updates" in written.getvalue()


def test_an_adaptive_ladder_shows_its_inverse_temperature(on_terminal):
    trainer, written = on_terminal(ladder="adaptive", tau_step=None, num_generations=256)
    trainer.train()
    assert "inverse temperature" in written.getvalue()
    assert "0.0 of 1.5" in written.getvalue()  # from the first rung on


def test_an_inverse_temperature_that_is_yet_to_be_found_has_no_total(on_terminal):
    trainer, written = on_terminal(
        ladder="adaptive", tau_step=None, tau_max=None, target_cost=0.01, max_objective_calls=256
    )
    trainer.train()
    text = written.getvalue()
    assert "rung 0, inverse temperature" in text
    assert " of 100" not in text
    assert re.search(r" 0\.0 +\x1b", text)  # the first rung; by the last one T is known
    assert re.search(r"\d of \d+\.\d{1,3} *\x1b", text)


@pytest.mark.parametrize("shown", [True, False])
def test_only_the_first_process_shows_bars(capsys, monkeypatch, shown):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(progress, "PartialState", lambda: SimpleNamespace(is_main_process=shown))
    bar = ProgressBars(Console()).progress("proposals", 10)
    assert (bar is not None) == shown
    with bar or no_progress("proposals", 10) as advance:
        advance(4)
        advance(6)
    assert capsys.readouterr().out.startswith("  proposals: 4 of 10") == shown


def test_disable_tqdm_silences(make, capsys):
    make(disable_tqdm=True, log_level="error").train()
    assert "rung   tau" not in capsys.readouterr().out


# ---- Trackers -------------------------------------------------------------------------------------------------------

SCALARS = {
    *("tau", "objective_mean", "success", "acceptance_rate", "ess", "missing_mass", "log_z", "loss", "num_tokens"),
    *("completions/mean_length", "completions/clipped_ratio", "entropy", "kl_to_prior", "kl_to_target"),
}


def test_tensorboard(make, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make(report_to=["tensorboard"])
    trainer.train()
    trainer.evaluate()
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert {f"train/{name}" for name in SCALARS} | {"eval/missing_mass", "eval/kl"} <= set(board.Tags()["scalars"])
    assert [event.value for event in board.Scalars("train/tau")] == [0.5, 1.0, 1.5]
    assert [event.step for event in board.Scalars("train/tau")] == [4, 8, 12]


TRACKIO = """
import sys
sys.path.insert(0, {tests!r})
from conftest import count_a, lora_config, tiny_gpt2
from aldrift_hf import ALDRIFTConfig, ALDRIFTTrainer
from aldrift_hf.toy import word_tokenizer

args = ALDRIFTConfig(
    {folder!r}, tau_max=1.5, tau_step=0.5, num_rungs=3, objective_range=3.0, sampler="metropolis_hastings",
    num_generations=64, chain_length=4, max_completion_length=3, updates_per_rung=2, use_cpu=True, save_strategy="no",
    report_to=["trackio"], project="ladder",
)
model = tiny_gpt2()
tokenizer = word_tokenizer(["a", "b", "c"], " ")
ALDRIFTTrainer(model, count_a, args, processing_class=tokenizer, peft_config=lora_config(model)).train()
"""


def test_trackio_offline(tmp_path):
    """In a process of its own: it looks at its environment when it is imported."""
    script = TRACKIO.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "out"))
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "trackio").glob("ladder*.db")
    with sqlite3.connect(path) as database:
        rows = [json.loads(metrics) for (metrics,) in database.execute("select metrics from metrics order by id")]
    rungs = [row for row in rows if "train/tau" in row]
    assert [row["train/tau"] for row in rungs] == [0.5, 1.0, 1.5]
    assert {f"train/{name}" for name in SCALARS} <= set(rungs[0])
