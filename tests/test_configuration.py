"""The settings: what is refused, in which words, and how they travel (command line, YAML, copies, pickles)."""

import copy
import dataclasses
import functools
import json
import math
import pickle
import re

import numpy as np
import pytest
from conftest import EOS, ALDRIFTTrainer, count_a, lora_config, tiny_gpt2
from peft import get_peft_model
from transformers import TrainingArguments
from trl import TrlParser

from aldrift_hf import ALDRIFTConfig
from aldrift_hf.algorithm.ladders import LADDERS, AdaptiveLadder, LinearLadder
from aldrift_hf.algorithm.losses import LOSSES, GeneralizedKL, MaximumLikelihood
from aldrift_hf.algorithm.samplers import SAMPLERS, ArchiveSampler, MetropolisHastings, Sampler, Top
from aldrift_hf.models.engines import EngineSettings, TransformersEngine
from aldrift_hf.models.prior import FrozenAdapter, FrozenCopy
from aldrift_hf.trainer.open_settings import (
    fill_batches,
    ladder_name,
    loss_name,
    proposals_per_prompt,
    rows_to_accumulate,
    settled,
)
from aldrift_hf.trainer.optimizer import check_optimizer, schedule_kwargs
from aldrift_hf.trainer.settings import settings_of
from aldrift_hf.trainer.validation import check_parts, name_of
from aldrift_hf.types import Prompts


@pytest.fixture
def config(tmp_path):
    def make(**changes):
        return ALDRIFTConfig(**{"output_dir": str(tmp_path), "use_cpu": True, **changes})

    return make


