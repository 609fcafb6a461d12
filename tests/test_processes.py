"""What two processes could see differently: the best checkpoint, failures, signals, what was discarded, the model."""

import json
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CONFIGS, accelerate_launch

from aldrift_hf.objective import worker

SCRIPT = """
import dataclasses, json, os, signal, sys, time
sys.path.insert(0, {tests!r})
import torch
from conftest import count_a, lora_config, tiny_gpt2
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import CheckpointManager
from aldrift_hf import ALDRIFTConfig, ALDRIFTTrainer, EditedTop
from aldrift_hf.toy import word_tokenizer

torch.set_num_threads(1)
output, rank, found = sys.argv[1], int(os.environ["RANK"]), {{}}

def make(name, cost=count_a, callbacks=None, prompts=("", "a b"), model=None, sampler=None, **settings):
    model = model or tiny_gpt2()
    config = ALDRIFTConfig(**{{
        "output_dir": os.path.join(output, name), "tau_max": 1.5, "objective_range": 3.0, "tau_step": 0.5,
        "num_rungs": 3, "num_generations": 32, "chain_length": 4, "max_completion_length": 3,
        "per_device_generation_batch_size": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        "updates_per_rung": 4, "learning_rate": 5e-2, "sampler": "metropolis_hastings", "disable_tqdm": True,
        "use_cpu": True, "save_strategy": "no", "report_to": "none", **settings,
    }})
    return ALDRIFTTrainer(
        model, cost, config, train_dataset=list(prompts), processing_class=word_tokenizer(["a", "b", "c"], " "),
        peft_config=lora_config(model), callbacks=callbacks, sampler=sampler,
    )

def weights(trainer):
    return sum(p.detach().double().abs().sum().item() for p in trainer.model.parameters() if p.requires_grad)

# The best of three checkpoints is the second.
best = make("best", load_best_model_at_end=True, metric_for_best_model="objective", eval_strategy="steps",
            eval_steps=4, save_strategy="steps", save_steps=4)
determine, scores = best._determine_best_metric, iter([3.0, 1.0, 2.0])
best._determine_best_metric = lambda metrics, trial: determine({{**metrics, "eval_objective": next(scores)}}, trial)
best.train()
found["best"] = [best.state.best_model_checkpoint, weights(best)]

# Some of the completions fail, among them all of one process's share.
def unreadable(prompts, completions):
    if {{"", "c"}} & {{*completions}}:
        raise RuntimeError(f"cannot parse {{completions[0]!r}}")
    return count_a(prompts, completions)

worst = make("worst", unreadable, objective_on_error="worst", num_generations=4, per_device_generation_batch_size=4,
             num_rungs=1, chain_length=2, prompts=[""], seed=1)
worst.train()
found["worst"] = [worst.objective.failures, worst.objective.calls]

def broken(prompts, completions):
    raise RuntimeError("no file")

try:
    make("broken", broken, objective_on_error="worst", num_rungs=1).train()
except Exception as error:
    found["broken"] = str(error)

# Stopped between rounds of proposals, and begun again in the same program.
asked = []
def counted(prompts, completions):
    asked.extend(completions)
    return count_a(prompts, completions)

twice = make("twice", counted, num_rungs=1, objective_cache_key="same")
runtime, rounds = twice.rollout.runtime, []
def in_the_third_round():
    rounds.append(1)
    if len(rounds) == 3:
        while not asked:  # the objective runs in a thread
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
    runtime.stop_if_asked()
twice.rollout.runtime = dataclasses.replace(runtime, stop_if_asked=in_the_third_round)
try:
    twice.train()
except KeyboardInterrupt:
    found["before"] = len(asked)
twice.train()
found["twice"] = [len(asked), len(twice.objective.store)]

# A cluster's signal reaches the processes some updates apart.
class Terminate(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == (3 if rank else 6):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

init = CheckpointManager.__init__
CheckpointManager.__init__ = lambda self, trainer: init(self, trainer, kill_wait=0)
ended = make("terminated", callbacks=[Terminate()], enable_jit_checkpoint=True)
ended.train()
found["terminated"] = [ended.state.global_step, os.listdir(ended.args.output_dir + "/checkpoint-4")]

# Edits, in the order of a set of each process, and a model of the cost that is not quite the same in each.
def changed(texts, rng):
    return {{" ".join(rng.choice("abc") for _ in text.split()) for text in texts if text}}

def predictor(texts, costs, rng):
    return lambda new: [text.count("a") + rank * rng.random() for text in new]

for name, surrogate in (("edits", None), ("predicted", predictor)):
    asked.clear()
    search = make(name, counted, sampler=EditedTop(changed, 3, surrogate=surrogate), chain_length=1)
    search.train()
    best = [text for prompt in (0, 1) for text in search.rollout.decode(search.sampler._best.of(prompt).completions)]
    found[name] = [weights(search), search.objective_calls, best, len(asked)]

# Not the same model.
other = tiny_gpt2()
with torch.no_grad():
    other.transformer.wte.weight[2] += rank * torch.arange(16) / 16
try:
    make("other", model=other)
except ValueError as error:
    found["other"] = str(error)

try:
    make("own", average_tokens_across_devices=False)
except ValueError as error:
    found["own"] = str(error)

with open(os.path.join(output, f"{{rank}}.json"), "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes has found."""
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    done = accelerate_launch(CONFIGS / "multi_cpu.yaml", str(script), str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_the_best_checkpoint_is_loaded_by_all(found):
    first, second = (each["best"] for each in found)
    assert first == second
    assert first[0].endswith("best/checkpoint-8")


@pytest.mark.slow
def test_failures_are_judged_over_all_processes(found):
    assert [each["worst"] for each in found] == [[2, 4]] * 2
    assert all("'broken' raised RuntimeError: no file" in each["broken"] for each in found)


@pytest.mark.slow
def test_what_was_evaluated_before_an_interruption_is_not_evaluated_again(found):
    assert sum(each["before"] for each in found) > 0
    assert sum(each["twice"][0] for each in found) == found[0]["twice"][1] == found[1]["twice"][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edits", "predicted"])
def test_processes_agree_on_what_was_edited(name, found):
    """Whichever of them has chosen a text, all learn from it, and none is evaluated twice."""
    first, second = (each[name] for each in found)
    assert first[:3] == second[:3]
    assert len({*first[2]}) > 10
    assert first[1] == first[3] + second[3]


@pytest.mark.slow
def test_sigterm_stops_all_at_one_update(found):
    for each in found:
        step, files = each["terminated"]
        assert step == 4
        assert "aldrift_manifest.json" in files


@pytest.mark.slow
def test_what_makes_the_processes_disagree_is_refused(found):
    for each in found:
        assert "the processes were given different models: log-probabilities of short rows differ by" in each["other"]
        assert "what is learned depends on the number of processes" in each["own"]


@pytest.mark.parametrize("mine", ["a job in a thread", "nothing", "functions"])
def test_processes_meet_while_one_of_them_works(monkeypatch, mine):
    """A collective that waits for the slowest job would be ended by its time-out."""
    job, meetings, advanced = Future(), [], []
    others = iter([True, True, False]) if mine == "nothing" else iter(lambda: False, None)

    def meet(values):
        meetings.append(values[0])
        return [*values, next(others)]

    monkeypatch.setattr(worker, "PartialState", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setattr(worker, "gather_object", meet)
    monkeypatch.setattr(worker, "MEET_EVERY", 0.05)
    functions = [lambda: threading.Event().wait(0.2), lambda: None]
    jobs = {"a job in a thread": [job], "nothing": [], "functions": functions}[mine]
    timer = threading.Timer(0.3, job.set_result, [None])
    timer.start()
    worker.finish_all(jobs, advanced.append)
    timer.join()
    assert len(advanced) == len(jobs)
    assert meetings[-1] is False
    assert len(meetings) >= 2
    assert all(meetings[:-1]) == (mine != "nothing")
