"""The speed recipe runs, and its parts do what their names say."""

import pytest
import torch
from evaluation.bare_rung import BareRung
from evaluation.measuring import peak_memory
from evaluation.random_models import SIZES, make_model
from peft import LoraConfig


@pytest.mark.slow
def test_the_recipe_compares_side_by_side(run_recipe, capsys):
    small = {"rungs": 2, "chains": 8, "updates": 2, "length": 8, "mean_length": 4}
    folder = run_recipe("speed", sizes="tiny wide", **small)
    table = (folder / "speed.md").read_text()
    for row in (
        "bare: generate, s", "bare: updates, s", "a rung / bare sum", "finished rows leave the batch / stay: time",
        "costs beside generation / after it: time", "logits in chunks / whole: peak memory",
    ):  # fmt: skip
        assert row in table
    assert "a rung of 64 proposals and 2 updates" in capsys.readouterr().out
    chunks = next(line for line in table.splitlines() if "chunks / whole: peak" in line)
    assert float(chunks.split("|")[3]) < 0.9, "64 rows of 8 tokens over 128,256 words are two chunks"


def test_bad_options_are_one_clear_line(run_recipe):
    with pytest.raises(SystemExit, match="--sizes huge: choose from tiny, small, wide, smollm2"):
        run_recipe("speed", sizes="huge")
    with pytest.raises(SystemExit, match="--mean_length between 2 and --length"):
        run_recipe("speed", length=8, mean_length=9)


@pytest.mark.slow
def test_a_completion_ends_where_it_is_meant_to():
    """Lengths are geometric, with a mean of --mean_length tokens."""
    model, tokenizer = make_model(SIZES["tiny"], 8, torch.device("cpu"))
    assert tokenizer.eos_token_id == 0
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    bare = BareRung(model, lora, proposals=400, rows=200, length=64, updates=1, batch=8)
    ids = torch.cat([bare.generate(), bare.generate()])[:, 1:]
    length = (ids == 0).int().argmax(1) + 1
    assert length.double().mean().item() == pytest.approx(8, abs=4 * 8 / 20)
    assert set(bare.seconds()) == {"generate", "forward, prior", "forward, policy", "updates"}


def test_peak_memory_sees_what_is_gone_again():
    peaks: dict[str, float] = {}
    with peak_memory(torch.device("cpu"), peaks, "both"):
        held = torch.ones(2**26)
        for _ in range(5):
            held.add_(1.0)
        del held
    assert 200 < peaks["both"] < 400
