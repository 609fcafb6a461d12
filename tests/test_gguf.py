"""A GGUF file is a model like any other: its path works wherever a folder's does."""

import importlib
import json
import sys
import warnings
from pathlib import Path

import pytest
import tiny_gguf
import torch
from conftest import EOS, ALDRIFTTrainer, count_a, every_completion, log_probs
from peft import LoraConfig
from problems.prior import RecipeModelConfig, make_prior
from test_card import check_code
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from aldrift_hf import cli
from aldrift_hf.models import gguf_files, loading
from aldrift_hf.models.prior import base_model
from aldrift_hf.reporting.card import PATH_TO_BASE_MODEL, model_card
from aldrift_hf.selftest import Options, run

pytestmark = pytest.mark.versions

CHAT = [{"role": "user", "content": "a b"}]
COMPLETIONS = every_completion()


def lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def file(tmp_path, monkeypatch, no_report):
    """A tiny Llama with weights in 8 bits, by a path relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    tiny_gguf.write(tmp_path / "models" / "tiny.gguf", tiny_gguf.llama(), quantize=True)
    return "models/tiny.gguf"


def scores(model, prompt=(2, 1, 3)) -> torch.Tensor:
    return log_probs(base_model(model), list(prompt), COMPLETIONS)


def same(model, other) -> bool:
    return torch.allclose(scores(model), scores(other), atol=1e-4)


def as_transformers_reads(file):
    folder, name = str(Path(file).parent), Path(file).name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype="float32").eval()


def test_weights_are_the_files_own(tmp_path, file):
    tiny_gguf.write(tmp_path / "exact.gguf", tiny_gguf.llama())
    assert same(loading.load_model("exact.gguf", None, adapter=False), tiny_gguf.llama())
    rounded = loading.load_model(file, None, adapter=False)
    assert same(rounded, as_transformers_reads(file))
    assert 1e-3 < (scores(rounded) - scores(tiny_gguf.llama())).abs().max() < 1


def test_the_precision_is_that_of_a_folder(file):
    assert loading.load_model(file, None, adapter=False).dtype == torch.float32
    assert loading.load_model(file, {"dtype": "bfloat16"}, adapter=False).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["adapter", "in full"])
def test_a_run_from_a_file_and_all_that_follows(file, config, tuning):
    def trainer(model=file, peft=tuning == "adapter", **changes):
        args = config(save_strategy="epoch", **changes)
        return ALDRIFTTrainer(model, count_a, args, train_dataset=[CHAT], peft_config=lora() if peft else None)

    first = trainer()
    assert first.inputs.prompts.token_ids == [[2, 1, 3, 1]], "the file's own chat template"
    assert first.record.settings["base_model"] == file
    with warnings.catch_warnings(record=True) as told:
        first.train()
        first.save_model()
    assert not [each for each in told if "config file" in str(each.message)], "PEFT misses none beside the file"
    with first.rollout.prior.active(first.model) as prior:
        assert same(prior, as_transformers_reads(file))
    trained = scores(first.model)
    assert (trained - scores(as_transformers_reads(file))).abs().max() > 0.01

    resumed = trainer(output_dir="resumed")
    resumed.train(resume_from_checkpoint=str(Path("out", "checkpoint-8")))
    assert torch.equal(scores(resumed.model), trained)
    later = trainer(output_dir="later")
    later.load_run("out")
    assert torch.equal(scores(later.model), trained)
    again = trainer(model="out", peft=False, output_dir="again")  # as a model: an adapter on the file, or a whole one
    assert torch.equal(scores(again.model), trained)


def test_a_saved_adapter_names_the_file(file, config):
    trainer = ALDRIFTTrainer(file, count_a, config(num_rungs=1), peft_config=lora())
    trainer.save_model()
    saved = json.loads(Path("out", "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == file
    Path(file).unlink()
    with pytest.raises(ValueError, match=r"the GGUF file models/tiny\.gguf cannot be opened"):
        ALDRIFTTrainer("out", count_a, config(), processing_class=trainer.processing_class)


@pytest.mark.slow
def test_the_commands(file, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("costs_of_a.py").write_text("def cost(prompts, completions):\n    return [len(c) / 3 for c in completions]\n")
    settings = "--objective_range 3 --tau_max 1 --num_rungs 1 --num_generations 16 --chain_length 2 --use_cpu True"
    settings += " --max_completion_length 3 --updates_per_rung 1 --lora_target_modules q_proj v_proj --report_to none"
    flags = f"--objective costs_of_a.py:cost --model_name_or_path {file} --output_dir out {settings}".split()
    cli.main(["train", *flags, "--dataset_name", "a b"])
    capsys.readouterr()
    cli.main(["sample", "out", "-n", "3"])
    assert len(capsys.readouterr().out.splitlines()) == 3
    cli.main(["evaluate", "out"])
    assert "ess" in capsys.readouterr().out


def test_a_recipe_takes_it(file, tmp_path, monkeypatch):
    monkeypatch.setenv("ALDRIFT_CACHE", str(tmp_path))

    class Problem:
        @staticmethod
        def random_texts(n, rng):
            return ["a b"] * n

    flags = RecipeModelConfig(model_name_or_path=file, prior_steps=1, lora_target_modules=["q_proj", "v_proj"])
    model, tokenizer, peft_config = make_prior(Problem(), flags)
    assert peft_config is None
    assert tokenizer("a b").input_ids == [2, 1, 3]
    with model.disable_adapter():
        assert same(model, as_transformers_reads(file))


@pytest.mark.slow
def test_the_self_test_takes_it(file, capsys):
    assert run(Options(model_name_or_path=file), checks=(), num_draws=10) == 0
    assert "models/tiny.gguf" in capsys.readouterr().out


@pytest.mark.slow
def test_the_cards_code_loads_it(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    file = Path(PATH_TO_BASE_MODEL, "tiny.gguf")
    file.parent.mkdir(parents=True)
    tiny_gguf.write(file, tiny_gguf.llama(), quantize=True)
    args = config(learning_rate=0.05)
    trainer = ALDRIFTTrainer(str(file), count_a, args, train_dataset=[CHAT], peft_config=lora())
    trainer.train()
    trainer.save_model()
    card = Path(args.output_dir, "README.md").read_text()
    check_code(card, trainer)
    assert "the run loaded it from a file" in card
    assert f"--model_name_or_path {file}" in card


def test_the_card_of_a_file_on_the_hub(file, config):
    trainer = ALDRIFTTrainer(file, count_a, config(), peft_config=lora())
    trainer.record.settings["base_model"] = "me/tiny-GGUF/tiny.Q8_0.gguf"
    card = model_card(trainer.record, "out", "me/run")
    assert card.data.base_model == "me/tiny-GGUF"
    assert 'from_pretrained("me/tiny-GGUF", gguf_file="tiny.Q8_0.gguf", dtype="float32")' in card.text
    assert 'model="me/tiny-GGUF/tiny.Q8_0.gguf"' in card.text


def test_a_name_on_the_hub_is_taken_apart(tmp_path, monkeypatch, file):
    assert gguf_files.source("me/tiny-GGUF/tiny.gguf") == ("me/tiny-GGUF", {"gguf_file": "tiny.gguf"})
    assert gguf_files.source(file) == ("models", {"gguf_file": "tiny.gguf"})
    monkeypatch.chdir("models")
    assert gguf_files.source("tiny.gguf") == (".", {"gguf_file": "tiny.gguf"})
    Path("folder.gguf").mkdir()
    assert gguf_files.source("folder.gguf") == ("folder.gguf", {})
    assert gguf_files.source("me/tiny") == ("me/tiny", {})


def broken(kind: str, file: str) -> dict:
    """What is passed to the trainer, after something has been done to the file."""
    path, given = Path(file), {}
    if kind == "missing":
        path.unlink()
    elif kind == "another format":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-3000])
    elif kind == "cut in its head":
        path.write_bytes(path.read_bytes()[:100])
    elif kind == "unknown":
        path.write_bytes(path.read_bytes().replace(b"llama", b"lemur"))
    elif kind == "quantized":
        given["model_init_kwargs"] = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    elif kind == "by keyword":
        given["model_init_kwargs"] = {"gguf_file": path.name}
    return given


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"models/tiny\.gguf cannot be opened: .*NAMESPACE/NAME/FILE\.gguf"),
        ("another format", r"tiny\.gguf is not a GGUF file: it begins with b'vers'.*git lfs pull"),
        ("cut", r"tiny\.gguf cannot be read: .*download it again"),
        ("cut in its head", r"tiny\.gguf cannot be read: .*download it again"),
        ("unknown", r"tiny\.gguf cannot be read: .*lemur.*pass the original model"),
        ("quantized", r"unpacked as they are loaded, and cannot be quantized.*Leave quantization out"),
        ("by keyword", r"pass the file's own path as the model, 'models/tiny\.gguf'"),
    ],
)
def test_what_cannot_be_read_is_told_before_it_is_loaded(file, config, kind, message, monkeypatch):
    given = broken(kind, file)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError, match=message):
        ALDRIFTTrainer("models" if kind == "by keyword" else file, count_a, config(**given), peft_config=lora())


def test_without_the_package(file, config, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError):
        importlib.import_module("gguf")
    with pytest.raises(ValueError, match=r"the package gguf is needed .*pip install 'aldrift_hf\[gguf\]'"):
        ALDRIFTTrainer(file, count_a, config(), peft_config=lora())
    with pytest.raises(SystemExit):
        cli.main(["train", "--objective", "math:exp", "--model_name_or_path", file, "--output_dir", "out"])
    assert "pip install 'aldrift_hf[gguf]'" in capsys.readouterr().err


def test_a_model_that_transformers_read_is_refused_where_its_trainer_would(file, config):
    model = as_transformers_reads(file)
    tokenizer = AutoTokenizer.from_pretrained("models", gguf_file="tiny.gguf")
    if getattr(model, "quantization_method", None) is None:  # older versions return an ordinary model
        assert ALDRIFTTrainer(model, count_a, config(), processing_class=tokenizer, peft_config=lora())
        return
    with pytest.raises(ValueError, match=r"Pass the file's path as the model, 'FOLDER/FILE\.gguf'"):
        ALDRIFTTrainer(model, count_a, config(), processing_class=tokenizer, peft_config=lora())


def test_end_of_text_is_the_files(file, config):
    trainer = ALDRIFTTrainer(file, count_a, config(), peft_config=lora())
    assert trainer.run.eos_token_ids == (EOS,) == (tiny_gguf.END,)