# ---- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau_max": 0}, "tau_max must be positive and finite, got 0. tau_max: T, the inverse temperature"),
        ({"tau_max": -1.0}, "tau_max must be positive"),
        ({"tau_max": math.nan}, "tau_max must be positive"),
        ({"tau_max": "2"}, "tau_max must be of type float, got '2'"),
        ({"tau_max": True}, "tau_max must be of type float, got True"),
        ({"objective_range": 0.0}, "objective_range must be positive"),
        ({"objective_range": -2.0}, "objective_range must be positive"),
        ({"tau_step": 0.0}, "tau_step must be positive.*None: 1/objective_range"),
        ({"tau_step": 10**400}, "tau_step must be of type float"),
        ({"ess_threshold": 1}, "ess_threshold must be greater than 0 and less than 1, got 1"),
        ({"chain_length": 0}, "chain_length must be between 1 and 2,147,483,647, got 0"),
        ({"num_generations": 0}, "num_generations must be between 1 and 2,147,483,647, got 0"),
        ({"num_generations": 2.5}, "num_generations must be of type int, got 2.5"),
        ({"num_generations": True}, "num_generations must be of type int, got True"),
        ({"num_generations": 2**31}, "num_generations must be between"),
        ({"num_rungs": 0.5}, "num_rungs must be of type int, got 0.5. num_rungs: Number of rungs."),
        ({"num_rungs": 0}, "num_rungs must be between"),
        ({"archive_window": 1}, "archive_window must be between 2 and"),
        ({"updates_per_rung": 0}, "updates_per_rung must be"),
        ({"max_completion_length": 0}, "max_completion_length must be"),
        ({"per_device_generation_batch_size": 0}, "per_device_generation_batch_size must be"),
        ({"scoring_batch_tokens": 0}, "scoring_batch_tokens must be"),
        ({"max_objective_calls": 0}, "max_objective_calls must be"),
        ({"objective_weights": [-1.0]}, "objective_weights must be finite and at least 0"),
        ({"objective_weights": [math.nan]}, "objective_weights must be finite and at least 0"),
        ({"objective_weights": ["1"]}, r"objective_weights must be of type list\[float\], got \['1'\]"),
        ({"objective_weights": 1.0}, r"objective_weights must be of type list\[float\], got 1.0"),
        ({"pareto_smoothing": "yes"}, "pareto_smoothing must be of type bool, got 'yes'"),
        ({"overlap_objective": np.bool_(True)}, "overlap_objective must be of type bool"),
        ({"model_init_kwargs": "{"}, "model_init_kwargs must be a mapping, or the JSON text of one, got '{'"),
        ({"model_init_kwargs": "kwargs.json"}, "model_init_kwargs must be a mapping"),
        ({"model_init_kwargs": {1: 2}}, "model_init_kwargs must be"),
        ({"model_init_kwargs": []}, r"model_init_kwargs must be of type Union\[dict\[str, Any\], str\], got \[\]"),
        (
            {"sampler": "gibbs"},
            "sampler must be one of archive, metropolis_hastings, suffix, span, top, reweight, got 'gibbs'",
        ),
        ({"sampler": 3}, "sampler must be of type str, got 3"),
        ({"ladder": "snake"}, "ladder must be one of linear, adaptive, got 'snake'"),
        ({"loss_type": "hinge"}, "loss_type must be one of nll, generalized_kl, got 'hinge'"),
        ({"engine": "steam"}, "engine must be one of transformers.*, got 'steam'"),
        ({"objective_on_error": "ignore"}, "objective_on_error must be one of raise, worst, got 'ignore'"),
    ],
)
def test_bad_settings_are_refused(config, settings, message):
    """By name, with what is allowed, what was given, and what the setting is."""
    with pytest.raises(ValueError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"loss_type": "generalized_kl", "sampler": "metropolis_hastings"},
            "sampler='metropolis_hastings' does not draw by weight. Use sampler='archive', or loss_type='nll'",
        ),
        ({"pareto_smoothing": True, "sampler": "top"}, "pareto_smoothing .* Leave it off, or use sampler='archive'"),
        ({"ladder": "adaptive", "sampler": "top"}, "sampler='top' has none. Use ladder='linear'"),
        ({"ladder": "adaptive", "sampler": "reweight"}, "sampler='reweight' has none. Use ladder='linear'"),
        ({"ladder": "adaptive", "tau_step": 0.5}, "tau_step=0.5 has no meaning for ladder='adaptive'"),
        ({"tau_max": 1e12, "tau_step": 1e-12}, "at most 100,000 are allowed. Set a larger tau_step"),
        (
            {"tau_max": 1e12, "objective_range": 1e12, "ladder": "linear"},
            "at most 100,000 are allowed. Set a larger tau_step",
        ),
        ({"loss_type": "generalized_kl", "sampler": "suffix"}, "sampler='suffix' does not draw by weight"),
        ({"pareto_smoothing": True, "sampler": "suffix"}, "sampler='suffix' does not draw by weight. Leave it off"),
        (
            {"sampler": "suffix", "num_generations": 30, "chain_length": 8},
            "num_generations must be a multiple of chain_length=8, .* Set it to 24, or change chain_length",
        ),
        (
            {"sampler": "suffix", "chain_length": 1},
            "chain_length=1 leaves the chains of sampler='suffix' without a move, .* Set chain_length to at least 2",
        ),
        (
            {"sampler": "metropolis_hastings", "num_generations": 30, "chain_length": 8},
            "num_generations must be a multiple of chain_length=8, .* Set it to 24, or change chain_length",
        ),
        (
            {"sampler": "metropolis_hastings", "num_generations": 100, "chain_length": None},
            "num_generations must be a cube with chain_length=None, .* Set it to 125, or change chain_length",
        ),
        ({"objective_on_error": "worst"}, "gives failures the cost objective_range, which is not set. Set it"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_train_epochs": 0.5}, "num_train_epochs=0.5 has no meaning here.*Set num_rungs, the number of rungs"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True .* Set per_device_train_batch_size"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 adds noise to the embeddings.*Leave it out"),
        (
            {"metric_for_best_model": "kl", "eval_strategy": "epoch", "target_cost": 0.5, "tau_max": None},
            "metric_for_best_model='kl' has no value before T is found.*Set tau_max",
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
            r"such as 'kl'; got 'loss' \(transformers' default\)",
        ),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 .* Leave it at 0"),
        ({"label_smoothing_factor": math.nan}, "label_smoothing_factor=nan"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "Leave it off"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True removes columns that the loss needs"),
        ({"bf16_full_eval": True}, "bf16_full_eval=True casts the trained model's weights"),
        ({"fp16_full_eval": True}, "fp16_full_eval=True casts the trained model's weights"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be a whole number between 1 and"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be a whole number between 1 and"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps must be a whole number"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches=True changes the number of updates per rung"),
        ({"metric_for_best_model": "loss", "eval_strategy": "epoch"}, "metric_for_best_model must be one of objective"),
    ],
)
def test_settings_of_the_trainer_that_would_silently_break_a_rung_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_strategy": "sometimes"}, "sometimes is not a valid IntervalStrategy"),
        ({"optim": "nope"}, "nope is not a valid OptimizerNames"),
        ({"warmup_steps": -1}, "warmup_steps (>= 0|must be an integer or a float)"),  # transformers 5.23, 5.6
        ({"fp16": True, "bf16": True}, "At most one of fp16 and bf16"),
        ({"lr_scheduler_type": "greedy"}, "greedy requires an eval strategy"),
    ],
)
def test_other_settings_of_the_trainer_are_checked_by_transformers(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_the_best_model_is_told_by_the_metrics_that_evaluate_measures(config):
    best = functools.partial(config, metric_for_best_model="success")
    assert settled(config(metric_for_best_model="eval_kl"), 1).greater_is_better is False
    assert settled(best(), 1).greater_is_better is True
    assert settled(best(greater_is_better=False), 1).greater_is_better is False
    assert settled(dataclasses.replace(best(), metric_for_best_model="kl"), 1).greater_is_better is False


# ---- Settings that are resolved --------------------------------------------------------------------------------------


def test_whole_numbers_are_good_for_floats(config):
    assert config(tau_max=2, objective_range=7, objective_weights=[1, 0.5]).tau_max == 2


def test_chains_divide_a_rungs_proposals(config):
    chains = config(sampler="metropolis_hastings", num_generations=24, chain_length=8)
    assert (chains.num_chains, chains.steps_per_chain) == (3, 8)
    papers = config(sampler="metropolis_hastings", num_generations=64, chain_length=None)
    assert (papers.num_chains, papers.steps_per_chain) == (4, 16)


@pytest.mark.parametrize("sampler", ["archive", "top", "reweight"])
def test_samplers_without_chains_take_any_number_of_proposals(config, sampler):
    assert config(sampler=sampler, num_generations=100, chain_length=8).num_chains == 12
    assert config(sampler=sampler, num_generations=4, chain_length=8).num_chains == 1


def test_loss_and_ladder_follow_from_the_sampler_unless_they_are_set():
    assert [loss_name(None, sampler) for sampler in (ArchiveSampler, MetropolisHastings)] == ["generalized_kl", "nll"]
    assert loss_name("nll", ArchiveSampler) == "nll"
    assert [ladder_name(None, None, sampler) for sampler in (ArchiveSampler, MetropolisHastings)] == [
        "adaptive",
        "linear",
    ]
    assert ladder_name(None, 0.5, ArchiveSampler) == "linear"
    assert ladder_name("linear", None, ArchiveSampler) == "linear"


@pytest.mark.parametrize(
    ("budget", "prompts", "chain_length", "expected"),
    [
        (None, 1, 1, 1024),
        (None, 16, 8, 64),
        (None, 5000, 1, 2),  # from one draw for a prompt no error can be told
        (8 * 600, 600, 1, 2),
        (8 * 600 - 1, 600, 1, 1),
        (None, 5000, 8, 8),  # one chain
        (5120, 1, 1, 512),
        (5120, 7, 8, 72),
        (100_000, 1, 1, 1024),
        (12, 100, 1, 1),
        (None, 1, None, 1000),  # the paper's n = m³
        (1250, 1, None, 125),
        (20, 1, None, 1),
    ],
)
def test_a_rungs_size_follows_from_the_budget_and_the_prompts(config, budget, prompts, chain_length, expected):
    assert proposals_per_prompt(budget, prompts, chain_length) == expected
    sampler = "archive" if chain_length == 1 else "metropolis_hastings"
    settings = config(
        sampler=sampler, num_generations=None, max_objective_calls=budget, chain_length=chain_length, tau_step=1.0
    )
    assert settings.proposals_for(prompts) == expected
    assert dataclasses.replace(settings, num_generations=expected).proposals_for(3) == expected


@pytest.mark.parametrize(
    ("sampler", "rows", "processes", "expected"),
    [("archive", 8, 1, 16), ("archive", 8, 2, 8), ("archive", 128, 1, 1), ("archive", 300, 1, 1), ("top", 8, 1, 1)],
)
def test_an_update_has_enough_rows(config, monkeypatch, sampler, rows, processes, expected):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert rows_to_accumulate(SAMPLERS[sampler], rows) == expected
    monkeypatch.setenv("WORLD_SIZE", "1")
    settings = settled(config(sampler=sampler, per_device_train_batch_size=rows), 1)
    assert settings.gradient_accumulation_steps == expected * processes
    assert config(sampler=sampler, gradient_accumulation_steps=3).gradient_accumulation_steps == 3


@pytest.mark.parametrize(
    ("width", "batch", "expected"),
    [
        (8, (8, 16), (128, 1)),
        (16, (8, 16), (64, 2)),
        (17, (8, 16), (32, 4)),
        (65, (8, 16), (8, 16)),
        (8, (8, 3), (8, 3)),
    ],
)
def test_batches_of_short_texts_are_larger(config, width, batch, expected):
    """And an update has as many rows, of at most 1,024 tokens."""
    settings = config(per_device_train_batch_size=batch[0], gradient_accumulation_steps=batch[1])
    fill_batches(settings, width)
    assert (settings.per_device_train_batch_size, settings.gradient_accumulation_steps) == expected


@pytest.mark.parametrize(
    ("asked", "expected"),
    [({}, (128, 1)), ({"per_device_train_batch_size": 8}, (8, 16)), ({"gradient_accumulation_steps": 2}, (8, 2))],
)
def test_only_what_is_left_open_is_filled(config, tokenizer, asked, expected):
    given = {"per_device_train_batch_size": None, "gradient_accumulation_steps": None, **asked}
    model, settings = tiny_gpt2(), config(sampler="archive", max_completion_length=7, **given)
    trainer = ALDRIFTTrainer(model, count_a, settings, processing_class=tokenizer, peft_config=lora_config(model))
    found = trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps
    assert found == expected
    assert trainer.run.rows_per_update == expected[0] * expected[1]
    assert settings.per_device_train_batch_size == given["per_device_train_batch_size"], "the user's own stay"


@pytest.mark.parametrize("copied", ["replace", "to_dict", "json"])
@pytest.mark.parametrize("changes", [{}, {"sampler": "top"}, {"per_device_train_batch_size": 16}, {"target_cost": 0.3}])
def test_a_copy_leaves_open_what_was_left_open(config, copied, changes):
    settings = config()
    plain = settings.to_dict() if copied == "to_dict" else json.loads(settings.to_json_string())
    copy = dataclasses.replace(settings, **changes) if copied == "replace" else ALDRIFTConfig(**{**plain, **changes})
    names = ("tau_max", "per_device_train_batch_size", "gradient_accumulation_steps", "greater_is_better")
    for each, fresh in ((copy, config(**changes)), (settled(copy, 3), settled(config(**changes), 3))):
        assert [getattr(each, name) for name in names] == [getattr(fresh, name) for name in names]
    assert settled(copy, 3).fills_batches == settled(config(**changes), 3).fills_batches
    assert copy.to_sanitized_dict()["train_batch_size"] == (16 if "per_device_train_batch_size" in changes else 8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tau_max": -3.0}, "tau_max must be positive"),
        ({"num_train_epochs": 1}, "num_train_epochs=1 has no meaning here"),
        ({"sampler": "mh"}, "sampler must be one of"),
        ({"tau_max": 2.0, "target_cost": 0.1}, "tau_max and target_cost each choose T"),
    ],
)
def test_what_is_changed_afterwards_is_checked(config, tokenizer, changes, said):
    settings = config()
    for name, value in changes.items():
        setattr(settings, name, value)
    model = tiny_gpt2()
    with pytest.raises(ValueError, match=said):
        ALDRIFTTrainer(model, count_a, settings, processing_class=tokenizer, peft_config=lora_config(model))


