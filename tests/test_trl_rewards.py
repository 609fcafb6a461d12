"""from_reward on every reward function of `trl.rewards`, and on what TRL's trainers pass to rewards besides text."""

import importlib.util

import numpy as np
import pytest
import torch
from trl import rewards

from aldrift_hf import from_reward
from aldrift_hf.objective.objective import Objective
from aldrift_hf.objective.testing import check_objective
from aldrift_hf.types import Prompts

CHAT = [{"role": "user", "content": "What is one third?"}]
ROW = {"prompt": CHAT, "solution": r"\frac{1}{3}"}
THOUGHT = "<think>\nhm\n</think>\n"
RIGHT, WRONG = r"it is \boxed{\frac{1}{3}} I think", r"it is \boxed{\frac{1}{2}} I think"  # five words each

# For each: its arguments if it is a factory, the highest reward, whether it counts tokens, and the costs of texts.
REWARDS = {
    "think_format_reward": (None, 1, False, {THOUGHT + "yes": 0, "no": 1}),
    "accuracy_reward": (None, 1, False, {RIGHT: 0, WRONG: 1, "a third": 1}),
    "reasoning_accuracy_reward": (None, 1, False, {THOUGHT + RIGHT: 0, THOUGHT + WRONG: 1, RIGHT: 1}),
    # Halfway from 1 to 0.5 if right, halfway from -1 to -0.5 if wrong.
    "get_cosine_scaled_reward": ({"max_len": 10}, 1, True, {RIGHT: 0.25, WRONG: 1.75}),
    # Two of "a b", "b a", "a b" and "b a" are repetitions.
    "get_repetition_penalty_reward": ({"ngram_size": 2}, 0, True, {"a b a b a": 0.5, "a b c": 0, "": 0}),
    "get_soft_overlong_punishment": (
        {"max_completion_len": 6, "soft_punish_cache": 4},
        0,
        True,
        {"a b": 0, "a b c a": 0.5, "a b c a b c a": 1},
    ),
}
needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="this reward needs math_verify"
)


def reward_of(name):
    reward, arguments = getattr(rewards, name), REWARDS[name][0]
    return reward if arguments is None else reward(**arguments)


def test_every_reward_is_here():
    assert {name for name in rewards.__all__ if callable(getattr(rewards, name))} <= set(REWARDS)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs_math_verify if RIGHT in "".join(row[3]) else ())
        for name, row in REWARDS.items()
        if hasattr(rewards, name)  # two came with TRL 1.7
    ],
)
@pytest.mark.parametrize("overlap", [True, False])
def test_a_reward_of_trl_is_a_cost(name, overlap, tokenizer):
    _, best, counts_tokens, costs = REWARDS[name]
    cost = from_reward(reward_of(name), best=best, tokenizer=tokenizer if counts_tokens else None)
    objective = Objective(cost, None, 2.0, overlap=overlap)
    objective.check_signature(["solution"])
    prompts = Prompts([ROW], [[0]], ["row"])
    assert objective(prompts, [0] * len(costs), list(costs)).tolist() == pytest.approx(list(costs.values()))
    check_objective(cost, [{**ROW, "completion": text} for text in costs], objective_range=2)


@needs_math_verify
def test_a_row_that_no_reward_judges_is_refused():
    """TRL only warns; here the row would be without a target."""
    prompts = Prompts([{"prompt": CHAT, "solution": ""}], [[0]], ["row"])
    with pytest.raises(ValueError, match=r"'accuracy_reward' returned None for row 0, .*remove them"):
        Objective(from_reward(rewards.accuracy_reward), None, None)(prompts, [0], [RIGHT])
    format_and_accuracy = [from_reward(rewards.think_format_reward), from_reward(rewards.accuracy_reward)]
    assert Objective(format_and_accuracy, None, None)(prompts, [0], [THOUGHT + RIGHT]).tolist() == [0.0]


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([1.0, 0.25, 0.0]),
        torch.tensor([1.0, 0.25, 0.0], dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([[1.0], [0.25], [0.0]]),
        [torch.tensor(1), torch.tensor([0.25]), torch.tensor(False)],
        np.array([1, 0.25, 0], dtype=np.float32),
        np.array([[1], [0.25], [0]]),
        [np.float16(1), np.array(0.25), np.False_],
        (True, 0.25, 0),
        [np.bool_(True), 0.25, np.int8(0)],
        iter([1, 0.25, 0]),
    ],
)
def test_rewards_may_be_any_numbers(values):
    assert from_reward(lambda completions, **columns: values)(["x"] * 3, ["a", "b", "c"]) == [0.0, 0.75, 1.0]


@pytest.mark.parametrize("values", [torch.tensor([True, False]), np.array([True, False]), [True, False]])
def test_bools_are_rewards_and_no_costs(values):
    prompts = Prompts([{"prompt": "x"}], [[0]], ["row"])
    right = from_reward(lambda completions, **columns: values)
    assert Objective(right, None, None)(prompts, [0, 0], ["a", "b"]).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match=r"is True good or bad.*from_reward"):
        Objective(lambda prompts, completions: values, None, None)(prompts, [0, 0], ["a", "b"])


def needs_state(prompts, completions, trainer_state, **kwargs):
    return [0.0] * len(completions)


def logs(completions, *, log_extra, log_metric, **kwargs):
    return [0.0] * len(completions)


def takes_no_prompts(completions):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (rewards.accuracy_reward, r"missing a required argument: 'solution'. Add a column 'solution'"),
        (rewards.get_soft_overlong_punishment(9, 1), r"'completion_ids'. Wrap .*from_reward\(…, tokenizer=…\)"),
        (needs_state, r"'trainer_state'. TRL's trainers pass trainer_state to rewards; .*Give the parameter a default"),
        (logs, r"log_extra.*does not, because a cost is a function of the text"),
        (takes_no_prompts, r"unexpected keyword argument 'prompts'. Add \*\*columns"),
    ],
)
def test_a_reward_that_cannot_be_called_is_refused_before_it_is_called(reward, message):
    with pytest.raises(TypeError, match=message):
        Objective(from_reward(reward), None, None).check_signature(["target"])


def test_token_ids_are_those_of_the_text(tokenizer):
    def ids(completions, completion_ids, **kwargs):
        assert len(completions) == len(completion_ids)
        return [-sum(ids) for ids in completion_ids]

    cost = from_reward(ids, best=0, tokenizer=tokenizer)
    words = tokenizer.convert_tokens_to_ids(["▁a", "▁b"])
    assert cost(["x", "x"], ["a b b", ""]) == [words[0] + 2 * words[1], 0]
    with pytest.raises(TypeError, match="'takes_no_prompts' does not take completion_ids: remove the tokenizer"):
        from_reward(takes_no_prompts, tokenizer=tokenizer)
