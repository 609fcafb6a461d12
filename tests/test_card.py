"""The model card: it says what the run's record holds, and its code works as it is."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import EOS, ALDRIFTTrainer, count_a, every_completion, log_probs, lora, lora_config, perturb, tiny_gpt2
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from peft import get_peft_model
from transformers import GenerationConfig

from aldrift_hf.reporting.card import PATH_TO_BASE_MODEL, hub_id, model_card
from aldrift_hf.reporting.record import RunRecord
from aldrift_hf.selftest.exact import chi_square_p

CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def code_of(card: str) -> str:
    """All of a card's Python."""
    return "\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))


def check_code(card: str, trainer: ALDRIFTTrainer) -> None:
    """It loads the model that was trained, draws by its probabilities, and corrects as the run's own trainer does."""
    torch.manual_seed(0)
    names: dict = {"cost": count_a}
    code = code_of(card).replace("num_return_sequences=8", "num_return_sequences=4000")
    assert "temperature=1.0,\n    top_k=0,\n    top_p=1.0,\n" in code  # a vocabulary this small does not tell of top_k
    exec(compile(code, "README.md", "exec"), names)
    completions, start = every_completion(), names["inputs"]["input_ids"][0].tolist()
    expected = log_probs(trainer.model.eval(), start, completions)
    for loaded in (names["model"], names["trainer"].model):
        assert torch.allclose(log_probs(loaded.eval(), start, completions), expected, atol=1e-6)

    events = [tuple(row) for row in completions.tokens()]
    drawn = [
        tuple(row[: row.index(EOS) + 1] if EOS in row else row) for row in names["drawn"][:, len(start) :].tolist()
    ]
    counts = torch.tensor([events.index(row) for row in drawn]).bincount(minlength=len(events))
    assert chi_square_p(counts, expected.exp()) > 1e-4
    assert names["texts"] == trainer.processing_class.batch_decode(drawn, skip_special_tokens=True)

    samples = names["samples"]
    own = trainer.sample(8, prompts=None if samples["prompt"][0] == "" else [{"prompt": samples["prompt"][0]}])
    assert samples["completion"] == own["completion"]
    for column in ("log_prior", "log_model"):
        assert samples[column] == pytest.approx(own[column], abs=1e-5)
    assert samples["log_prior"] != pytest.approx(samples["log_model"], abs=0.01)


def warped_gpt2():
    """A model that comes with settings of its own for how it is to be drawn from."""
    model = tiny_gpt2()
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.5, top_k=2, repetition_penalty=1.5)
    model.generation_config.eos_token_id = EOS
    return model


@pytest.fixture
def base(tmp_path, monkeypatch, tokenizer):
    """A model in a folder; the card's code finds it, and the run's output, from the folder that we are in."""
    folder = tmp_path / PATH_TO_BASE_MODEL
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    warped_gpt2().save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tuning", "prompts"),
    [
        ("adapter", None),
        ("adapter of an adapter", None),
        ("adapter of another name", None),
        ("in full", None),
        ("adapter", ["a b"]),
        ("adapter", [[{"role": "user", "content": "a"}]]),
    ],
    ids=["adapter", "adapter of an adapter", "adapter of another name", "in full", "text", "chat"],
)
def test_the_code_works_as_it_stands(base, config, tuning, prompts, tokenizer, tmp_path):
    model = warped_gpt2()
    model.config._name_or_path = str(base)
    args = config(learning_rate=0.05)
    start = model
    if tuning == "adapter of an adapter":
        start = lora(model, seed=3)
    elif tuning == "adapter of another name":  # which PEFT saves in a subfolder
        start = get_peft_model(model, lora_config(model), adapter_name="mine")
        perturb(start, seed=3)
    trainer = ALDRIFTTrainer(
        model=start,
        objective=count_a,
        args=args,
        train_dataset=prompts,
        processing_class=tokenizer,
        peft_config=lora_config(model) if tuning == "adapter" else None,
    )
    trainer.train()
    trainer.save_model()
    assert Path(args.output_dir, "mine", "adapter_config.json").is_file() == (tuning == "adapter of another name")
    card = Path(args.output_dir, "README.md").read_text()
    check_code(card, trainer)
    assert str(tmp_path) not in card
    assert ModelCard(card).data.base_model is None
    assert "not on the Hub" in card


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "loaded"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_the_code_loads_the_model_in_the_runs_precision(base, config, saved, loaded):
    """Left to itself, transformers takes that of the checkpoint."""
    warped_gpt2().to(getattr(torch, saved)).save_pretrained(base)
    args = config(learning_rate=0.05, model_init_kwargs={"dtype": loaded})
    trainer = ALDRIFTTrainer(PATH_TO_BASE_MODEL, count_a, args, peft_config=lora_config(warped_gpt2()))
    trainer.train()
    trainer.save_model()
    check_code(Path(args.output_dir, "README.md").read_text(), trainer)


