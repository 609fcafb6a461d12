"""Standard output with an encoding of few letters: what Python gives a program on Windows whose output is a file."""

import io
import sys

import pytest
from conftest import ALDRIFTTrainer, count_a, lora_config, tiny_gpt2
from evaluation.tables import Comparison

from aldrift_hf import cli, selftest
from aldrift_hf.reporting.letters import print_every_letter
from aldrift_hf.toy import word_tokenizer


def narrow_output(monkeypatch):
    """Output that lacks Greek letters, from here on (pytest changes it after fixtures); returns what reads it."""
    output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", output)

    def read():
        output.flush()
        return output.buffer.getvalue().decode("cp1252")

    return read


@pytest.mark.parametrize("command", [[], *([name, "--help"] for name in ("train", "sample", "evaluate"))])
def test_help(monkeypatch, command):
    printed = narrow_output(monkeypatch)
    if command:
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.main(command)
    else:
        cli.main(command)
    assert "?" in printed()


def test_a_completion_that_is_shown_does_not_end_the_run(config, monkeypatch):
    printed = narrow_output(monkeypatch)
    model = tiny_gpt2()
    tokenizer = word_tokenizer(["α", "β", "γ"], " ")
    args = config(num_rungs=1, log_completions=True)
    ALDRIFTTrainer(model, count_a, args, processing_class=tokenizer, peft_config=lora_config(model)).train()
    assert "?" in printed()


def test_tables_of_recipes(monkeypatch, tmp_path):
    printed = narrow_output(monkeypatch)
    print_every_letter()  # as recipes do, which import `evaluation`
    table = Comparison("KL(p‖q)", ["τ"])
    table.add("a", {"τ": 1.0})
    table.print()
    table.write_markdown(tmp_path / "table.md")
    assert "KL(p?q)" in printed()
    assert "KL(p‖q)" in (tmp_path / "table.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_self_test_without_the_command_line(monkeypatch):
    """`python -m aldrift_hf.selftest`, whose table has bounds (≤)."""
    printed = narrow_output(monkeypatch)
    assert selftest.main([]) == 0
    assert "? " in printed()
