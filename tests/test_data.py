"""Data sets of prompts: which are taken, what a cost function gets of them, and what is refused, in which words."""

import pytest
import torch
from conftest import ALDRIFTTrainer, count_a, lora_config, tiny_gpt2
from datasets import Dataset, DatasetDict

from aldrift_hf.trainer.data import check_dataset
from aldrift_hf.types import RESERVED_COLUMNS

CHAT = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]


@pytest.fixture
def make(config, tokenizer):
    """A trainer of a tiny LoRA model; keyword arguments go to the trainer."""

    def build(objective=count_a, **kwargs):
        model = tiny_gpt2()
        settings = config(num_generations=8)
        return ALDRIFTTrainer(
            model, objective, settings, processing_class=tokenizer, peft_config=lora_config(model), **kwargs
        )

    return build


@pytest.mark.parametrize("column", RESERVED_COLUMNS)
def test_a_column_that_a_cost_could_not_tell_from_another_argument_is_refused(make, column):
    """Everywhere that a trainer takes prompts. (The cost would be computed on the column, silently.)"""
    rows = [{"prompt": "a", column: "b"}]
    refused = rf"has a column '{column}'.*Reserved are prompts, completions, completion_ids, self. Rename it"
    for data in (rows, Dataset.from_list(rows)):
        with pytest.raises(ValueError, match=f"train_dataset {refused}"):
            make(train_dataset=data)
        with pytest.raises(ValueError, match=f"eval_dataset {refused}"):
            make(eval_dataset=data)
    trainer = make()
    with pytest.raises(ValueError, match=f"eval_dataset {refused}"):
        trainer.evaluate(rows)
    with pytest.raises(ValueError, match=f"prompts {refused}"):
        trainer.sample(1, rows)


@pytest.mark.slow
def test_every_other_column_reaches_the_cost(make):
    """Also under names that something here has an object for: `completion`, `objective`, `input_ids`, `tau`."""
    names = ["completion", "objective", "objectives", "input_ids", "labels", "prompt_ids", "tau", "rows", "a b"]
    seen = {}

    def cost(prompts, completions, **columns):
        seen.update(columns)
        return count_a(prompts, completions)

    trainer = make(cost, train_dataset=Dataset.from_list([{"prompt": "a", **{name: f"<{name}>" for name in names}}]))
    trainer.train()
    assert {name: set(values) for name, values in seen.items()} == {name: {f"<{name}>"} for name in names}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a", {"prompt": "b", "wanted": 1}], "rows 0 and 1 differ in wanted. Write None where a row has no value"),
        ([{"prompt": "a", "wanted": 1}, {"prompt": "b"}], "rows 0 and 1 differ in wanted"),
        ([{"prompt": "a"}, {"text": "b"}], "rows 0 and 1 differ in prompt, text"),
        ([{"prompt": "a", 3: 1}], "has a column 3, and names of columns must be text"),
        ([{"prompt": "a", "x": [{"y": 1}]}, {"prompt": "a", "x": [{"y": "z"}]}], "can be written as JSON text"),
        ([{"prompts": "a"}], r"no column 'prompt'.*rename_column\('prompts', 'prompt'\)"),
        ([{"question": "a"}], r"no column 'prompt'.*rename_column\('question', 'prompt'\)"),
        (Dataset.from_dict({"x": [1], "prompt": ["a"]}).with_format("torch", columns=["x"]), "no column 'prompt'"),
        (
            Dataset.from_dict({"text": ["a"]}).with_transform(lambda batch: {"prompt": batch["text"]}),
            r"a transform that turns its columns \['text'\] into \['prompt'\].*dataset.map",
        ),
    ],
)
def test_data_that_would_lose_columns_is_refused(rows, message):
    with pytest.raises(ValueError, match=f"data .*{message}"):
        check_dataset(rows, "data")


def test_streams_and_dicts_of_data_sets_are_refused():
    for data in (
        Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset(),
        DatasetDict({"train": Dataset.from_dict({"prompt": ["a"]})}),
        "a prompt",
    ):
        with pytest.raises(TypeError, match=r"data must be a datasets\.Dataset or a list of prompts"):
            check_dataset(data, "data")


@pytest.mark.parametrize("format", [None, "python", "numpy", "torch", "pandas", "arrow", "transform"])
def test_prompts_are_the_same_in_any_format(make, tokenizer, format):
    """Prompts are text or lists of messages; other columns are as their format has them, one value per row."""
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    data = Dataset.from_dict({"prompt": CHAT, "wanted": [[1, 2], [3, 4]], "left_out": ["u", "v"]})
    data = data.with_transform(lambda batch: batch) if format == "transform" else data.with_format(format)
    seen = {}

    def cost(prompts, completions, wanted, left_out):
        assert all(type(prompt) is list and type(prompt[0]) is dict for prompt in prompts)
        seen.update({prompt[0]["content"]: value for prompt, value in zip(prompts, wanted)})
        return count_a(prompts, completions)

    trainer = make(cost, train_dataset=data)
    assert trainer.inputs.prompts.token_ids == [tokenizer(text, add_special_tokens=False).input_ids for text in "ab"]
    trainer.sample(1)
    assert {name: [int(x) for x in value] for name, value in seen.items()} == {"a": [1, 2], "b": [3, 4]}
    assert isinstance(seen["a"], torch.Tensor) == (format == "torch")


def test_a_format_may_choose_columns(make):
    def cost(prompts, completions, wanted):
        assert all(map(torch.is_tensor, wanted))
        return count_a(prompts, completions)

    data = Dataset.from_dict({"prompt": ["a"], "wanted": [1], "completions": ["b"]})
    make(cost, train_dataset=data.with_format("torch", columns=["prompt", "wanted"])).sample(1)
