"""The command `aldrift`, as a user meets it."""

import dataclasses
import json
import os
import random
import re
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import (
    CONFIGS,
    EOS,
    WORDS,
    ALDRIFTTrainer,
    accelerate_launch,
    count_a,
    every_completion,
    log_probs,
    lora_config,
    tiny_gpt2,
)
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import get_quantization_config

from aldrift_hf import ALDRIFTConfig, MetropolisHastings, cli, evaluated_texts
from aldrift_hf.cli import env, runs, train
from aldrift_hf.cli.functions import load_function
from aldrift_hf.cli.parser import GROUPS, RunParser, TaskArguments
from aldrift_hf.cli.task import load_prompts
from aldrift_hf.models.prior import base_model
from aldrift_hf.reporting.record import RunRecord
from aldrift_hf.reporting.report import write_report
from aldrift_hf.toy import word_tokenizer

pytestmark = pytest.mark.versions

COSTS = """
factor = 1.0

def not_a(prompts, completions, **columns):
    return [float(sum(word != "a" for word in text.split())) for text in completions]

def weighed(prompts, completions, weight):
    return [w * c for w, c in zip(weight, not_a(prompts, completions))]
"""
RUN = {
    "tau_max": 1.5,
    "tau_step": 0.5,
    "num_rungs": 3,
    "objective_range": 3,
    "max_completion_length": 3,
    "sampler": "metropolis_hastings",
    "num_generations": 128,
    "chain_length": 4,
    "updates_per_rung": 4,
    "learning_rate": "1e-2",
    "lora_r": 4,
    "use_cpu": True,
    "disable_tqdm": False,
}


@pytest.fixture
def here(tmp_path, monkeypatch, no_report):
    """A working directory with a model and a module of costs."""
    tiny_gpt2().save_pretrained(tmp_path / "model")
    word_tokenizer(WORDS, " ").save_pretrained(tmp_path / "model")
    (tmp_path / "costs.py").write_text(COSTS)
    monkeypatch.delitem(sys.modules, "costs", raising=False)  # another test's
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("costs", None)


def line(command="train", *more, **changes):
    settings = {"objective": "costs:not_a", "model_name_or_path": "model", "output_dir": "out", **RUN, **changes}
    flags = [part for name, value in settings.items() if value is not None for part in (f"--{name}", str(value))]
    return [command, *flags, *more]


@pytest.fixture
def run(here, capsys):
    """A trained run in `out`."""
    cli.main(line())
    capsys.readouterr()
    return here / "out"


def refused(capsys, argv) -> str:
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    (message,) = err.splitlines()
    return message


# ---- Training -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_says_how_it_came_out(here, capsys):
    cli.main(line())
    out = capsys.readouterr().out
    assert "final model: mean cost" in out
    assert "After 3 rungs, the model's mean cost is" in out
    AutoPeftModelForCausalLM.from_pretrained("out")


@pytest.mark.slow
def test_a_run_is_repeated_from_its_own_options(run, here):
    saved = yaml.safe_load((run / "run.yaml").read_text())
    assert saved.keys() == {"objective", "model_name_or_path", *RUN}
    cli.main(["train", "--config", "out/run.yaml", "--output_dir", "again"])
    assert yaml.safe_load((here / "again" / "run.yaml").read_text()) == saved
    for first, again in zip(RunRecord.read("out").rungs, RunRecord.read("again").rungs, strict=True):
        timeless = [key for key in first if not key.startswith("seconds_")]
        assert [first[key] for key in timeless] == [again[key] for key in timeless]


@pytest.mark.parametrize("name", ["costs:not_a", "costs.py:not_a"])
def test_objectives_by_module_and_by_file(here, name):
    cli.main(line(objective=name, num_rungs=1))
    assert RunRecord.read("out").settings["objective"] == ["not_a"]