# ---- Parts of the user's own -----------------------------------------------------------------------------------------


class Own(Sampler):
    """Takes the first proposals."""

    corrects = False

    def select(self, pool, tau_before, tau, size, generator):
        raise NotImplementedError


def test_a_registered_sampler_can_be_named(config, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="sampler must be one of"):
        config(sampler="own")
    monkeypatch.setitem(SAMPLERS, "own", Own)
    config(sampler="own")
    assert loss_name(None, Own) == "nll"
    (parsed,) = TrlParser((ALDRIFTConfig,)).parse_args_and_config(
        ["--output_dir", str(tmp_path), "--sampler", "own", "--use_cpu"]
    )
    assert parsed.sampler == "own"
    with pytest.raises(
        ValueError, match="ladder='adaptive' takes its steps by the weights, and sampler='own' has none"
    ):
        config(sampler="own", ladder="adaptive")


def test_instances_are_checked_by_what_they_can_do(config):
    settings = config(sampler="archive")
    check_parts(settings, ArchiveSampler(), LinearLadder(), GeneralizedKL())
    check_parts(settings, Own(), LinearLadder(), MaximumLikelihood())
    with pytest.raises(ValueError, match=r"generalized_kl. .* sampler=.Own. does not draw by weight"):
        check_parts(settings, Own(), LinearLadder(), GeneralizedKL())
    with pytest.raises(ValueError, match="sampler='Own' has none"):
        check_parts(settings, Own(), AdaptiveLadder(0.5, 64), MaximumLikelihood())
    with pytest.raises(ValueError, match="num_generations must be a multiple"):
        check_parts(config(num_generations=30), MetropolisHastings(3), LinearLadder(), MaximumLikelihood())
    with pytest.raises(
        ValueError, match=r"multiple of chain_length=7, .* Set it to 63, or .* chain_length of the samp"
    ):
        check_parts(config(num_generations=64), MetropolisHastings(7), LinearLadder(), MaximumLikelihood())


