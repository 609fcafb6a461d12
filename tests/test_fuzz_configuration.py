"""Any configuration trains a rung or is refused: ours before a model is loaded and by name, the Trainer's by an error.

The settings of `TrainingArguments` are checked by `transformers`, and when it likes. What is required of them here is
that nothing goes wrong silently: they raise an error, or the rung is what it should be.
"""

import dataclasses
import json
import math
import shutil
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import WORDS, ALDRIFTTrainer, count_a, fuzz, lora_config, tiny_gpt2
from datasets import Dataset
from hypothesis import example, given, note
from peft import PromptTuningConfig
from transformers import TrainingArguments

from aldrift_hf import ALDRIFTConfig
from aldrift_hf.models import loading
from aldrift_hf.toy import word_tokenizer

SMALL = {
    "tau_max": 1.5,
    "objective_range": 6.0,
    "num_rungs": 1,
    "sampler": "metropolis_hastings",
    "num_generations": 4,
    "chain_length": 2,
    "max_completion_length": 2,
    "per_device_generation_batch_size": 8,
    "per_device_train_batch_size": 2,
    "updates_per_rung": 1,
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
}

NO_NUMBERS = ["", "1", "1e-3", "abc", b"1", [1], {}, (1.0,), 1j, math.nan, math.inf, -math.inf, True, False, None]
WHOLE = [0, 1, 2, 3, -1, -2, 1.0, 2.5, Fraction(1, 2), np.int64(2), np.float32(1), 2**31, 2**63, 10**30, -(10**30)]
REAL = [0.0, 0.1, 0.5, 1.0, 2.0, 1e-12, 1e-300, 1e12, 1e300, 5e-324, -0.1, -1.0, -1e300, np.float64(0.5)]
SWITCH = [True, False, 0, 1, "yes", "False", None, np.bool_(True), []]
WORDS_OR_NOT = ["", "no", "none", "all", "nope", "\0", "é", 0, 1.5, None, True, [], ["none"], {}]
MAPS = [None, "{}", "{", "[]", "nope.json", {}, {"nope": 1}, {"lr_end": 1.0}, {"num_cycles": 2}, [], 3, {1: 2}]

