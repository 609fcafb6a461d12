"""Two processes on the CPU (gloo) against one: the same proposals, the same target, one model."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, accelerate_launch, count_a, every_completion, log_probs, tiny_gpt2
from safetensors.torch import load_file

from aldrift_hf.selftest.exact import chi_square_p

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, signal, sys
sys.path.insert(0, {tests!r})
import torch
from conftest import count_a, lora_config, perturb, tiny_gpt2
from safetensors.torch import save_file
from aldrift_hf import ALDRIFTConfig, ALDRIFTTrainer
from aldrift_hf.models import batching as fitting
from aldrift_hf.toy import word_tokenizer

torch.set_num_threads(1)
output, world = sys.argv[1], int(sys.argv[2])
asked = []

def cost(prompts, completions):
    if "--die" in sys.argv and int(os.environ.get("RANK", 0)) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if "--fail" in sys.argv and int(os.environ.get("RANK", 0)) == 1:
        raise RuntimeError("no service on this rank")
    asked.extend(zip(prompts, completions))
    return count_a(prompts, completions)

model = tiny_gpt2()
config = ALDRIFTConfig(
    output_dir=output, tau_max=1.5, objective_range=3.0, tau_step=0.5, num_rungs=3, num_generations=128,
    chain_length=4,
    max_completion_length=3, per_device_generation_batch_size=None if "--short" in sys.argv else 16,
    per_device_train_batch_size=8 // world, gradient_accumulation_steps=1, updates_per_rung=4, learning_rate=1e-2,
    disable_tqdm=True, use_cpu=True, save_strategy="steps", save_steps=6,
    sampler=next((name for name in ("archive", "suffix", "span") if f"--{{name}}" in sys.argv), "metropolis_hastings"),
    prompts_per_rung=1 if "--groups" in sys.argv else None,
)
trainer = ALDRIFTTrainer(
    model, cost, config, train_dataset=["", "a b"], processing_class=word_tokenizer(["a", "b", "c"], " "),
    peft_config=lora_config(model),
)
assert trainer.args.world_size == world
generate = model.generate
def short_of_memory(input_ids, **kwargs):
    if len(input_ids) > 10:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return generate(input_ids=input_ids, **kwargs)
if "--short" in sys.argv:
    fitting.MAX_BATCH_SIZE = 64  # so that both processes have something to draw
    if trainer.args.process_index == 1:
        model.generate = short_of_memory
resume = os.path.join(output, "checkpoint-6") if "--resume" in sys.argv else None
batches = []
step = trainer.training_step
def watched(model, inputs, items=None):
    batches.append(inputs["input_ids"].tolist())
    return step(model, inputs, items)
trainer.training_step = watched
trainer.train(resume_from_checkpoint=resume)
if "--short" not in sys.argv:
    trainer.rollout.batches = fitting.Batches(4096, fixed=True)
corrected = trainer.sample(20 if "--short" in sys.argv else 1500, chain_length=24)
rank = trainer.args.process_index
save_file({{name: tensor.contiguous() for name, tensor in trainer.model.state_dict().items() if "lora_" in name}},
          os.path.join(output, f"rank-{{rank}}.safetensors"))
with open(os.path.join(output, f"rank-{{rank}}.json"), "w") as file:
    json.dump({{"asked": asked, "batches": batches, "corrected": list(corrected["completion"]),
                "cache": [[*key, value] for key, value in trainer.objective.store.items()]}}, file)
"""


def launch(folder: Path, processes: int, *extra: str) -> subprocess.CompletedProcess:
    script = folder.parent / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    config = CONFIGS / ("single_cpu.yaml" if processes == 1 else "multi_cpu.yaml")
    return accelerate_launch(config, str(script), str(folder), str(processes), *extra)


@pytest.fixture(scope="module", params=["metropolis_hastings", "archive", "suffix", "span"])
def runs(request, tmp_path_factory):
    """The same run on one process and on two."""
    root = tmp_path_factory.mktemp("distributed")
    folders = {processes: root / f"world-{processes}" for processes in (1, 2)}
    for processes, folder in folders.items():
        done = launch(folder, processes, f"--{request.param}")
        assert done.returncode == 0, done.stderr[-3000:]
    return folders


def result(folder: Path, rank: int = 0) -> dict:
    return json.loads((folder / f"rank-{rank}.json").read_text())


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rungs.jsonl").read_text().splitlines()]