def test_parts_are_named_as_in_the_settings_or_by_their_class():
    assert name_of(Top(2), SAMPLERS) == name_of(Top, SAMPLERS) == "top"
    assert name_of(GeneralizedKL(), LOSSES) == "generalized_kl"
    assert name_of(AdaptiveLadder(0.5, 64), LADDERS) == "adaptive"
    assert name_of(Own(), SAMPLERS) == "Own"


# ---- Command line, YAML, copies --------------------------------------------------------------------------------------


def test_every_setting_works_from_the_command_line_and_from_yaml(tmp_path):
    arguments = {
        "tau_max": 5.0, "objective_range": 7.0, "ladder": "linear", "tau_step": 0.5, "sampler": "top",
        "num_generations": 48, "chain_length": 12, "updates_per_rung": 3, "max_completion_length": 9,
        "per_device_generation_batch_size": 17, "max_objective_calls": 99, "objective_weights": [1.0, 0.5],
        "model_init_kwargs": {"revision": "x"}, "log_completions": True, "num_rungs": 8, "engine": "transformers",
        "loss_type": "nll", "ess_threshold": 0.25, "archive_window": 4, "objective_on_error": "worst",
        "scoring_batch_tokens": 99, "overlap_objective": False, "pareto_smoothing": False,
    }  # fmt: skip
    line = []
    for name, value in arguments.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        line += [f"--{name}", *map(str, values)]
    (parsed,) = TrlParser((ALDRIFTConfig,)).parse_args_and_config(["--output_dir", str(tmp_path), *line])
    (tmp_path / "run.yaml").write_text(json.dumps({"output_dir": str(tmp_path), **arguments}))
    (from_yaml,) = TrlParser((ALDRIFTConfig,)).parse_args_and_config(["--config", str(tmp_path / "run.yaml")])
    for name, value in arguments.items():
        assert getattr(parsed, name) == value, name
        assert getattr(from_yaml, name) == value, name


