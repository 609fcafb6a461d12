"""What a run writes, prints and warns of are callbacks: each can be removed, and none needs another."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
import torch
from conftest import count_a, lora_config, tiny_gpt2
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState

from aldrift_hf import ALDRIFTTrainer, RunCallback, RunRecord
from aldrift_hf.reporting import report
from aldrift_hf.reporting.console import CompletionsTable, LadderLines, print_to_stderr
from aldrift_hf.reporting.defaults import default_callbacks
from aldrift_hf.reporting.health import HealthWarnings
from aldrift_hf.reporting.progress import ProgressBars
from aldrift_hf.reporting.writers import ModelCardWriter, RecordWriter, ReportWriter
from aldrift_hf.types import Completions, Prompts, Proposals

ALL = (RecordWriter, ReportWriter, ModelCardWriter, HealthWarnings, ProgressBars, LadderLines, CompletionsTable)
LEFT_BY = {
    RecordWriter: ["run.json", "rungs.jsonl", "draws.jsonl"],
    ReportWriter: ["report.html"],
    ModelCardWriter: ["README.md"],
}
SETTINGS = {
    **{"target_cost": None, "target_success": None, "kl_budget": None},
    **{"tau_max": 2.0, "tau_step": None, "objective": ["cost"], "num_generations": 2, "corrects": True},
    **{
        "sampler": "archive",
        "success_threshold": 0.0,
        "ladder": "linear",
        "loss": "nll",
        "prior": "the base model",
        "prior_adapter": None,
        "prompts": 1,
        "seed": 0,
    },
    **{"base_model": None, "architecture": "GPT2LMHeadModel", "tuning": "all parameters", "adapter_name": None},
    "loaded": {"model_revision": "main", "dtype": "float32"},
    **{"max_completion_length": 3, "updates_per_rung": None, "objective_weights": None, "chain_length": 1},
    **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "processes": 1, "learning_rate": 1e-3},
    **{"ess_threshold": 0.5, "versions": {}},
}
RUNG = {
    **{"rung": 0, "draws": 2, "tau": 2.0, "objective_mean": 1.0, "objective_best": 1.0, "success": 0.5, "ess": 0.5},
    **{"missing_mass": 2.0, "distinct_proposals": 1.0, "proposals": 2, "objective_calls": 2, "loss": 0.1, "updates": 3},
}


@pytest.fixture
def make(config, tokenizer):
    def build(callbacks=None, **settings):
        model = tiny_gpt2()
        args = config(disable_tqdm=False, log_completions=True, num_rungs=2, **settings)
        return ALDRIFTTrainer(
            model, count_a, args, processing_class=tokenizer, peft_config=lora_config(model), callbacks=callbacks
        )

    return build


def installed(trainer: ALDRIFTTrainer) -> set[type]:
    return {type(callback) for callback in trainer.callback_handler.callbacks}


@pytest.mark.slow
def test_all_can_be_removed(make, capsys):
    trainer = make()
    assert set(ALL) <= installed(trainer)
    for each in ALL:
        trainer.remove_callback(each)
    assert installed(trainer).isdisjoint(ALL)
    trainer.train()
    assert not [path.name for path in Path(trainer.args.output_dir).iterdir() if path.name != "_costs"]
    assert capsys.readouterr().out == ""
    assert len(trainer.record.rungs) == 2  # it is kept in memory, whoever writes it down
    assert trainer.record.finished
    assert trainer.record.draws


def test_which_are_installed(config):
    def types(**settings):
        return {type(callback) for callback in default_callbacks(config(**settings))}

    always = {RecordWriter, ReportWriter, ModelCardWriter, HealthWarnings}
    assert types() == always  # the tests' settings have disable_tqdm=True
    assert types(disable_tqdm=False) == always | {ProgressBars, LadderLines}
    assert types(disable_tqdm=False, log_completions=True) == set(ALL)
    assert types(log_completions=True) == always | {CompletionsTable}
    consoles = {
        id(callback.console)
        for callback in default_callbacks(config(disable_tqdm=False, log_completions=True))
        if hasattr(callback, "console")
    }
    assert len(consoles) == 1  # or else lines would tear the bars


class Listener(RunCallback):
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_rung_begin(self, args, state, control, *, rung, num_rungs, tau, **kwargs) -> None:
        self.heard.append(f"rung {rung} of {num_rungs} after tau {tau:g}")

    def on_rung_drawn(self, args, state, control, *, record, metrics, proposals, prompts, **kwargs) -> None:
        assert len(record.rungs) == metrics["rung"]
        assert [draw["completion"] for draw in record.draws] == proposals.texts
        assert "loss" not in metrics
        self.heard.append(f"drawn for {len(prompts)} prompt")

    def on_rung_learned(self, args, state, control, *, record, **kwargs) -> None:
        assert "loss" in record.rungs[-1]
        self.heard.append(f"learned rung {record.rungs[-1]['rung']}")

    def on_measured(self, args, state, control, *, record, metrics, **kwargs) -> None:
        self.heard.append(f"measured {sorted(metrics)[0]}")

    def on_run_end(self, args, state, control, *, record, **kwargs) -> None:
        assert record.finished
        assert record.metrics
        self.heard.append("end")


@pytest.mark.slow
def test_what_a_callback_hears(make):
    listener = Listener()
    trainer = make([listener])
    trainer.train()
    trainer.evaluate()
    assert listener.heard == [
        *("rung 0 of 2 after tau 0", "drawn for 1 prompt", "learned rung 0"),
        *("rung 1 of 2 after tau 0.5", "drawn for 1 prompt", "learned rung 1"),
        *("measured distinct", "end", "measured distinct"),
    ]


# ---- Each by itself -------------------------------------------------------------------------------------------------


@pytest.fixture
def proposals() -> Proposals:
    costs = torch.tensor([[1.0, 3.0]])
    return Proposals(
        rows=torch.tensor([0, 0]),
        completions=Completions(torch.tensor([[2], [3]]), torch.tensor([1, 1])),
        objective=costs,
        log_prior=torch.zeros(1, 2),
        log_model=torch.zeros(1, 2),
        texts=["[red]a[/red]", "b"],
    )


def events(callback: RunCallback, args, proposals: Proposals, first: bool) -> None:
    """A run of one rung, as one process's callbacks hear of it."""
    event = args, TrainerState(is_world_process_zero=first), TrainerControl()
    record = RunRecord(SETTINGS, objective_range=1.0)
    prompts = Prompts([{"prompt": "x"}], [[1]], ["key"])
    record.tau_max = 2.0
    record.take_draws(proposals, prompts, 2.0)
    callback.on_train_begin(*event)
    callback.on_rung_begin(*event, rung=0, num_rungs=1, tau=0.0, tau_max=2.0)
    callback.on_rung_drawn(*event, record=record, metrics=RUNG, proposals=proposals, prompts=prompts)
    record.rungs = [RUNG]
    callback.on_log(*event, logs=RUNG)
    callback.on_rung_learned(*event, record=record)
    record.finished, record.metrics = True, {"draws": 2, "objective": 1.0, "success": 1.0, "ess": 0.5}
    callback.on_measured(*event, record=record, metrics=record.metrics)
    callback.on_run_end(*event, record=record)


