"""Runs that are killed (SIGKILL) at random instants and started again, with and without a checkpoint."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

KILLS = 30
BATCH = 8

# One process imports everything and forks the runs: a kill costs the fraction of a second that the run had.
SCRIPT = """
import os, random, signal, sys, time, traceback
sys.path.insert(0, {tests!r})
import torch
from conftest import count_a, lora_config, tiny_gpt2
from transformers.trainer_utils import get_last_checkpoint
from aldrift_hf import ALDRIFTConfig, ALDRIFTTrainer
from aldrift_hf.objective.store import CostStore
from aldrift_hf.toy import word_tokenizer

root, kills, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)

def note(folder, name, texts):
    with open(folder + "/" + name, "a") as file:
        file.write("".join(text + "\\n" for text in texts))

def train(folder):
    def cost(prompts, completions):
        note(folder, "asked", completions)
        return count_a(prompts, completions)

    def noted(self, costs, *rows, write=CostStore.add):
        write(self, costs, *rows)
        note(folder, "on-disk", [text for (_, text), _ in costs])

    CostStore.add = noted
    args = ALDRIFTConfig(
        output_dir=folder, tau_max=1.5, objective_range=6.0, tau_step=0.5, num_rungs=3, num_generations=64,
        chain_length=4,
        max_completion_length=6, per_device_generation_batch_size=batch, per_device_train_batch_size=4,
        updates_per_rung=6, learning_rate=1e-2, disable_tqdm=True, use_cpu=True,
        save_strategy="steps", save_steps=4, report_to="none", sampler="metropolis_hastings",
        log_level="error",
    )
    model = tiny_gpt2(dropout=0.1)
    trainer = ALDRIFTTrainer(
        model, cost, args, processing_class=word_tokenizer(["a", "b", "c"], " "), peft_config=lora_config(model, 0.1)
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) is not None)
    trainer.save_model()

def begin(folder):
    os.makedirs(folder, exist_ok=True)
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        train(folder)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def check(status):
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit("a run that was started again failed")
    return os.WIFEXITED(status)

start = time.monotonic()
check(os.waitpid(begin(root + "/alone"), 0)[1])
took = time.monotonic() - start
random.seed(0)
run = 0
while kills:
    child = begin(f"{{root}}/{{run}}")
    time.sleep(random.uniform(0, 1.2 * took))
    os.kill(child, signal.SIGKILL)
    if check(os.waitpid(child, 0)[1]):
        run += 1  # it had ended before
    else:
        kills -= 1
        note(f"{{root}}/{{run}}", "kills", ["killed"])
check(os.waitpid(begin(f"{{root}}/{{run}}"), 0)[1])
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run left alone, and those that were killed, each to its end."""
    root = tmp_path_factory.mktemp("killed")
    script = root / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, str(script), str(root), str(KILLS), str(BATCH)],
        capture_output=True,
        text=True,
        timeout=1800,  # three minutes on two free cores
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    killed = sorted((path for path in root.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    assert sum(len(lines(folder, "kills")) for folder in killed) == KILLS
    return root / "alone", killed


def lines(folder: Path, name: str) -> list[str]:
    path = folder / name
    return path.read_text().splitlines() if path.is_file() else []


def test_killed_runs_end_in_the_same_parameters(runs):
    alone, killed = runs
    theirs = load_file(alone / "adapter_model.safetensors")
    for folder in killed:
        ours = load_file(folder / "adapter_model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), folder


def test_killed_runs_have_the_same_records(runs):
    def records(folder):
        rungs = map(json.loads, (folder / "rungs.jsonl").read_text().splitlines())
        return [{key: value for key, value in rung.items() if not key.startswith("seconds")} for rung in rungs]

    alone, killed = runs
    for folder in killed:
        assert records(folder) == records(alone), folder


def test_no_cost_on_disk_is_evaluated_again(runs):
    alone, killed = runs
    distinct = set(lines(alone, "asked"))
    assert len(lines(alone, "asked")) == len(distinct)
    for folder in killed:
        asked, on_disk = lines(folder, "asked"), lines(folder, "on-disk")
        assert set(asked) == distinct
        assert max(Counter(on_disk).values()) == 1
        # A kill between a cost's return and its being on disk: at most the batch that was under way.
        assert len(asked) - len(distinct) <= BATCH * len(lines(folder, "kills"))


def test_nothing_is_left_lying(runs):
    for folder in runs[1]:
        assert not (folder / "_saving").exists()
        assert not list(folder.glob("*.tmp"))