@pytest.mark.parametrize("setting", ["sampler: gibbs", "ladder: snake", "loss_type: hinge", "engine: steam"])
def test_choices_hold_for_yaml_too(tmp_path, setting):
    (tmp_path / "run.yaml").write_text(setting)
    with pytest.raises(ValueError, match=f"{setting.split(':')[0]} must be one of"):
        TrlParser((ALDRIFTConfig,)).parse_args_and_config(["--config", str(tmp_path / "run.yaml")])


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit):
        TrlParser((ALDRIFTConfig,)).parse_args_and_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "T, the inverse temperature of the target" in text
    assert "M, proposals per Metropolis-Hastings chain" in text
    assert "--sampler {archive,metropolis_hastings,suffix,span,top,reweight}" in text
    assert "--loss_type {nll,generalized_kl}" in text


def test_the_docstring_and_the_help_know_every_setting():
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    entries = re.findall(r"^        ([a-z][a-z_, ]*) \(`", ALDRIFTConfig.__doc__, flags=re.MULTILINE)
    described = [name for entry in entries for name in entry.split(", ")]
    own = [field for field in dataclasses.fields(ALDRIFTConfig) if field.name not in inherited]
    assert sorted(described) == sorted(field.name for field in own)
    for field in own:
        assert field.metadata["help"].endswith("."), field.name