@pytest.mark.parametrize("name", ["random.py", "costs-of.v2.py"])
def test_a_file_hides_no_module_and_may_have_any_name(here, name):
    Path(name).write_text("def one(prompts, completions):\n    return [1.0 for _ in completions]\n")
    assert load_function(f"{name}:one", "--objective")([], ["a"]) == [1.0]
    assert sys.modules["random"] is random


def test_a_file_is_a_module_that_processes_can_import(here):
    """A pool that spawns them hands them the function by its module's name."""
    (here / "pooled.py").write_text(
        "import multiprocessing\n\ndef one(text):\n    return float(len(text))\n\n"
        "def cost(prompts, completions):\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n        return pool.map(one, completions)\n"
    )
    try:
        assert load_function("pooled.py:cost", "--objective")([], ["abc"]) == [3.0]
    finally:
        del sys.modules["pooled"]


@pytest.mark.slow
def test_several_objectives_are_summed(here):
    cli.main(
        line(
            "train", "--objective", "costs:not_a", "costs.py:not_a", "--objective_weights", "0.5", "0.5", objective=None
        )
    )
    assert RunRecord.read("out").settings["objective_weights"] == [0.5, 0.5]


@pytest.mark.parametrize("name", ["prompts[1].jsonl", "prompts?.jsonl"])
def test_a_file_of_prompts_is_the_one_that_is_named(here, name):
    for file, prompt in ((name, "mine"), ("prompts1.jsonl", "another")):
        (here / file).write_text(json.dumps({"prompt": prompt}))
    assert load_prompts(TaskArguments(objective=["a:b"], dataset_name=name))["prompt"] == ["mine"]