def test_the_first_rungs_proposals_do_not_depend_on_how_many_draw_them(runs):
    """Before anything is learnt all figures are equal; later only rounding in the averaged gradients differs."""
    one, two = records(runs[1])[0], records(runs[2])[0]
    for key in (
        "objective_mean",
        "acceptance_rate",  # null of the archive, which has no chains
        "distinct_proposals",
        "distinct_samples",
        "objective_calls",
        "proposals",
    ):
        assert one[key] == two[key], key
    for key in ("log_z", "ess", "loss"):
        assert one[key] == pytest.approx(two[key], rel=1e-4), key


def test_both_processes_learn_one_model_from_their_own_part(runs):
    first, second = (load_file(runs[2] / f"rank-{rank}.safetensors") for rank in (0, 1))
    alone = load_file(runs[1] / "rank-0.safetensors")
    for name in first:
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], alone[name], atol=1e-3), name
    batches = [result(runs[2], rank)["batches"] for rank in (0, 1)]
    assert len(batches[0]) == len(batches[1]) == 12
    assert batches[0] != batches[1]
    # Their first batches, put together, are what one process learns from.
    whole = result(runs[1], 0)["batches"][0]
    unpadded = [sorted(tuple(row) for row in rows) for rows in (batches[0][0] + batches[1][0], whole)]
    width = max(len(row) for rows in unpadded for row in rows)
    pad = [sorted((*row, *[0] * (width - len(row))) for row in rows) for rows in unpadded]
    assert pad[0] == pad[1]


def test_the_objective_is_asked_once_for_each_completion(runs):
    first, second = (result(runs[2], rank) for rank in (0, 1))
    asked = [tuple(pair) for pair in first["asked"] + second["asked"]]
    assert len(asked) == len(set(asked)) == len(first["cache"])
    assert first["asked"]
    assert second["asked"]
    assert first["cache"] == second["cache"]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_target_is_the_same(runs, processes, tokenizer):
    """Corrected draws of the model that was learnt, against the enumerated p_T."""
    drawn = result(runs[processes], 0)["corrected"]
    assert drawn == result(runs[processes], processes - 1)["corrected"]
    completions = every_completion()
    texts = tokenizer.batch_decode(completions.tokens(), skip_special_tokens=True)
    cost = torch.tensor(count_a([], texts), dtype=torch.float64)
    names = sorted(set(texts))
    for number, prompt in enumerate(([0], tokenizer("a b")["input_ids"])):
        target = torch.zeros(len(names), dtype=torch.float64)
        log_p = (log_probs(tiny_gpt2(), prompt, completions) - 1.5 * cost).log_softmax(0)
        for text, value in zip(texts, log_p.exp()):
            target[names.index(text)] += value
        rows = drawn[1500 * number : 1500 * (number + 1)]
        counts = torch.tensor([names.index(text) for text in rows]).bincount(minlength=len(names))
        assert chi_square_p(counts, target) > 1e-4


def test_two_processes_resume_exactly(runs, request, tmp_path):
    """In a copy: what the other tests look at stays."""
    folder = Path(shutil.copytree(runs[2], tmp_path / "resumed"))
    sampler = request.node.callspec.params["runs"]
    before = [load_file(runs[2] / f"rank-{rank}.safetensors") for rank in (0, 1)]
    done = launch(folder, 2, "--resume", f"--{sampler}")
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        after = load_file(folder / f"rank-{rank}.safetensors")
        for name in after:
            assert torch.equal(after[name], before[rank][name]), name


def test_an_objective_that_fails_on_one_rank_ends_all_with_its_message(tmp_path):
    done = launch(tmp_path / "out", 2, "--fail")
    assert done.returncode != 0
    assert "'cost' raised RuntimeError: no service on this rank" in done.stderr
    assert "on another process" in done.stderr


def test_a_rank_that_dies_takes_the_run_down(tmp_path):
    """Out of memory, say: the launcher ends the others, and says which one it was."""
    done = launch(tmp_path / "out", 2, "--die")
    assert done.returncode != 0
    assert "ChildFailedError" in done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr


def test_one_rank_that_runs_out_of_memory_is_waited_for(tmp_path):
    """It goes on with smaller batches; from the next phase on, all do, for rounds are the same for all."""
    done = launch(tmp_path / "out", 2, "--short")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (result(tmp_path / "out", rank) for rank in (0, 1))
    assert first["cache"] == second["cache"]
    assert first["corrected"] == second["corrected"]
    assert "continuing with 8 completions at once" in done.stderr