@pytest.mark.parametrize("removed", ALL)
def test_none_needs_another(config, proposals, removed, capsys, caplog, monkeypatch):
    monkeypatch.setattr(
        report, "write_report", lambda record, folder, picture: Path(folder, report.REPORT_FILE).touch()
    )
    args = config(disable_tqdm=False, log_completions=True)
    Path(args.output_dir).mkdir()
    for callback in default_callbacks(args):
        if type(callback) is not removed:
            events(callback, args, proposals, first=True)
    written = {path.name for path in Path(args.output_dir).iterdir()}
    for callback, names in LEFT_BY.items():
        assert all((name in written) == (callback is not removed) for name in names)
    out = capsys.readouterr().out
    assert ("rung   tau" in out) == (removed is not LadderLines)
    assert ("rung 0, tau = 2" in out) == (removed is not CompletionsTable)
    assert ("has lost 2.00 nats" in caplog.text) == (removed is not HealthWarnings)


@pytest.mark.parametrize("first", [True, False])
def test_only_the_first_process_acts(config, proposals, first, caplog, monkeypatch):
    monkeypatch.setattr(
        report, "write_report", lambda record, folder, picture: Path(folder, report.REPORT_FILE).touch()
    )
    printed, args = io.StringIO(), config()
    Path(args.output_dir).mkdir()
    for each in ALL:
        shown = issubclass(each, (ProgressBars, LadderLines, CompletionsTable))
        events(each(Console(file=printed)) if shown else each(), args, proposals, first)
    written = {path.name for path in Path(args.output_dir).iterdir()}
    expected = {"run.json", "rungs.jsonl", "draws.jsonl", "README.md", "report.html"}
    assert written == (expected if first else set())
    assert bool(printed.getvalue()) == first
    assert bool(caplog.records) == first


def test_a_kind_of_warning_is_logged_once_per_run(config, proposals, caplog):
    callback, args = HealthWarnings(), config()
    event = args, TrainerState(), TrainerControl()
    record = RunRecord(SETTINGS, objective_range=1.0)

    def count(words: str) -> int:
        return sum(words in message for message in caplog.messages)

    for runs in (1, 2):
        callback.on_train_begin(*event)
        for rung in (0, 1):
            metrics = RUNG | {"rung": rung, "khat": 0.9 if rung == 1 else 0.1}
            callback.on_rung_drawn(*event, record=record, metrics=metrics, proposals=proposals, prompts=None)
        assert count("No draw costs less than D = 1") == runs
        assert count("The model that drew rung 0 has lost 2.00 nats") == runs
        assert count("k-hat is 0.90") == runs
    for evaluations in (1, 2):
        callback.on_measured(*event, record=record, metrics={"draws": 2, "ess": 1.0, "missing_mass": 1.0})
        assert count("The model has lost 1.00 nats") == evaluations
    assert {each.levelno for each in caplog.records} == {logging.WARNING}


def test_the_table_shows_completions_as_they_are(config, proposals):
    printed = io.StringIO()
    events(CompletionsTable(Console(file=printed, width=100)), config(), proposals, first=True)
    text = printed.getvalue()
    assert "rung 0, tau = 2" in text
    assert "[red]a[/red]" in text  # the best, and the random one of rung 0
    assert "1.964" in text  # of 2 draws of which the other one's weight is exp(-4) times as large


def test_one_call_sends_all_that_is_printed_to_standard_error(config, proposals, capsys):
    callbacks: list[TrainerCallback] = [*default_callbacks(config(disable_tqdm=False, log_completions=True))]
    print_to_stderr([TrainerCallback(), *callbacks])
    Path(config().output_dir).mkdir()
    for callback in callbacks:
        events(callback, config(), proposals, first=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "rung   tau" in shown.err
    assert "rung 0, tau = 2" in shown.err