def test_a_file_of_costs_may_import_what_lies_beside_it(here, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (here / "sub").mkdir()
    (here / "sub" / "beside.py").write_text("WEIGHT = 2.0")
    (here / "sub" / "my_costs.py").write_text("from beside import WEIGHT\ncost = lambda prompts, completions: WEIGHT")
    assert load_function("sub/my_costs.py:cost", "--objective")(None, None) == 2.0


def test_config_may_be_given_with_an_equals_sign(here):
    (here / "mine.yaml").write_text("tau_max: 3.0")
    *_, config, _ = RunParser("aldrift train", "", "").parse(["--objective", "a:b", "--config=mine.yaml"])
    assert config.tau_max == 3.0


def test_one_value_of_an_option_with_several_stands_by_itself_in_a_file(here):
    (here / "mine.yaml").write_text(
        "objective: costs:not_a\nobjective_weights: 2\nlora_target_modules: all-linear\ntau_max: 3"
    )
    task, config, model = RunParser("aldrift train", "", "").parse(["--config", "mine.yaml"])
    assert task.objective == ["costs:not_a"]
    assert config.objective_weights == [2]
    assert model.lora_target_modules == "all-linear"


def test_null_in_a_file_is_the_default_of_an_option_that_has_no_use_for_it(here):
    (here / "mine.yaml").write_text(
        "objective: costs:not_a\nseed: null\nreport_to: null\ntau_max: 3\nlora_target_modules: null\nuse_peft: null\n"
        "save_total_limit: null"
    )
    _, config, model = RunParser("aldrift train", "", "").parse(["--config", "mine.yaml"])
    assert (config.seed, config.report_to, model.use_peft) == (42, [], True)
    assert (config.save_total_limit, model.lora_target_modules) == (None, None)  # here it means something


@pytest.mark.parametrize("content", ["", '{"prompt": "a"}\n{"prompt": '])
def test_a_file_of_prompts_without_prompts_is_named(here, content):
    (here / "mine.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"--dataset_name mine\.jsonl is empty or damaged"):
        load_prompts(TaskArguments(objective=[], dataset_name="mine.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "txt", "prompt"])
def test_prompts_from_a_file_or_the_command_line(here, kind, capsys):
    rows = {"prompt": ["a", "b c"], "weight": [1.0, 0.5]}
    dataset = Dataset.from_dict(rows)
    write = {"jsonl": dataset.to_json, "csv": dataset.to_csv, "parquet": dataset.to_parquet}
    if kind in write:
        write[kind](here / f"prompts.{kind}")
    (here / "prompts.txt").write_text("a\nb c\n")
    name = "a b" if kind == "prompt" else f"prompts.{kind}"
    cli.main(line(dataset_name=name, objective="costs:weighed" if kind in write else "costs:not_a", num_rungs=1))
    prompts = [draw["prompt"] for draw in RunRecord.read("out").draws]
    assert list(dict.fromkeys(prompts)) == (["a b"] if kind == "prompt" else rows["prompt"])


@pytest.mark.slow
def test_an_adapter_is_trained_on_and_is_the_prior(run, here, capsys):
    cli.main(line(model_name_or_path="out", output_dir="second", num_rungs=1))
    assert (here / "second" / "prior" / "adapter_model.safetensors").is_file()
    assert abs(RunRecord.read("second").rungs[0]["missing_mass"]) < 1e-4
    capsys.readouterr()
    shutil.rmtree("out")  # its copy, the prior, was saved beside the trained adapter
    cli.main(["sample", "second", "-n", "3"])
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.slow
def test_a_run_from_python_with_an_adapter_of_another_name(here, capsys):
    """Its weights lie in a subfolder; the command loads the prior, and with it the adapter, as `default`."""
    model = AutoModelForCausalLM.from_pretrained("model")
    policy = get_peft_model(model, lora_config(model), adapter_name="mine")
    settings = {"tau_max": 1.5, "objective_range": 3.0, "max_completion_length": 3, "updates_per_rung": 4}
    args = ALDRIFTConfig(output_dir="out", learning_rate=1e-2, num_rungs=1, report_to="none", use_cpu=True, **settings)
    trainer = ALDRIFTTrainer(policy, load_function("costs:not_a", "--objective"), args)
    trainer.train()
    trainer.save_model()
    expected = log_probs(base_model(trainer.model), [EOS], every_completion())
    capsys.readouterr()
    _, loaded = runs.load(
        RunParser("aldrift sample", "usage", "what it does"),
        ["out", "--objective", "costs:not_a"],
        str(here / "scratch"),
    )
    assert loaded.model.active_adapter == "default"
    assert torch.equal(log_probs(base_model(loaded.model), [EOS], every_completion()), expected)


@pytest.mark.slow
def test_resumed_from_the_command_line(here):
    cli.main(line(num_rungs=2))
    cli.main(line("train", "--resume_from_checkpoint", "True"))
    assert [rung["tau"] for rung in RunRecord.read("out").rungs] == [0.5, 1.0, 1.5]


def test_what_does_not_begin_leaves_the_options_of_the_run_that_is_there(run, here, capsys):
    """Its model would be corrected towards another target."""
    options = (run / "run.yaml").read_text()
    (here / "costs.py").write_text("def not_a(prompts, completions, **columns):\n    raise OSError('no answer')")
    sys.modules.pop("costs")
    for wrong, said in ((("--resume_from_checkpoint", "True"), "tau_max = 1.5, not 9.0"), ((), "no answer")):
        with pytest.raises(SystemExit):
            cli.main(line("train", *wrong, tau_max=9, num_rungs=18))
        assert said in capsys.readouterr().err
        assert (run / "run.yaml").read_text() == options


@pytest.mark.slow
def test_under_accelerate_launch(here):
    how = (CONFIGS / "multi_cpu.yaml", "-m", "aldrift_hf.cli")
    done = accelerate_launch(*how, *line(num_rungs=1))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("final model: mean cost") == 1
    assert RunRecord.read("out").settings["processes"] == 2
    done = accelerate_launch(*how, *line(objective="costs:not_b"))
    assert done.stderr.count("did you mean not_a?") == 1, "one process speaks"


# ---- After training -------------------------------------------------------------------------------------------------


def test_sample_prints_draws_as_json_lines(run, capsys):
    cli.main(["sample", "out", "-n", "5"])
    out, err = capsys.readouterr()
    draws = [json.loads(text) for text in out.splitlines()]
    assert len(draws) == 5
    assert draws[0].keys() == {"prompt", "completion", "objective", "log_prior", "log_model"}
    assert [draw["objective"] for draw in draws] == count_a([], [draw["completion"] for draw in draws])
    assert "samples: mean cost" in err


def test_samples_are_those_of_the_trained_model_with_its_prior(run, capsys):
    """Their densities are those of the model that was given, and of the adapter that was saved."""
    cli.main(["sample", "out", "-n", "40", "--correction", "none"])
    draws = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert len(draws) == 40
    prior = AutoModelForCausalLM.from_pretrained("model")
    policy = AutoPeftModelForCausalLM.from_pretrained("out")
    completions = every_completion()
    texts = word_tokenizer(WORDS, " ").batch_decode(completions.tokens(), skip_special_tokens=True)
    exact = defaultdict(list)  # of each text: it can be several sequences
    for text, *pair in zip(texts, *(log_probs(model, [EOS], completions).tolist() for model in (prior, policy.model))):
        exact[text].append(pytest.approx(pair, abs=1e-4))
    for draw in draws:
        assert [draw["log_prior"], draw["log_model"]] in exact[draw["completion"]]


def test_samples_pay_for_no_text_again(run, here, capsys):
    """What training has paid for, and what an earlier command has."""
    (here / "paid.py").write_text(
        "import costs\n\ndef cost(prompts, completions, **columns):\n"
        "    open('asked.txt', 'a').write(''.join(f'{text}.' for text in completions))\n"
        "    return costs.not_a(prompts, completions)\n"
    )
    cli.main(line(objective="paid:cost", output_dir="paid"))
    for command in (["sample", "paid", "-n", "40"], ["sample", "paid", "-n", "40"], ["evaluate", "paid"]):
        cli.main(command)
    asked = (here / "asked.txt").read_text().split(".")[:-1]
    assert len(asked) == len({*asked}) > 20
    cli.main(["sample", "paid", "-n", "4", "--objective", "costs:not_a"])
    assert len(evaluated_texts("paid")) == len(asked), "another objective of a command is not the run's"
    sys.modules.pop("paid")


def test_sample_takes_other_options(run, here, capsys):
    cli.main(["sample", "out", "-n", "2", "--output", "draws.jsonl", "--correction", "isir", "--dataset_name", "a b"])
    assert not capsys.readouterr().out
    draws = [json.loads(text) for text in (here / "draws.jsonl").read_text().splitlines()]
    assert [draw["prompt"] for draw in draws] == ["a b", "a b"]


def test_the_output_of_sample_is_checked_before_anything_is_drawn(run, capsys, monkeypatch):
    monkeypatch.setattr(runs, "make_trainer", lambda *a: pytest.fail("a model was loaded"))
    assert "No such file or directory: 'new/draws.jsonl'" in refused(
        capsys, ["sample", "out", "-n", "2", "--output", "new/draws.jsonl"]
    )
    assert "--num_samples must be at least 1, got 0" in refused(capsys, ["sample", "out", "-n", "0"])


def test_evaluate_knows_the_ladders_log_z(run, capsys):
    cli.main(["evaluate", "out"])
    metrics = json.loads(capsys.readouterr().out)
    lost = RunRecord.read("out").rungs[-1]["log_z"] - metrics["eval_log_z"]
    assert metrics["eval_missing_mass"] == pytest.approx(lost, abs=1e-4)
    assert metrics["eval_kl"] >= -0.2
    cli.main(["evaluate", "out", "--dataset_name", "a"])
    assert "eval_missing_mass" not in json.loads(capsys.readouterr().out), "the ladder was climbed for other prompts"


class OwnSampler(MetropolisHastings):
    """A sampler that no option names."""


@pytest.mark.slow
def test_a_run_from_python_needs_its_objective_alone(here, config, capsys):
    model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), word_tokenizer(WORDS, " ")
    args = config(output_dir="api")
    trainer = ALDRIFTTrainer(
        model, count_a, args, processing_class=tokenizer, peft_config=lora_config(model), sampler=OwnSampler(16)
    )
    trainer.train()
    trainer.save_model()
    assert trainer.record.settings["sampler"] == "OwnSampler", "which is no option's value"
    capsys.readouterr()
    assert "the following arguments are required: --objective" in refused(capsys, ["evaluate", "api"])
    cli.main(["evaluate", "api", "--objective", "costs:not_a"])
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["eval_objective"] == pytest.approx(trainer.record.metrics["objective"], abs=0.5)


@pytest.mark.slow
def test_a_run_from_python_needs_its_prompts(here, config, capsys):
    """They are not in its folder: others are not taken for them in silence."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), word_tokenizer(WORDS, " ")
    trainer = ALDRIFTTrainer(
        model, count_a, config(output_dir="prompted", num_rungs=1), processing_class=tokenizer,
        peft_config=lora_config(model), train_dataset=["a", "b a"],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    capsys.readouterr()
    for command in ("evaluate", "sample"):
        said = refused(capsys, [command, "prompted", "--objective", "costs:not_a"])
        assert "had prompts of its own (2), which its folder does not hold. Give them, or others, as --datas" in said
    cli.main(["sample", "prompted", "-n", "1", "--objective", "costs:not_a", "--dataset_name", "b a"])
    assert json.loads(capsys.readouterr().out)["prompt"] == "b a"


@pytest.mark.slow
def test_full_fine_tuning_is_sampled_from(here, capsys):
    cli.main(line("train", "--no_use_peft", learning_rate="1e-3", num_rungs=1))
    capsys.readouterr()
    cli.main(["sample", "out", "-n", "3"])
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.slow
def test_report_of_a_run(run, capsys):
    cli.main(["report", "out"])
    assert "After 3 rungs" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is not the output directory of a run"):
        cli.main(["report", "model"])
    with pytest.raises(SystemExit):
        cli.main(["report"])


PICTURES = """
def counts(completions, weights):
    return f"<b>{len(completions)} texts, {sum(weights):.2f} of weight</b>"


def broken(completions, weights):
    return {}["a"]


def no_text(completions, weights):
    return len(completions)
"""


@pytest.mark.slow
def test_report_with_pictures(run, monkeypatch):
    """As the user's function draws them; what is wrong with it is said, and the report that is there stays."""
    monkeypatch.setattr("aldrift_hf.cli.report.write_report", write_report)  # which `here` has replaced
    Path("pictures.py").write_text(PICTURES)
    report = Path("out/report.html")
    cli.main(["report", "out"])
    plain = report.read_text()
    cli.main(["report", "--picture", "pictures.py:counts", "out"])
    shown = report.read_text()
    texts = [*map(int, re.findall(r"<b>(\d+) texts, 1.00 of weight</b>", shown))]
    assert sum(number > 1 for number in texts) == 2, "of the model, and of the target"
    assert 1 in texts, "beside a text"
    assert "of weight" not in plain
    for function, words in {
        "broken": r"aldrift report: --picture pictures.py:broken: KeyError\('a'\)",
        "no_text": "aldrift report: --picture pictures.py:no_text returns int; it must return HTML or SVG as a string",
        "count": r"aldrift report: --picture pictures.py:count: .* did you mean counts\?",
    }.items():
        with pytest.raises(SystemExit, match=words):
            cli.main(["report", "out", "--picture", f"pictures.py:{function}"])
    assert report.read_text() == shown


def test_env_lists_versions(capsys):
    cli.main(["env"])
    out = capsys.readouterr().out
    for name in (*env.PACKAGES, "python", "platform", "threads", "accelerators"):
        assert re.search(rf"^- {name}: \S", out, re.MULTILINE)


def test_the_command_without_options_explains_itself(capsys):
    cli.main(["env", "--help"])
    assert capsys.readouterr().out.startswith("usage: aldrift env")
    with pytest.raises(SystemExit) as stop:
        cli.main(["env", "--no_such_option"])
    assert stop.value.code == 2
    assert capsys.readouterr().out.startswith("usage: aldrift env")


def test_report_explains_itself(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: aldrift report RUN [--picture FILE.py:FUNCTION]")
    assert refused(capsys, ["report"]) == "aldrift report: the following arguments are required: RUN"
    assert refused(capsys, ["report", "out", "--pictur", "x"]) == (
        "aldrift report: there is no option --pictur; did you mean --picture?"
    )


# ---- Help and errors ------------------------------------------------------------------------------------------------


def test_help_groups_the_options(capsys):
    for command in ("train", "sample", "evaluate"):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        out = capsys.readouterr().out
        titles = re.findall(r"^(\S[^\n]*):$", out, re.MULTILINE)
        assert {"task", "target and ladder", "correction", "generation", "learning", "model and adapter"} <= set(titles)
        assert titles[-1].startswith("the Trainer's other options")
        assert out.index("--tau_max") < out.index("--adam_beta1")
        assert out.count("  --tau_max ") == 1
    assert out.startswith("usage: aldrift evaluate RUN")


def test_every_setting_of_ours_has_a_group():
    own = {field.name for field in dataclasses.fields(ALDRIFTConfig)}
    own -= {field.name for field in dataclasses.fields(TrainingArguments)}
    grouped = [name for names in GROUPS.values() for name in names]
    assert own - {"model_init_kwargs"} <= set(grouped)
    assert set(grouped) <= {field.name for field in dataclasses.fields(ALDRIFTConfig)}
    assert len(set(grouped)) == len(grouped)


def test_no_command_and_no_such_command(capsys):
    cli.main([])
    assert "aldrift COMMAND --help" in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match=r"no command 'trian'; the commands are train, sample, evaluate, costs, report, self"
    ):
        cli.main(["trian"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": None}, r"required: --objective"),
        ({"objective": "nope:cost"}, r"there is no module 'nope', neither installed nor in /"),
        ({"objective": "costs.inner:cost"}, r"no module 'costs.inner'"),
        ({"objective": "nope.py:cost"}, r"there is no such file"),
        ({"objective": "costs:nota"}, r"costs has no function 'nota'; did you mean not_a\?"),
        ({"objective": "costs:factor"}, r"factor is not a function, but float"),
        ({"objective": "costs"}, r"write MODULE:FUNCTION or FILE.py:FUNCTION"),
        ({"objective": "costs:weighed"}, r"missing a required argument: 'weight'"),
        ({"tua_max": 3}, r"no option --tua_max; did you mean --tau_max\?"),
        ({"tau_max": "high"}, r"--tau_max.*invalid float value: 'high'"),
        ({"tau_max": -1}, r"tau_max must be positive"),
        ({"sampler": "gibbs"}, r"--sampler: invalid choice: 'gibbs'"),
        ({"config": "no.yaml"}, r"no.yaml"),
        ({"config": "broken.yaml"}, r"mapping"),
        ({"config": "unknown.yaml"}, r"no option --tua_max; did you mean --tau_max\?"),
        ({"dataset_name": "no.jsonl"}, r"--dataset_name no.jsonl: there is no such file"),
        ({"dataset_name": "costs.py"}, r"the name of a file of prompts ends in .jsonl"),
        ({"dataset": "a"}, r"no option --dataset; did you mean --dataset_name\?"),
        ({"dataset_split": "a"}, r"no option --dataset_split; did you mean --dataset_train_split\?"),
        ({"generation_batch_size": 8}, r"did you mean --per_device_generation_batch_size\?"),
        ({"beta": 0.1}, r"no option --beta; here it is --tau_max, which is 1 / beta"),
        ({"reward_funcs": "costs:not_a"}, r"here it is --objective, a cost"),
        *(
            ({"dataset_name": name}, rf"--dataset_name {re.escape(name)}: there is no such file or folder")
            for name in ("prompts.jsn", "prompts.jsonl.gz", "prompts/")
        ),
        ({"num_train_epochs": 5}, r"num_train_epochs=5.* Set num_rungs"),
        ({"model_name_or_path": None}, r"--model_name_or_path is missing"),
        ({"model_name_or_path": "./nope"}, r"nope"),
    ],
)
def test_a_mistake_is_one_clear_line(here, capsys, changes, said):
    (here / "broken.yaml").write_text("- tau_max: 3\n")
    (here / "unknown.yaml").write_text("tua_max: 3\n")
    message = refused(capsys, line(**changes))
    assert message.startswith("aldrift train: ")
    assert re.search(said, message)


@pytest.mark.parametrize(("which", "said"), [("True", "there is no checkpoint in out"), ("model", "cannot be resumed")])
def test_there_must_be_something_to_resume_before_a_model_is_loaded(here, capsys, monkeypatch, which, said):
    monkeypatch.setattr(train, "make_trainer", pytest.fail)
    assert said in refused(capsys, line("train", "--resume_from_checkpoint", which))


def test_an_error_of_another_process_alone_is_printed(here, capsys, monkeypatch):
    """The first process, which speaks for all, may not have it: a file may be missing on one machine."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("aldrift_hf.command_line.OTHERS_SPEAK_AFTER", 0)
    message = refused(capsys, line(model_name_or_path="nowhere"))
    assert message.startswith("aldrift train: on process 1: ")
    assert "nowhere" in message


def test_a_file_with_a_reserved_column_is_refused(here, capsys):
    (here / "reserved.jsonl").write_text('{"prompt": "a", "completions": "b"}\n')
    with pytest.raises(SystemExit):
        cli.main(line(dataset_name="reserved.jsonl"))
    *_, message = capsys.readouterr().err.splitlines()  # after the progress of reading the file
    assert re.match("aldrift train: train_dataset has a column 'completions', .* Reserved are prompts, com", message)


def test_a_cost_that_fails_shows_its_own_lines_and_what_is_kept(here, capsys):
    """Not those of the package, and of the libraries between."""
    (here / "late.py").write_text(
        "import costs\nbatches = []\n\ndef cost(**columns):\n    batches.append(columns)\n"
        "    return costs.not_a(**columns) if len(batches) < 3 else ask()\n\ndef ask():\n    return 1 / 0\n"
    )
    with pytest.raises(SystemExit) as stop:
        cli.main(line(objective="late:cost", overlap_objective="False", save_steps=1, disable_tqdm="True"))
    assert stop.value.code == 1
    error = capsys.readouterr().err
    kept, _, shown = error.partition("Traceback")
    assert kept.splitlines()[-1].endswith("checkpoint-8 is kept: --resume_from_checkpoint True goes on from there.")
    places = re.findall('File "(.*)"', shown)
    assert places == [str(here / "late.py")] * 2
    assert re.match("aldrift train: objective 'cost' raised ZeroDivisionError: .* on a batch", shown.splitlines()[-1])


def test_a_cost_that_misuses_the_package_shows_its_own_lines(here, capsys):
    (here / "misuse.py").write_text(
        "from aldrift_hf import evaluated_texts\n\ndef cost(**columns):\n    return evaluated_texts('nowhere')\n"
    )
    with pytest.raises(SystemExit):
        cli.main(line(objective="misuse:cost", disable_tqdm="True"))
    error = capsys.readouterr().err
    assert f'File "{here / "misuse.py"}", line 4, in cost' in error
    assert re.match("aldrift train: objective 'cost' raised ValueError: nowhere is not", error.splitlines()[-1])


def test_what_cannot_be_resumed_is_said_in_one_line(run, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(line("train", "--resume_from_checkpoint", "True", tau_max=2.5, disable_tqdm="True"))
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "is kept" not in error
    assert re.match("aldrift train: .* with other settings .*: tau_max = 1.5, not 2.5", error.splitlines()[-1])


def test_any_other_exception_is_shown_whole(here, monkeypatch):
    """A mistake of the package, or of a library: where it was raised is what is wanted."""
    monkeypatch.setattr(train.OptionsWriter, "on_rung_drawn", lambda self, *args, **kwargs: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        cli.main(line())


def test_an_error_inside_the_users_module_is_shown_whole(here):
    (here / "broken.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        cli.main(line(objective="broken:cost"))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["sample"], "name the run first"),
        (["sample", "-n", "3"], "name the run first"),
        (["sample", "model"], "neither run.yaml nor run.json"),
        (["evaluate", "not a name"], "is neither a folder nor a model on the Hub that can be downloaded"),
    ],
)
def test_what_is_no_run_is_refused(here, capsys, argv, said):
    assert said in refused(capsys, argv)


def test_options_of_a_run_do_not_let_foreign_code_in(run, here, monkeypatch, capsys):
    saved = yaml.safe_load((run / "run.yaml").read_text())
    (run / "run.yaml").write_text(yaml.safe_dump(saved | {"trust_remote_code": True, "env": {"PLANTED": "1"}}))
    _, (_, _, model) = runs.parse(RunParser("aldrift sample", "", ""), ["out"], str(here / "scratch"))
    assert model.trust_remote_code is False
    assert "PLANTED" not in os.environ
    monkeypatch.setattr(runs, "snapshot_download", lambda name: str(run))
    message = refused(capsys, ["sample", "somebody/model", "-n", "1"])
    assert "required: --objective" in message, "a downloaded file does not say which code is run"
    engine = {"engine": "vllm", "engine_kwargs": {"model": "evil/model", "trust_remote_code": True}}
    (run / "run.yaml").write_text(yaml.safe_dump(saved | engine))
    argv = ["somebody/model", "--objective", "costs:not_a"]
    _, (_, config, _) = runs.parse(RunParser("aldrift sample", "", ""), argv, str(here / "scratch"))
    assert (config.engine, config.engine_kwargs) == ("transformers", None)


@pytest.mark.slow
def test_a_token_is_not_written_down(here):
    cli.main(line(hub_token="hf_planted", num_rungs=1))
    for path in (here / "out").iterdir():
        if path.is_file() and path.suffix in (".yaml", ".json", ".jsonl", ".md"):
            assert "hf_planted" not in path.read_text(), path


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 4])
def test_a_run_from_python_is_loaded_in_its_precision(here, config, capsys, bits):
    """In another one its prior would be another model."""
    loaded = {"model_revision": "main", "dtype": "bfloat16"}
    if bits == 4:
        pytest.importorskip("bitsandbytes")
        loaded |= {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True}
    asked = SimpleNamespace(**{"load_in_4bit": False, "load_in_8bit": False, "bnb_4bit_quant_storage": None} | loaded)
    model = AutoModelForCausalLM.from_pretrained(
        "model", dtype="bfloat16", quantization_config=get_quantization_config(asked)
    )
    tokenizer = word_tokenizer(WORDS, " ")
    args = config(output_dir="low", num_rungs=1)
    trainer = ALDRIFTTrainer(model, count_a, args, processing_class=tokenizer, peft_config=lora_config(model))
    trainer.train()
    trainer.save_model()
    assert RunRecord.read("low").settings["loaded"] == loaded
    parser = RunParser("aldrift sample", "usage", "what it does")
    _, again = runs.load(parser, ["low", "--objective", "costs:not_a"], str(here / "scratch"))
    assert again.record.settings["loaded"] == loaded
    assert again.rollout.prior.row_scores.tolist() == trainer.rollout.prior.row_scores.tolist()