CHOICES = {
    "sampler": ["metropolis_hastings", "suffix", "span", "archive", "top", "reweight"],
    "ladder": ["linear", "adaptive"],
    "loss_type": ["nll", "generalized_kl"],
    "objective_on_error": ["raise", "worst"],
    "engine": ["transformers"],
    "save_strategy": ["no", "steps", "epoch", "best"],
    "eval_strategy": ["no", "steps", "epoch"],
    "logging_strategy": ["no", "steps", "epoch"],
    "lr_scheduler_type": [
        *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"),
        *("reduce_lr_on_plateau", "cosine_with_min_lr", "warmup_stable_decay", "greedy"),
    ],
    "optim": [
        *("adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop", "adagrad", "adamw_8bit", "lion_32bit"),
        *("galore_adamw", "lomo", "schedule_free_adamw", "stable_adamw", "apollo_adamw", "adamw_torch_4bit", "muon"),
    ],
    "report_to": ["none", "tensorboard", "wandb", ["none"]],
    "metric_for_best_model": ["loss", "objective", "eval_kl", "success", "missing_mass", "khat"],
    "log_level": ["passive", "error", "debug"],
    "debug": ["underflow_overflow", "tpu_metrics_debug"],
    "include_num_input_tokens_seen": ["no", "all", "non_padding", True],
    "train_sampling_strategy": ["random", "sequential", "group_by_length"],
    "hub_strategy": ["end", "every_save"],
}
WHOLES = [
    *("num_generations", "chain_length", "archive_window", "max_objective_calls", "max_completion_length"),
    *("per_device_generation_batch_size", "scoring_batch_tokens", "updates_per_rung", "num_rungs", "seed"),
    *("data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size"),
    *(
        "save_total_limit",
        "torch_empty_cache_steps",
        "eval_accumulation_steps",
        "save_steps",
        "eval_steps",
        "logging_steps",
    ),
]
REALS = [
    *("tau_max", "tau_step", "ess_threshold", "learning_rate", "weight_decay", "adam_beta1"),
    *("adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "warmup_steps", "save_steps"),
    *("eval_steps", "logging_steps", "eval_delay", "neftune_noise_alpha"),
]
SWITCHES = [
    *("pareto_smoothing", "overlap_objective", "log_completions", "bf16", "fp16", "bf16_full_eval", "fp16_full_eval"),
    *("gradient_checkpointing", "auto_find_batch_size", "dataloader_drop_last", "dataloader_persistent_workers"),
    *("dataloader_pin_memory", "load_best_model_at_end", "greater_is_better", "eval_on_start", "logging_first_step"),
    *("logging_nan_inf_filter", "ignore_data_skip", "skip_memory_metrics", "batch_eval_metrics", "use_cache"),
    *("average_tokens_across_devices", "remove_unused_columns", "save_only_model", "prediction_loss_only"),
    *("use_liger_kernel", "tf32", "do_train", "do_eval", "disable_tqdm"),
]
OTHERS = {
    "num_train_epochs": [3.0, 1, 2, 1.0, 0, -1.0, -2, 1.5, *NO_NUMBERS],
    # No large ones: PyTorch would start as many workers, and fill their queues.
    "dataloader_num_workers": [0, 1, 2, -1, 1.0, *NO_NUMBERS],
    "dataloader_prefetch_factor": [1, 2, 0, -1, 1.5, *NO_NUMBERS],
    "max_steps": [1, 2, 3, 0, -1, -2, 1.0, *NO_NUMBERS],
    "objective_weights": [None, [1.0], [0.5], [0.5, 0.5], [0.0], [], [-1.0], [math.nan], ["1"], 1.0, "1", [True], (1,)],
    "objective_range": [6.0, 7, 1e6, 1e300, 0, -1.0, *NO_NUMBERS],
    "model_init_kwargs": [*MAPS, {"dtype": "float32"}, {"dtype": "nope"}, '{"dtype": "bfloat16"}', {"revision": 3}],
    "gradient_checkpointing_kwargs": [*MAPS, {"use_reentrant": False}, {"use_reentrant": True}],
    "lr_scheduler_kwargs": [*MAPS, {"min_lr": 1e-9}, {"num_decay_steps": 1}],
    "accelerator_config": [*MAPS, {"split_batches": True}, {"dispatch_batches": True}, {"even_batches": False}],
    "optim_args": [None, "", "a=1", "=", "momentum=0.9", 3],
    "label_names": [None, ["labels"], ["nope"], [], "labels"],
    "run_name": WORDS_OR_NOT,
    "output_dir": ["", "\0", "/dev/null/out", "/proc/out", 3, None, True],
}


def values(name):
    """Good and bad values of a setting; the good ones often enough."""
    kinds = []
    if name in CHOICES:
        kinds += [CHOICES[name], CHOICES[name], WORDS_OR_NOT]
    if name in WHOLES:
        kinds += [[1, 2, 3], [1, 2, 3], WHOLE, NO_NUMBERS]
    if name in REALS:
        kinds += [[0.1, 0.5, 1.0, 3.0], REAL, REAL, NO_NUMBERS]
    if name in SWITCHES:
        kinds += [[True, False], SWITCH]
    if name in OTHERS:
        kinds += [OTHERS[name]]
    return st.one_of(map(st.sampled_from, kinds))


NAMES = sorted({*CHOICES, *WHOLES, *REALS, *SWITCHES, *OTHERS})
SETTINGS = st.lists(st.sampled_from(NAMES), max_size=4, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: values(name) for name in names})
)


def in_numpy(prompts, completions):
    return np.array(count_a(prompts, completions), dtype=np.float32)


def in_torch(prompts, completions, **columns):
    return torch.tensor(count_a(prompts, completions))


def whole(prompts, completions, **columns):
    return tuple(int(cost) for cost in count_a(prompts, completions))


async def awaited(prompts, completions, **columns):
    return count_a(prompts, completions)


def wanting(prompts, completions, weight):
    return count_a(prompts, completions)


