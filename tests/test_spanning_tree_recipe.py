"""The main job from end to end, on small graphs and with every kind of model."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, accelerate_launch, tiny_gpt2
from expected_lines import MAIN_JOB, PROCESSES, RUN, WARNINGS, assert_quiet
from problems.spanning_tree import SEPARATOR, load_problem
from transformers import LlamaConfig, LlamaForCausalLM

from aldrift_hf.toy import word_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "spanning_tree.py"
SMALL = {
    "graph": "random:6,0.5",
    "prior_steps": 60,
    "num_generations": 128,
    "tau_step": 2,
    "updates_per_rung": 4,
    "per_device_train_batch_size": 16,
    "draws": 300,
    "per_device_generation_batch_size": 128,
}


@pytest.fixture
def recipe(run_recipe):
    """Runs the main job at a small size."""

    def run(*flags, **settings):
        return run_recipe("spanning_tree", "--use_cpu", "--disable_tqdm", "True", *flags, **{**SMALL, **settings})

    return run


def rungs(folder):
    return [json.loads(line) for line in (folder / "rungs.jsonl").read_text().splitlines()]


def check_output(out, *, trees=True):
    assert re.search(r"prior.*model.*corrected", out)
    for row in ("success", "distinct trees, of", "mean cost", "edge marginals of trees", "missing mass:"):
        assert row in out, row
    assert "Kirchhoff's theorem counts" in " ".join(out.split())
    assert not trees or "a tree: " in out


def test_small_prior_with_lora(recipe, capsys):
    folder = recipe()
    out = capsys.readouterr().out
    check_output(out)
    assert "KL(p_T || ·)" in out
    assert "exact p_T" in out
    assert (folder / "spanning_tree.png").stat().st_size > 10_000
    assert (folder / "adapter_model.safetensors").is_file()
    assert [record["tau"] for record in rungs(folder)] == [2, 4, 6]
    assert rungs(folder)[-1]["success"] > rungs(folder)[0]["success"]


def test_resumed_from_the_command_line(recipe, capsys):
    """As after an interruption: the run continues from the last checkpoint, with the same records."""

    def records(folder):
        return [{key: value for key, value in r.items() if not key.startswith("seconds")} for r in rungs(folder)]

    alone = records(recipe())
    table = capsys.readouterr().out.partition("draws each")[2]
    folder = recipe("--resume_from_checkpoint", "True")
    assert records(folder) == alone
    assert capsys.readouterr().out.partition("draws each")[2] == table


def test_settings_from_yaml_and_full_fine_tuning(recipe, capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("tau_max: 4.0\nsampler: reweight\nuse_peft: false\nlearning_rate: 1.0e-4\n")
    folder = recipe("--config", str(tmp_path / "run.yaml"))
    check_output(capsys.readouterr().out)
    assert (folder / "model.safetensors").is_file()
    assert [record["tau"] for record in rungs(folder)] == [2, 4]
    assert rungs(folder)[0]["acceptance_rate"] is None


def test_a_graph_from_a_file(recipe, capsys, tmp_path):
    (tmp_path / "house.edgelist").write_text("a b\nb c\nc d\nd a\na e\nb e\n")
    recipe(graph=tmp_path / "house.edgelist", enumerate_up_to=0)
    out = capsys.readouterr().out
    check_output(out)
    assert "distinct trees, of 11" in out
    assert "KL(p_T" not in out, "nothing may be enumerated"


@pytest.fixture
def model_folder(tmp_path):
    """Saves a GPT-2 or a Llama, with a tokenizer that knows the words of the small graph, as on the Hub."""

    def save(family):
        words = load_problem(SMALL["graph"]).names
        tokenizer = word_tokenizer(words, SEPARATOR)
        if family == "gpt2":
            model = tiny_gpt2(vocab_size=len(tokenizer), initializer_range=0.1)
        else:
            torch.manual_seed(0)
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=64,
                    intermediate_size=64,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    num_key_value_heads=2,
                    max_position_embeddings=32,
                    bos_token_id=0,
                    eos_token_id=0,
                )
            )
        model.save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        return tmp_path / family

    return save


def test_a_model_by_path_is_warmed_up_and_frozen(recipe, model_folder, capsys):
    folder = recipe(model_name_or_path=model_folder("gpt2"), lora_r=4)
    check_output(capsys.readouterr().out, trees=False)  # the model is random, with a very short warm-up
    assert (folder / "prior" / "adapter_model.safetensors").is_file()
    assert rungs(folder)[0]["missing_mass"] == pytest.approx(0, abs=1e-4), "the first rung's policy is the prior"


def test_a_model_in_four_bits(recipe, model_folder, capsys):
    pytest.importorskip("bitsandbytes")
    folder = recipe("--load_in_4bit", "True", model_name_or_path=model_folder("llama"), lora_r=4, learning_rate=5e-4)
    check_output(capsys.readouterr().out, trees=False)  # the model is random, with a very short warm-up
    assert (folder / "prior" / "adapter_model.safetensors").is_file()


def test_an_unknown_graph_is_one_clear_line(recipe):
    with pytest.raises(
        SystemExit, match=r"--graph: there is no graph .petersen.: use florentine, florentine-core, davis"
    ):
        recipe(graph="petersen")


def test_help_explains(recipe, capsys):
    with pytest.raises(SystemExit):
        recipe("--help")
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "florentine, florentine-core, davis, tutte, karate",
        "98 % of p_T are spanning trees",
        "LoRA R value",
    ):
        assert words in text


@pytest.mark.parametrize("config", ["single_process", "multi_cpu"])
def test_launched_by_accelerate(config, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setenv("ALDRIFT_CACHE", str(tmp_path / "cache"))
    line = [text for name, value in SMALL.items() for text in (f"--{name}", str(value))]
    done = accelerate_launch(CONFIGS / f"{config}.yaml", str(RECIPE), *line, "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    check_output(done.stdout)
    assert done.stdout.count("missing mass: ") == 1, "only one process reports"
    assert len(rungs(tmp_path / "out")) == 3
    processes = PROCESSES if config == "multi_cpu" else ()
    assert_quiet(done.stdout, *RUN, *MAIN_JOB)
    assert_quiet(done.stderr, *RUN, *WARNINGS, *processes)