def test_copies_are_alike_and_keep_secrets(config):
    loading, engine = '{"token": "hf_word", "dtype": "float32"}', '{"api_key": "hf_word", "timeout": 3}'
    settings = config(hub_token="hf_word", model_init_kwargs=loading, engine_kwargs=engine, tau_max=3.0)
    changed = dataclasses.replace(settings, tau_max=2.0)
    assert (changed.tau_max, settings.tau_max) == (2.0, 3.0)
    shallow = copy.copy(settings)
    shallow.num_train_epochs = 7
    assert settings.num_train_epochs == TrainingArguments.num_train_epochs
    for each in (settings, changed, shallow):
        assert each.hub_token == "hf_word"
        assert each.model_init_kwargs == {"token": "hf_word", "dtype": "float32"}
        assert each.engine_kwargs == {"api_key": "hf_word", "timeout": 3}
        assert "hf_word" not in repr(each) + str(each.to_dict()) + each.to_json_string()
    stored = pickle.dumps(settings)
    assert b"hf_word" not in stored
    restored = pickle.loads(stored)
    assert (restored.tau_max, restored.hub_token) == (3.0, None)


# ---- Optimizer and schedule ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": -1.0}, "Invalid learning rate"),
        ({"learning_rate": math.inf}, "two updates turn a weight of 1 into nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1.*: weight_decay must be at least 0"),
        ({"weight_decay": None}, "weight_decay=None"),
        ({"weight_decay": math.nan}, "two updates turn a weight of 1 into nan"),
        ({"adam_beta1": 1.0}, "Invalid beta"),
        ({"adam_epsilon": 0.0}, "two updates turn a weight of 1 into nan"),
        ({"optim": "lomo"}, "lomo"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        (
            {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 0}, "warmup_steps": 1},
            "division by zero",
        ),
    ],
)
def test_an_optimizer_that_cannot_work_is_refused_with_its_settings(config, settings, message):
    with pytest.raises(ValueError, match=f"(?s)no working optimizer and schedule can be made from .*{message}"):
        check_optimizer(config(**settings))


def test_the_schedule_is_worked_out_without_a_change_to_the_settings(config):
    settings = config(lr_scheduler_type="warmup_stable_decay")
    before = copy.deepcopy(settings.to_dict())
    assert schedule_kwargs(settings, 100) == {"num_decay_steps": 30, "decay_type": "linear"}
    assert schedule_kwargs(settings, 200)["num_decay_steps"] == 60
    check_optimizer(settings)
    assert settings.to_dict() == before
    own = config(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 3})
    assert schedule_kwargs(own, 100) == {"num_decay_steps": 3}
    assert schedule_kwargs(config(), 100) == {}


# ---- The record's settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [True, False])
def test_the_recorded_settings_are_plain_and_as_asked(config, tokenizer, adapter):
    model = tiny_gpt2()
    policy = get_peft_model(model, lora_config(model), adapter_name="mine") if adapter else model
    engine = TransformersEngine(EngineSettings(3, (EOS,), EOS))
    settings = config(hub_token="hf_word", model_init_kwargs={"token": "hf_word"}, sampler="top", num_rungs=2)
    recorded = settings_of(
        settings,
        policy,
        FrozenAdapter("prior") if adapter else FrozenCopy(model),
        ["cost"],
        Prompts([{"prompt": ""}], [[EOS]], ["key"]),
        tokenizer,
        sampler=Own(),
        ladder=LinearLadder(),
        loss=MaximumLikelihood(),
        engine=engine,
    )
    assert json.loads(json.dumps(recorded)) == recorded
    assert "hf_word" not in json.dumps(recorded)
    assert recorded["adapter_name"] == ("mine" if adapter else None)
    assert (recorded["sampler"], recorded["corrects"]) == ("Own", False)
    assert (recorded["ladder"], recorded["loss"], recorded["loss_type"]) == ("linear", "nll", None)
    assert recorded["engine"] == "transformers"
    assert (recorded["objective_range"], recorded["num_rungs"]) == (None, 2)
    assert recorded["prior_adapter"] == ("prior" if adapter else None)


@pytest.mark.parametrize(("schedule", "floor"), [("cosine_with_min_lr", "min_lr"), ("polynomial", "lr_end")])
def test_a_schedule_that_ends_at_a_rate_needs_one_to_begin_with(config, schedule, floor):
    asked = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": {floor: 1e-6}}
    with pytest.raises(ValueError, match=rf"{floor}.* is a rate, .*Set learning_rate"):
        check_optimizer(config(learning_rate=None, **asked))
    check_optimizer(config(learning_rate=1e-3, **asked))