@pytest.mark.slow
def test_a_run_writes_its_card_wherever_it_saves(config, tokenizer, tmp_path):
    """In place of PEFT's, which has gaps to fill in and the model's path."""
    model = tiny_gpt2()
    args = config(save_strategy="epoch", sampler="archive", ladder="adaptive", tau_step=None)
    trainer = ALDRIFTTrainer(model, count_a, args, processing_class=tokenizer, peft_config=lora_config(model))
    trainer.train()
    trainer.save_model(str(tmp_path / "elsewhere"))
    folders = [Path(args.output_dir), *Path(args.output_dir).glob("checkpoint-*"), tmp_path / "elsewhere"]
    assert len(folders) == 4
    for folder in folders:
        text = (folder / "README.md").read_text()
        assert "[More Information Needed]" not in text
        assert ModelCard(text).data.tags == ["aldrift", "peft", "lora"]
        assert "| ladder | adaptive, effective sample size above 50% |" in text
        assert "| sampler | `archive`, 64 proposals per prompt per rung |" in text
        assert "| training | loss `generalized_kl`, 4 updates per rung, 4 rows per update, " in text
    trainer.create_model_card(
        language="en", license="apache-2.0", tags=["trees"], model_name="Trees", finetuned_from="me/base"
    )
    card = ModelCard.load(Path(args.output_dir) / "README.md")
    assert card.text.strip().startswith("# Trees\n")
    assert card.data.to_dict() == {
        "base_model": "me/base",
        "language": "en",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["aldrift", "peft", "lora", "trees"],
        "base_model_relation": "adapter",
    }


@pytest.fixture
def record(config, tokenizer) -> RunRecord:
    """Of a short run with two costs, one without a name, on a model by its id."""
    model = tiny_gpt2()
    model.config._name_or_path = "me/base"
    args = config(num_rungs=2, objective_weights=[1.0, 0.5], objective_range=4.5)
    costs = [count_a, lambda prompts, completions: count_a(prompts, completions)]
    trainer = ALDRIFTTrainer(model, costs, args, processing_class=tokenizer)
    trainer.train()
    return RunRecord.read(args.output_dir)


def test_what_it_says_is_what_the_record_holds(record, tmp_path):
    card = model_card(record, tmp_path, "me/short")
    text = str(card)
    prior, last = record.rungs[0], record.rungs[-1]
    assert card.data["base_model"] == "me/base"
    assert card.data["base_model_relation"] == "finetune"
    assert card.data.library_name == "transformers"
    assert "This model is [me/base](https://huggingface.co/me/base), fine-tuned in all parameters" in text
    assert f"| mean cost | {prior['objective_mean']:.4g} | {record.metrics['objective']:.4g} |" in text
    assert f"| missing mass, nats |  | {record.metrics['missing_mass']:.2f}" in text
    assert "| inverse temperature T | 1.5 |" in text
    assert "| largest cost D | 4.5 |" in text
    assert "| ladder | linear, steps of 0.5 |" in text
    assert f"{last['proposals']:,} proposals, {last['objective_calls']:,} distinct objective calls" in text
    assert "(count_a + \\<lambda>)" in text
    assert "num_generations=64, chain_length=4, max_completion_length=3, objective_weights=[1.0, 0.5]" in text
    assert "> **Warning.** The run ended at inverse temperature 1, below T = 1.5" in text
    assert "arxiv.org/abs/2503.06917" in text
    assert "aldrift sample me/short --objective" in text
    assert "ladder.png" not in text

    assert "success_threshold" not in text
    record.settings["success_threshold"] = 0.5
    assert "objective_weights=[1.0, 0.5], success_threshold=0.5)" in str(model_card(record, tmp_path, "me/short"))

    # What is not known has no number, and is not made up.
    record.metrics["khat"] = math.nan
    assert "| k-hat |  |  |" in str(model_card(record, tmp_path, "me/short"))
    record.metrics, record.finished = {}, False
    unfinished = str(model_card(record, tmp_path, "me/short"))
    assert "So far, after 2 rungs" in unfinished
    assert f"| mean cost | {prior['objective_mean']:.4g} | {last['objective_mean']:.4g} |" in unfinished
    record.rungs, record.draws = [], []
    assert "The run has no complete rung yet." in str(model_card(record, tmp_path, "me/short"))


def test_a_collapsed_run_says_so_first(record, tmp_path):
    record.metrics["missing_mass"] = 5.0
    text = model_card(record, tmp_path, "me/collapsed").text
    first = text.split("# collapsed", 1)[1].strip().splitlines()[0]
    assert first.startswith("> **Warning.** The model has lost 5.00 nats of the target")
    assert "by the ladder's log Z, its draws cover 1% of p_T" in text


def test_the_header_is_one_that_the_hub_takes(record, tmp_path):
    """Of plain strings and lists of them, ids as the client checks them, and nothing that is empty."""
    data = model_card(record, tmp_path, "me/short", tags=["a", "aldrift"]).data.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert all(data.values())
    assert data["tags"] == ["aldrift", "a"]
    validate_repo_id(data["base_model"])
    assert "model-index" not in data  # it wants a data set that results are of, and there is none
    text = str(model_card(record, tmp_path, "me/short"))
    assert str(ModelCard(text)) == text


def test_what_is_an_id_and_what_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert [hub_id(name) for name in ("gpt2", "me/base")] == ["gpt2", "me/base"]
    for path in ("/home/me/base", "./base", "../base", "a/b/c", "models/mine", "models", "C:\\base", "", None):
        assert hub_id(path) is None, path
