"""A first run prints our lines alone, and what is left out of other packages' lines is left out by name."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import WORDS, tiny_gpt2
from datasets import are_progress_bars_disabled
from expected_lines import COMMANDS, RUN, assert_quiet
from peft import LoraConfig
from tqdm import tqdm

from aldrift_hf.models import prior, quiet
from aldrift_hf.toy import word_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_readmes_command_names_its_config():
    """Without one Accelerate lists what it takes in its place. test_spanning_tree_recipe.py runs the command."""
    assert "accelerate launch --config_file accelerate_configs/single_process.yaml recipes/spanning_tree.py\n" in README


COSTS = """
def not_a(prompts, completions):
    return [float(sum(word != "a" for word in text.split())) for text in completions]
"""
COMMAND_LINES = {
    "train": "train --objective costs:not_a --model_name_or_path model --dataset_name prompts.jsonl --output_dir out "
    "--tau_max 0.5 --tau_step 0.5 --num_rungs 1 --objective_range 3 --max_completion_length 3 --num_generations 64 "
    "--updates_per_rung 2 --learning_rate 1e-3 --load_in_4bit True --gradient_checkpointing True",
    "full": "train --objective costs:not_a --model_name_or_path model --output_dir full --no_use_peft --tau_max 0.5 "
    "--tau_step 0.5 --num_rungs 1 --objective_range 3 --max_completion_length 3 --num_generations 64 "
    "--updates_per_rung 2 --learning_rate 1e-5",
    "sample": "sample out -n 2",
    "evaluate": "evaluate out",
    "report": "report out",
    "env": "env",
    "selftest --help": "selftest --help",
    "train --help": "train --help",
}
PROGRAM = f"""
import sys
from aldrift_hf import cli

for name, line in {COMMAND_LINES!r}.items():
    for stream in (sys.stdout, sys.stderr):
        print("$", name, file=stream, flush=True)
    try:
        cli.main(line.split())
    except SystemExit as stop:
        assert not stop.code, stop.code
    sys.stdout.flush()
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """By command, what a user reads on standard output and standard error. One process, for imports take the time."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("first_run")
    for part in (tiny_gpt2(), word_tokenizer(WORDS, " ")):
        part.save_pretrained(folder / "model")
    (folder / "costs.py").write_text(COSTS)
    (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b c"}\n')
    environment = {**os.environ, "COLUMNS": "1000", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    streams = [re.split(r"^\$ (.*)\n", stream, flags=re.MULTILINE) for stream in (done.stdout, done.stderr)]
    assert [stream[0] for stream in streams] == ["", ""], "as the package is imported"
    out, err = (dict(zip(stream[1::2], stream[2::2])) for stream in streams)
    return {name: (out[name], err[name]) for name in COMMAND_LINES}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "full"])
def test_training_prints_our_lines_alone(printed, name):
    for stream in printed[name]:
        assert_quiet(stream, *RUN, *COMMANDS)


@pytest.mark.slow
def test_results_alone_are_on_standard_output(printed):
    out, err = printed["sample"]
    assert len([json.loads(line) for line in out.splitlines()]) == 2 * 2
    kept = r"\d+ costs were found in out/_costs and are used again\. Changes to the functions, .*"
    assert_quiet(err, *RUN, kept)
    out, err = printed["evaluate"]
    assert "eval_objective" in json.loads(out)
    assert_quiet(err, *RUN, kept)


@pytest.mark.slow
def test_commands_that_train_nothing(printed):
    assert_quiet(printed["report"][0], *COMMANDS)
    assert_quiet(printed["env"][0], r"- [\w -]+: .*")
    assert all(
        printed[name][0].startswith(f"usage: aldrift {name.split()[0]} ") for name in COMMAND_LINES if "--" in name
    )
    assert not any(err for name, (_, err) in printed.items() if name in ("report", "env") or "--" in name)


# ---- Nothing else is left out ----------------------------------------------------------------------------------------


def test_bitsandbytes_other_messages_are_printed(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure", "no kernels")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


@pytest.mark.parametrize("package", ["evaluation", "problems"])
def test_recipes_leave_it_out_before_bitsandbytes_is_imported(package):
    """PEFT imports it; recipes name these packages, and with them ours, before PEFT."""
    code = f"import {package}, sys; print([name in sys.modules for name in ('aldrift_hf', 'peft', 'bitsandbytes')])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "recipes", capture_output=True, text=True, check=True
    )
    assert done.stdout == "[True, False, False]\n"


def test_a_mask_is_asked_for_elsewhere(caplog):
    logger = logging.getLogger("transformers.modeling_utils")
    asks, other = "We strongly recommend passing in an `attention_mask` since", "something else"
    with caplog.at_level(logging.WARNING, "transformers"):
        logger.addHandler(caplog.handler)
        with quiet.masks_of_ones():
            logger.warning(asks)
            logger.warning(other)
        logger.warning(asks)
        logger.removeHandler(caplog.handler)
    assert [*dict.fromkeys(record.getMessage() for record in caplog.records)] == [other, asks]


def test_what_peft_sees_by_itself_is_left_out():
    """That GPT-2's weights are stored transposed."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        prior.split(tiny_gpt2(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    assert not seen


@pytest.mark.parametrize("left_out", [quiet.old_names, quiet.new_adapter])
def test_other_warnings_are_printed(left_out):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with left_out():
            warnings.warn(
                "`is_gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1
            )
            warnings.warn("`torch_dtype` is deprecated", FutureWarning, stacklevel=1)
            warnings.warn("fan_in_fan_out is set to True but the target module is `torch.nn.Linear`.", stacklevel=1)
        warnings.warn("`is_gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)
    texts = [str(warning.message).split(" ")[0] for warning in seen]
    assert texts == ["`torch_dtype`", "fan_in_fan_out", "`is_gradient_checkpointing`"]


def test_bars_of_what_takes_its_time_are_drawn(capsys, monkeypatch):
    from transformers import logging as transformers_logging

    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)
    with quiet.late_bars():
        assert not list(transformers_logging.tqdm([]))
        assert not capsys.readouterr().err
        monkeypatch.setattr(quiet, "SECONDS_BEFORE_A_BAR", 0.0)
        assert list(transformers_logging.tqdm([1], desc="Loading weights")) == [1]
        assert "Loading weights: 100%" in capsys.readouterr().err
    assert isinstance(transformers_logging.tqdm([]), tqdm)


def test_bars_of_datasets_come_back():
    with quiet.reading_files():
        assert are_progress_bars_disabled()
    assert not are_progress_bars_disabled()
