"""In a notebook: the quickstart runs from top to bottom, and what shows how far a run is."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from conftest import count_a, lora_config, tiny_gpt2
from nbclient import NotebookClient

from aldrift_hf import ALDRIFTTrainer
from aldrift_hf.reporting import notebook as in_notebook
from aldrift_hf.reporting.console import LadderLines
from aldrift_hf.reporting.defaults import default_callbacks
from aldrift_hf.reporting.notebook import NotebookProgress
from aldrift_hf.reporting.progress import ProgressBars
from aldrift_hf.reporting.writers import ReportWriter

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart.ipynb"


@pytest.mark.slow
def test_the_quickstart(priors, tmp_path, monkeypatch):
    """No cell fails, and they show what they are for: the table of rungs, samples, and the report."""
    monkeypatch.setenv("ALDRIFT_CACHE", str(priors))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(QUICKSTART, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert (tmp_path / "out" / "quickstart" / "report.html").is_file()
    shown = {cell.source: [*pages(cell)] for cell in notebook.cells if cell.cell_type == "code"}
    (training,) = (html for source, html in shown.items() if "trainer.train()" in source)
    assert any(page.count("<tr>") == 5 for page in training), "a line per rung, in one output"
    assert not any("<progress" in page for page in training), "bars go when the run ends"
    record, samples, report = (html[-1] for html in [*shown.values()][-3:])
    assert record.startswith("<p>After 4 rungs, the model&#x27;s mean cost is ")
    assert samples.count("<tr") == 9
    assert report.startswith("<iframe srcdoc=")
    assert "After 4 rungs" in report


def pages(cell):
    """The HTML that a cell shows."""
    for output in cell.outputs:
        if html := output.get("data", {}).get("text/html"):
            yield html


def test_the_quickstart_is_kept_without_outputs():
    """They would be of one machine; the tests make them again."""
    cells = nbformat.read(QUICKSTART, as_version=4).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.fixture
def shown(monkeypatch) -> list[list[str]]:
    """For each output of a cell, what it showed, one after the other; no time passes between two updates."""
    outputs: list[list[str]] = []

    def display(first, display_id):
        outputs.append([first])
        return SimpleNamespace(update=outputs[-1].append)

    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(HTML=str, display=display))
    monkeypatch.setattr(in_notebook, "SECONDS_BETWEEN_UPDATES", 0.0)
    return outputs


@pytest.fixture
def trainer(config, tokenizer, shown):
    model = tiny_gpt2()
    trainer = ALDRIFTTrainer(
        model,
        count_a,
        config(),
        processing_class=tokenizer,
        peft_config=lora_config(model),
        callbacks=[NotebookProgress()],
    )
    trainer.remove_callback(ReportWriter)
    return trainer


def test_which_callbacks_a_notebook_has(config, monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    types = {type(each) for each in default_callbacks(config(disable_tqdm=False))}
    assert NotebookProgress in types
    assert types.isdisjoint({ProgressBars, LadderLines})
    assert NotebookProgress not in {type(each) for each in default_callbacks(config(disable_tqdm=True))}


@pytest.mark.slow
def test_a_run_has_one_output_and_what_follows_its_own(trainer, shown):
    trainer.train()
    (run,) = shown
    rows = [page.count("<tr>") for page in run]
    assert rows == sorted(rows)
    assert rows[-1] == 1 + len(trainer.record.rungs) == 4
    assert any('<progress value="2" max="3"></progress> rungs: 2 of 3' in page for page in run)
    assert any("proposals: 64 of 64" in page for page in run)
    assert "<progress" not in run[-1]
    assert trainer.record.ended_by in run[-1]
    trainer.evaluate()
    assert len(shown) > 1
    assert "evaluation: mean cost" in shown[-1][-1]
    assert "<tr>" not in shown[-1][-1]


def test_only_the_first_process_shows_anything(trainer, shown, monkeypatch):
    monkeypatch.setattr(in_notebook, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    callback = NotebookProgress()
    assert callback.progress("proposals", 10) is None
    with callback.running():
        pass
    assert shown == []


def test_the_report_has_the_pictures_of_the_files(trainer):
    def picture(completions, weights):
        return ""

    assert trainer.report().picture is None
    trainer.add_callback(ReportWriter(picture))
    assert trainer.report().picture is picture
    assert trainer.report(repr).picture is repr
    assert repr(trainer.report()) == "Report: The first rung is still running."
