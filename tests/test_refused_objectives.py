"""What is no cost function is refused, in one line that says what to pass instead, before anything is called."""

import functools
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ALDRIFTTrainer, count_a, tiny_gpt2
from datasets import Dataset

from aldrift_hf import check_objective, from_reward
from aldrift_hf.objective.objective import Objective
from aldrift_hf.types import Prompts

CONFIG = transformers.GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1, num_labels=1)
CLASSIFIER = transformers.GPT2ForSequenceClassification(CONFIG)


class Cost:
    def __call__(self, prompts, completions):
        return [1.0] * len(completions)


class Yields:
    def __call__(self, prompts, completions):
        yield from [1.0] * len(completions)


def yields(prompts, completions):
    yield from [1.0] * len(completions)


async def yields_later(prompts, completions):
    for _ in completions:
        yield 1.0


class Reward(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cost_of_all = 2.0

    def forward(self, prompts, completions):
        return [self.cost_of_all] * len(completions)

    def cost(self, completions, **columns):
        return self(columns["prompts"], completions)


FUNCTION = r"Pass a function that calls it: def objective\(prompts, completions, \*\*columns\)"
REFUSED = {
    "a classifier": (CLASSIFIER, rf"is the model GPT2ForSequenceClassification, .* {FUNCTION}"),
    "a causal model": (tiny_gpt2(), rf"is the model GPT2LMHeadModel, .* {FUNCTION}"),
    "a layer": (torch.nn.Linear(2, 1), rf"is the model Linear, .* {FUNCTION}"),
    "a wrapped model": (torch.nn.DataParallel(CLASSIFIER), rf"is the model DataParallel, .* {FUNCTION}"),
    "a model's method": (CLASSIFIER.forward, rf"is the model GPT2ForSequenceClassification, .* {FUNCTION}"),
    "a model with arguments": (functools.partial(CLASSIFIER, use_cache=False), rf"is the model GPT2F.* {FUNCTION}"),
    "a name": (
        "org/reward-model",
        rf"is a text and no cost function: 'org/reward-model'. .*load it. {FUNCTION}",
    ),
    "a class": (Cost, r"is the class Cost. Pass an instance: Cost\(…\)"),
    "a generator function": (yields, "'yields' yields its values one by one. Return them as a list"),
    "an async generator": (yields_later, "'yields_later' yields its values one by one"),
    "a partial generator": (functools.partial(yields), "'yields' yields its values one by one"),
    "a callable generator": (Yields(), "'Yields' yields its values one by one"),
    "nothing": (None, "must be a cost function, or a list of at least one, but is a NoneType"),
    "a dict": ({"a": count_a}, "must be a cost function, .* but is a dict"),
    "costs": (SimpleNamespace(cost=count_a), "must be a cost function, .* but is a SimpleNamespace"),
    "a set": ({count_a}, "must be a cost function, .* but is a set"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_function_is_refused(name):
    value, message = REFUSED[name]
    for given in (value, [count_a, value]):
        with pytest.raises(TypeError, match=f"^objective {message}") as error:
            Objective(given, None, None)
        assert "\n" not in str(error.value)
    with pytest.raises(AssertionError, match=f"^signature: objective {message}"):
        check_objective(value, ["a"])
    with pytest.raises(TypeError, match=r"^reward "):
        from_reward(value)


def test_a_pipeline_and_a_tokenizer_are_refused(tokenizer):
    pipeline = transformers.pipeline("text-classification", model=CLASSIFIER, tokenizer=tokenizer, device="cpu")
    for value in (pipeline, tokenizer, tokenizer.encode, pipeline.__call__):
        with pytest.raises(TypeError, match=rf"is a \w+(Pipeline|Tokenizer\w*|Backend), which .* {FUNCTION}"):
            Objective(value, None, None)


def test_the_trainer_refuses_it_before_it_loads_a_model(config):
    data = Dataset.from_dict({"prompt": [""]})
    with pytest.raises(TypeError, match="is the model GPT2ForSequenceClassification"):
        ALDRIFTTrainer("no/such-model", CLASSIFIER, config(), train_dataset=data)


@pytest.mark.parametrize(
    "objective", [Reward(), Reward().forward, Reward().cost, from_reward(Reward(), best=4), Cost()]
)
def test_a_module_and_an_object_that_take_texts_are_cost_functions(objective):
    evaluate = Objective(objective, None, None)
    evaluate.check_signature([])
    assert evaluate(Prompts([{"prompt": "x"}], [[0]], ["row"]), [0], ["a"]).item() in (1.0, 2.0)


def test_the_parameters_of_a_module_are_those_of_its_forward():
    with pytest.raises(TypeError, match=r"'Reward' cannot be called .* Add \*\*columns"):
        Objective(Reward(), None, None).check_signature(["target"])
    with pytest.raises(TypeError, match=r"'Reward' cannot be called .* Add \*\*columns"):
        Objective(from_reward(Reward()), None, None).check_signature(["target"])