CHAT = [{"role": "user", "content": "a c"}]
PROMPTS = [
    *(None, ["a"], ["a b", "c", ""], [""], ["a", "a"], [CHAT], [CHAT, [{"role": "user", "content": "b"}]]),
    *(
        ["é\0\ud7ff"],
        ["x" * 100],
        ["a " * 20],
        [],
        [None],
        [3],
        [[]],
        ["a", 3],
        "a b",
        {"prompt": ["a"]},
        7,
        ["\ud800"],
    ),
    *(
        [CHAT, "a"],
        ["\ud800"],
        [[{"role": "user"}]],
        [[{"content": "a"}]],
        [{"prompt": "a", "weight": 1.0}],
        [{"text": "a"}],
    ),
    *(Dataset.from_dict({"prompt": ["a"], "weight": [1.0]}), Dataset.from_dict({"prompt": []})),
]
ARGUMENTS = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["path", "path", "path", "adapter", "instance", "nowhere"]),
        "objective": st.one_of(
            st.just(count_a),
            st.sampled_from(
                [in_numpy, in_torch, whole, awaited, wanting, [count_a], [count_a, awaited], [], "count_a", 3]
            ),
        ),
    },
    optional={
        "train_dataset": st.sampled_from(PROMPTS),
        "eval_dataset": st.sampled_from(PROMPTS),
        "peft_config": st.sampled_from(["lora", "lora", "lora", "none", "prompt", 3]),
        "template": st.booleans(),
        "tokenizer": st.booleans(),
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and an adapter on disk, loaded as their users do."""
    place = tmp_path_factory.mktemp("fuzz")
    model, tokenizer = tiny_gpt2(), word_tokenizer(WORDS, " ")
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    return place


CHECKED_HERE = {
    *("output_dir", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("auto_find_batch_size", "label_smoothing_factor", "dataloader_persistent_workers", "remove_unused_columns"),
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
}
"""Settings of `TrainingArguments` that this package checks as it does its own."""
LEFT_TO_TRANSFORMERS = {field.name for field in dataclasses.fields(TrainingArguments)} - CHECKED_HERE


class Refusal(NamedTuple):
    """Why a configuration was not trained, and whether that was said before the model was loaded."""

    error: Exception
    in_time: bool


def run(folder, settings, arguments):
    """Trains, or says why not: `(refusal, trainer)`, one of them `None`."""
    arguments = dict(arguments)
    kind = arguments.pop("model")
    kwargs = {name: arguments[name] for name in ("train_dataset", "eval_dataset") if name in arguments}
    peft = arguments.get("peft_config", "lora")
    if peft != "none":
        prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        kwargs["peft_config"] = {"lora": lora_config(tiny_gpt2()), "prompt": prompt}.get(peft, peft)
    model = {"instance": tiny_gpt2, "path": lambda: str(folder / "model")}.get(kind, lambda: str(folder / kind))()
    if arguments.get("tokenizer") or kind == "instance" or arguments.get("template"):
        kwargs["processing_class"] = word_tokenizer(WORDS, " ")
        if arguments.get("template"):
            kwargs["processing_class"].chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    loads = []

    def spy(name, *others):
        model = load(name, *others)
        loads.append(name)
        return model

    load = loading.load_model
    out = tempfile.mkdtemp(dir=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_model", spy)
        patch.chdir(out)
        try:
            args = ALDRIFTConfig(**{"output_dir": out, **SMALL, **settings})
            trainer = ALDRIFTTrainer(model, arguments["objective"], args, **kwargs)
            trainer.train()
        except Exception as error:
            return Refusal(error, in_time=not loads), None
    return None, trainer


def check(folder, settings, arguments):
    refusal, trainer = run(folder, settings, arguments)
    if refusal is not None:
        note(f"refused: {refusal.error!r}")
        if not LEFT_TO_TRANSFORMERS & settings.keys():
            assert refusal.in_time, "refused after the model was loaded"
            assert isinstance(refusal.error, (ValueError, TypeError, OSError))
            told = [*settings, "prompt", "_dataset", "objective", "peft_config", "processing_class", "model"]
            assert any(name in str(refusal.error) for name in told), refusal.error
        return
    out = Path(trainer.args.output_dir)
    record = json.loads((out / "run.json").read_text())
    assert record["finished"]
    assert json.loads((out / "rungs.jsonl").read_text().splitlines()[0])["rung"] == 0
    for name, value in {**trainer.record.rungs[0], **record["metrics"]}.items():
        assert value is None or math.isfinite(value) or name in ("khat", "archive_khat", "acceptance_rate"), name
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    shutil.rmtree(out)


PLAIN = {"model": "path", "objective": count_a}


def once(settings, **arguments):
    """A configuration that once was not refused in time, or not by name, or that `transformers` refuses now."""
    return example(settings, {**PLAIN, **arguments})


@pytest.mark.slow
@once({"weight_decay": None})
@once({"adam_beta1": 1.0})
@once({"adam_epsilon": 0.0})
@once({"debug": 0})
@once({"neftune_noise_alpha": 1e300})
@once({"bf16": np.bool_(True)})
@once({"dataloader_num_workers": -1})
@once({"dataloader_drop_last": "yes"})
@once({"optim": "lomo"})
@once({"lr_scheduler_type": "cosine_with_min_lr"})
@once({"report_to": "wandb"})
@once({"fp16": True})
@once({"log_level": "nope"})
@once({"seed": -1})
@once({"save_strategy": "steps", "save_steps": 0})
@once({"eval_strategy": "epoch", "metric_for_best_model": "loss"})
@once({"sampler": "archive", "remove_unused_columns": True})
@once({"gradient_accumulation_steps": 0})
@once({"chain_length": 2**31})
@once({"tau_max": 1e12, "tau_step": 1e-12})
@once({"output_dir": "\0"})
@once({"model_init_kwargs": {"dtype": "nope"}})
@once({"model_init_kwargs": {"nope": 1}})
@once({}, train_dataset=["a " * 20])
@once({}, eval_dataset=[3])
@once({}, train_dataset=["\ud800"])
@once({}, train_dataset=[CHAT, "a"])
@once({}, train_dataset=[[]], template=True)
@once({}, peft_config=3)
@once({}, model="nowhere", tokenizer=True)
@fuzz(examples=40)
@given(SETTINGS, ARGUMENTS)
def test_a_configuration_is_refused_at_once_or_trains(folder, settings, arguments):
    check(folder, settings, arguments)
