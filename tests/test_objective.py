"""What a cost function may return, what happens when it is not a valid cost, and what a run counts."""

import asyncio
import contextlib
import functools
import gc
import math
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from decimal import Decimal

import pytest
import torch

from aldrift_hf import from_reward
from aldrift_hf.objective.calling import ObjectiveError
from aldrift_hf.objective.objective import Objective
from aldrift_hf.objective.store import CostStore
from aldrift_hf.objective.validation import CostRangeError
from aldrift_hf.objective.weighted import WeightedCost
from aldrift_hf.types import Prompts


def prompts(*texts, **columns):
    rows = [{"prompt": text, **{name: values[i] for name, values in columns.items()}} for i, text in enumerate(texts)]
    return Prompts(rows, [[0]] * len(rows), [str(row) for row in rows])


def objective(*functions, weights=None, limit=10.0, batch_size=4):
    return Objective(list(functions), weights, limit, batch_size=batch_size)


def returning(value, name="broken"):
    def cost(prompts, completions):
        return [value if text == "bad" else 1.0 for text in completions]

    cost.__name__ = name
    return cost


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (math.nan, "NaN"),
        (math.inf, "infinite"),
        (-0.5, "negative"),
        (None, "not a number"),
        ("1", "not a number"),
        (True, "is True good or bad"),
        (10**400, "infinite"),
        (10.5, "above objective_range=10.0"),
    ],
)
def test_an_invalid_cost_is_named_with_objective_row_and_completion(value, problem):
    with pytest.raises(ValueError, match="broken") as error:
        objective(returning(value))(prompts("x", "y"), [0, 1, 1], ["good", "fine", "bad"])
    assert problem in str(error.value)
    assert "row 1" in str(error.value)
    assert "'bad'" in str(error.value)


@pytest.mark.parametrize("result", [[1.0], [1.0] * 3, 1.0, None, {"a": 1}])
def test_a_wrong_number_of_costs_is_named_with_objective_rows_and_completion(result):
    def wrong(prompts, completions):
        return result

    with pytest.raises(ValueError, match=r"'wrong'.* 2 completions \(rows 0 to 1, the first completion 'a'\)"):
        objective(wrong)(prompts("x", "y"), [0, 1], ["a", "b"])


def test_an_exception_names_objective_and_completion_and_keeps_its_cause():
    def fragile(prompts, completions):
        raise KeyError("no such thing")

    with pytest.raises(ObjectiveError, match=r"'fragile' raised KeyError.*the first of which is 'a'") as error:
        objective(fragile)(prompts("x"), [0], ["a"])
    assert isinstance(error.value.__cause__, KeyError)


def test_costs_evaluated_before_an_exception_are_kept():
    def cost(prompts, completions):
        if "c" in completions:
            raise RuntimeError("service down")
        return [1.0] * len(completions)

    evaluate = objective(cost, batch_size=2)
    with pytest.raises(ObjectiveError):
        evaluate(prompts("x"), [0] * 4, ["a", "b", "c", "d"])
    assert evaluate.calls == 2


def test_costs_are_stored_by_prompt_row_and_completion():
    seen = []

    def cost(prompts, completions):
        seen.append(list(zip(prompts, completions)))
        return [float(len(text)) for text in completions]

    evaluate = objective(cost)
    rows = prompts("x", "y")
    assert evaluate(rows, [0, 0, 1, 0], ["a", "bb", "a", "a"]).tolist() == [1, 2, 1, 1]
    assert evaluate(rows, [1, 1], ["a", "ccc"]).tolist() == [1, 3]
    assert seen == [[("x", "a"), ("x", "bb"), ("y", "a")], [("y", "ccc")]]
    assert evaluate.calls == 4


def test_equal_rows_share_their_costs_across_data_sets():
    evaluate = objective(lambda prompts, completions: [1.0] * len(completions))
    evaluate(prompts("x", "y"), [1], ["a"])
    evaluate(prompts("y"), [0], ["a"])
    assert evaluate.calls == 1


def test_columns_reach_the_objective_row_by_row():
    def cost(prompts, completions, target, **rest):
        assert set(rest) == {"extra"}
        return [abs(len(text) - wanted) for text, wanted in zip(completions, target)]

    values = objective(cost)(prompts("x", "y", target=[1, 3], extra=["p", "q"]), [1, 0, 1], ["a", "aa", "aaa"])
    assert values.tolist() == [2, 1, 0]


def test_a_weighted_sum_of_sync_and_async_functions():
    async def slow(prompts, completions):
        await asyncio.sleep(0.01)
        return [1.0] * len(completions)

    class AsyncCallable:
        async def __call__(self, prompts, completions):
            return [2.0] * len(completions)

    def length(prompts, completions):
        return [len(text) for text in completions]

    evaluate = objective(slow, functools.partial(length), AsyncCallable(), weights=[0.5, 1.0, 0.25], limit=None)
    assert evaluate.names == ["slow", "length", "AsyncCallable"]
    assert evaluate(prompts("x"), [0, 0], ["a", "aaa"]).tolist() == [2.0, 4.0]
    assert evaluate.components(prompts("x"), [0, 0], ["a", "aaa"]) == {"slow": 1.0, "length": 2.0, "AsyncCallable": 2.0}


def test_async_functions_run_together_and_inside_a_running_loop():
    running, most = 0, 0

    async def cost(prompts, completions):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        return [0.0] * len(completions)

    async def notebook():
        return objective(cost, cost)(prompts("x"), [0], ["a"])

    assert asyncio.run(notebook()).tolist() == [0.0]
    assert most == 2


@pytest.mark.parametrize("kind", ["tensor", "array", "numpy scalars", "integers", "tuple", "decimals"])
def test_any_sequence_of_numbers_is_accepted(kind):
    import numpy as np

    values = {
        "tensor": torch.tensor([1.0, 2.0]),
        "array": np.array([1.0, 2.0]),
        "numpy scalars": [np.float32(1), np.int64(2)],
        "integers": [1, 2],
        "tuple": (1.0, 2.0),
        "decimals": [Decimal(1), Decimal("2.0")],
    }[kind]
    assert objective(lambda prompts, completions: values)(prompts("x"), [0, 0], ["a", "b"]).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("value", "cost"), [(-1.2e-7, 0.0), (-9e-6, 0.0), (-0.0, 0.0), (10 * (1 + 1e-7), 10.0), (10 + 9e-6, 10.0)]
)
@pytest.mark.parametrize("on_error", ["raise", "worst"])
def test_rounding_is_clamped_to_the_range(value, cost, on_error, tmp_path):
    settings = {"on_error": on_error, "output_dir": str(tmp_path), "cache_key": "test"}
    for _ in range(2):  # evaluated, and read from disk
        evaluate = Objective(returning(value), None, 10.0, **settings)
        costs = evaluate(prompts("x"), [0, 0], ["bad", "good"]).tolist()
        assert costs == [cost, 1.0]
        assert math.copysign(1, costs[0]) == 1
        assert evaluate.failures == 0
        evaluate.close()


@pytest.mark.parametrize(
    ("value", "weight", "limit", "others", "accepted"),
    [
        (-1.1e-5, 1.0, 10.0, 1.0, False),
        (-1.9e-5, 0.5, 10.0, 1.0, True),
        (-2.1e-5, 0.5, 10.0, 1.0, False),
        (-1.1e-5, 0.0, 10.0, 1.0, False),
        (-9e-7, 1.0, None, 0.5, True),
        (-1.1e-6, 1.0, None, 0.5, False),
        (-9e-4, 1.0, None, 1000.0, True),
        (-1.1e-3, 1.0, None, 1000.0, False),
        (10 + 1.1e-5, 1.0, 10.0, 1.0, False),
    ],
)
def test_rounding_is_a_millionth_of_the_range(value, weight, limit, others, accepted):
    def cost(prompts, completions):
        return [value if text == "bad" else others for text in completions]

    evaluate = objective(cost, lambda prompts, completions: [0.0] * len(completions), weights=[weight, 1], limit=limit)
    if accepted:
        assert evaluate(prompts("x"), [0, 0], ["bad", "good"])[0] == 0
    else:
        with pytest.raises(CostRangeError):
            evaluate(prompts("x"), [0, 0], ["bad", "good"])


def test_a_sum_is_clamped_as_a_whole():
    halves = [lambda prompts, completions: [0.5 + 4e-7] * len(completions)] * 2
    assert objective(*halves, limit=1.0)(prompts("x"), [0], ["a"]).tolist() == [1.0]
    with pytest.raises(CostRangeError):
        objective(*halves, limit=0.99)(prompts("x"), [0], ["a"])


@pytest.mark.parametrize(
    ("stored", "limit"), [([math.nan], 5.0), ([-1.0], 5.0), ([4.0], 3.0), ([None], 5.0), ([""], 5.0)]
)
def test_costs_on_disk_are_checked_as_those_evaluated(stored, limit, tmp_path):
    store = CostStore(str(tmp_path), "key:test", 1)
    store.add([((ONE.keys[0], "a"), stored), ((ONE.keys[0], "b"), [5.0])])
    store.close()
    for on_error in ("raise", "worst"):
        with pytest.raises(ValueError, match="row 0"):
            tolerant(failing([], "raise"), tmp_path, on_error=on_error, objective_range=limit)(ONE, [0], ["a"])


# ---- Functions that do not judge every completion --------------------------------------------------------------------


def judges(texts, value):
    return lambda prompts, completions: [value if text in texts else None for text in completions]


def test_a_function_that_does_not_judge_a_completion_is_left_out_of_its_sum(tmp_path):
    functions = [judges("ab", 1.0), from_reward(judges("bc", 0.0), best=3.0)]
    for _ in range(2):  # evaluated, and read from disk
        evaluate = Objective(functions, [1.0, 2.0], 10.0, output_dir=str(tmp_path), cache_key="test")
        assert evaluate(prompts("x"), [0] * 3, ["a", "b", "c"]).tolist() == [1.0, 7.0, 6.0]
        assert list(evaluate.components(prompts("x"), [0] * 3, ["a", "b", "c"]).values()) == [1.0, 3.0]
        assert list(evaluate.components(prompts("x"), [0], ["c"]).values()) == [3.0]
        evaluate.close()


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_completion_that_no_function_judges_is_an_error(weight):
    """A function of weight 0 does not count."""
    functions = [judges("a", 1.0), judges("a" if weight else "ab", 1.0)]
    with pytest.raises(ValueError, match=r"returned None for row 0.*not a number.*remove such rows"):
        objective(*functions, weights=[1.0, weight])(prompts("x"), [0, 0], ["a", "b"])
    evaluate = Objective(functions, [1.0, weight], 10.0, on_error="worst")
    assert evaluate(prompts("x"), [0, 0], ["a", "b"]).tolist() == [1.0 + weight, 10.0]


def test_weights_must_match():
    with pytest.raises(ValueError, match="2 entries for 1 objectives"):
        objective(returning(1.0), weights=[1.0, 2.0])


def test_functions_of_one_name_are_told_apart():
    def cost(prompts, completions):
        return [1.0] * len(completions)

    def cost_2(prompts, completions):
        return [2.0] * len(completions)

    half = functools.partial(lambda prompts, completions: [0.5] * len(completions))
    evaluate = objective(cost, cost_2, functools.partial(cost), half, half, limit=None)
    assert evaluate.names == ["cost", "cost_2", "cost_3", "<lambda>", "<lambda>_2"]
    evaluate(prompts("x"), [0], ["a"])
    assert list(evaluate.components(prompts("x"), [0], ["a"]).values()) == [1.0, 2.0, 1.0, 0.5, 0.5]


def test_an_objective_without_a_function_is_refused():
    with pytest.raises(TypeError, match="cost function"):
        Objective([], None, None)
    with pytest.raises(TypeError, match="cost function"):
        Objective("not callable", None, None)


def test_a_function_that_cannot_take_the_columns_is_refused():
    with pytest.raises(TypeError, match=r"'broken' cannot be called .* Add \*\*columns"):
        objective(returning(1.0)).check_signature(["target"])
    objective(lambda prompts, completions, **columns: None).check_signature(["target"])


def test_a_reward_becomes_a_cost():
    def reward(completions, **kwargs):
        return [len(text) / 10 for text in completions]

    cost = from_reward(reward)
    assert cost.__name__ == "reward"
    assert cost(["x"], ["aaa"]) == [0.7]
    assert from_reward(reward, best=2.0)(["x"], ["aaaaa"]) == [1.5]
    evaluate = objective(from_reward(lambda completions, **kwargs: [1.5]))
    with pytest.raises(ValueError, match="negative"):
        evaluate(prompts("x"), [0], ["a"])
    evaluate = objective(from_reward(lambda completions, **kwargs: [None]))
    with pytest.raises(ValueError, match="not a number"):
        evaluate(prompts("x"), [0], ["a"])


def test_an_async_reward_stays_async():
    async def reward(prompts, completions, **kwargs):
        return [1.0] * len(completions)

    assert objective(from_reward(reward))(prompts("x"), [0], ["a"]).tolist() == [0.0]


def test_costs_are_computed_while_the_caller_goes_on():
    """In a thread, one batch after the other. What is asked for twice is evaluated once."""
    go, calls = threading.Event(), []

    def slow(prompts, completions):
        assert go.wait(10)
        calls.append((list(completions), threading.current_thread()))
        return [float(len(text)) for text in completions]

    where, batch = prompts("x"), objective(slow, batch_size=2)
    batch.begin(where, [0, 0, 0], ["a", "bb", "ccc"])
    batch.begin(where, [0, 0], ["bb", "dddd"])
    assert not calls, "the caller had to wait"
    go.set()
    texts = ["a", "bb", "ccc", "bb", "dddd"]
    assert batch.finish(where, [0] * 5, texts).tolist() == [1, 2, 3, 2, 4]
    assert [completions for completions, _ in calls] == [["a", "bb"], ["ccc"], ["dddd"]]
    assert all(thread is not threading.main_thread() for _, thread in calls)
    assert batch.calls == 4


def test_without_overlap_the_objective_stays_in_the_main_thread():
    threads = []

    def cost(prompts, completions):
        threads.append(threading.current_thread())
        signal.setitimer(signal.ITIMER_REAL, 0)  # works only in the main thread
        return [0.0] * len(completions)

    where = prompts("x")
    alone = Objective(cost, None, 10.0, overlap=False)
    alone.begin(where, [0], ["a"])
    assert not threads
    alone.finish(where, [0], ["a"])
    assert threads == [threading.main_thread()]
    signal_handler = signal.getsignal(signal.SIGALRM)

    def timed(prompts, completions):
        signal.signal(signal.SIGALRM, signal_handler)
        return [0.0] * len(completions)

    with pytest.raises(ObjectiveError, match="overlap_objective=False"):
        objective(timed)(where, [0], ["a"])


def test_an_error_is_raised_by_the_next_begin_and_earlier_costs_are_kept():
    begun = []

    def cost(prompts, completions):
        begun.append(list(completions))
        if "bad" in completions:
            raise RuntimeError("no more")
        return [1.0] * len(completions)

    where, batch = prompts("x"), objective(cost, batch_size=1)
    batch.begin(where, [0, 0, 0], ["good", "bad", "never"])
    while batch._begun.error is None:
        time.sleep(0.01)
    with pytest.raises(ObjectiveError, match="no more"):
        batch.begin(where, [0], ["later"])
    assert begun == [["good"], ["bad"]]
    assert batch.calls == 1, "a cost evaluated before the error is lost"
    assert batch(where, [0], ["good"]).tolist() == [1.0], "the error is raised again"


def test_abandoned_completions_are_not_evaluated():
    go, begun = threading.Event(), []

    def cost(prompts, completions):
        begun.append(list(completions))
        assert go.wait(10)
        return [1.0] * len(completions)

    where, batch = prompts("x"), objective(cost, batch_size=1)
    batch.begin(where, [0, 0, 0], ["a", "b", "c"])
    while not begun:
        time.sleep(0.01)
    batch.abandon()
    go.set()
    assert batch(where, [0], ["d"]).tolist() == [1.0]
    assert begun == [["a"], ["d"]]
    batch.begin(where, [0], ["e"])
    while not batch._begun.evaluated:
        time.sleep(0.01)
    batch.abandon()
    assert batch(where, [0], ["e"]).tolist() == [1.0]
    assert begun == [["a"], ["d"], ["e"]], "a stored cost is evaluated again"


def test_a_function_that_exits_the_program_does_so_from_a_thread_too():
    """SystemExit in a thread would be lost, and other processes would wait forever."""

    def cost(prompts, completions):
        raise SystemExit("enough")

    batch = objective(cost)
    for _ in range(2):
        with pytest.raises(SystemExit, match="enough"):
            batch(prompts("x"), [0], ["a"])


@pytest.mark.slow
def test_a_cost_that_hangs_does_not_keep_the_program_alive():
    code = (
        "import time\nfrom aldrift_hf.objective.objective import Objective\nfrom aldrift_hf.types import Prompts\n"
        "where = Prompts([{'prompt': 'x'}], [[0]], ['x'])\n"
        "slow = Objective(lambda prompts, completions: time.sleep(600), None, None)\n"
        "slow.begin(where, [0], ['a'])\ntime.sleep(0.2)\nraise SystemExit(3)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 3


# ---- Failures -------------------------------------------------------------------------------------------------------

ONE = prompts("x")


def failing(texts, how):
    """A cost that fails whenever the batch contains one of these texts."""

    def cost(prompts, completions):
        asked.append(list(completions))
        values = [float(len(text)) for text in completions]
        if not set(texts) & set(completions):
            return values
        if how == "raise":
            raise TimeoutError("no answer")
        return {"nan": [math.nan] * len(values), "shape": values[1:], "none": [None] * len(values)}[how]

    asked = []
    cost.asked = asked
    return cost


def tolerant(cost, folder=None, **settings):
    """An objective that gives failures the worst cost."""
    settings = {"batch_size": 3, "on_error": "worst", "cache_key": "test", **settings}
    limit = settings.pop("objective_range", 5.0)
    return Objective(cost, None, limit, output_dir=None if folder is None else str(folder), **settings)


TEXTS, COSTS = ["a", "bb", "ccc", "dddd"], [1.0, 5.0, 3.0, 4.0]


@pytest.mark.parametrize("how", ["raise", "nan", "shape", "none"])
@pytest.mark.parametrize("overlap", [True, False])
def test_completions_that_fail_cost_the_worst(how, overlap, caplog, tmp_path):
    cost = failing(["bb"], how)
    first = tolerant(cost, tmp_path, overlap=overlap)
    assert first(ONE, [0] * 4, TEXTS).tolist() == COSTS
    assert cost.asked == [["a", "bb", "ccc"], ["a"], ["bb"], ["ccc"], ["dddd"]]
    assert first.failures == 1
    assert "1 completions could not be evaluated and cost 5" in caplog.text
    assert first(ONE, [0] * 4, TEXTS).tolist() == COSTS
    assert len(cost.asked) == 5, "a failure is evaluated again within the run"
    assert first.calls == 4
    assert (ONE.keys[0], "bb") not in first.store
    next_run = tolerant(failing([], how), tmp_path)
    assert next_run(ONE, [0] * 4, TEXTS).tolist() == [1.0, 2.0, 3.0, 4.0], "a failure is not evaluated in the next run"
    assert next_run.functions[0].asked == [["bb"]]


@pytest.mark.parametrize("on_error", ["raise", "worst"])
@pytest.mark.parametrize("value", [math.nan, None, math.inf, "?", True, -0.5, 5.5])
def test_one_value_that_is_no_cost_takes_no_other_with_it(on_error, value, tmp_path):
    """They are paid for: they are on disk, and no start asks for them again."""
    asked = []

    def cost(prompts, completions):
        asked.append(list(completions))
        return [value if text == "bad" else 1.0 for text in completions]

    settings = {"on_error": on_error, "output_dir": str(tmp_path), "cache_key": "test"}
    objective = Objective([cost, returning(1.0)], [1.0, 1.0], 5.0, **settings)
    if value is None:  # one of two functions need not judge a text
        objective = Objective(cost, None, 5.0, **settings)
    texts = ["a", "bad", "b"]
    out_of_range = value in (-0.5, 5.5)
    if on_error == "raise" or out_of_range:
        returned = "'cost [+] broken' returned 6.5" if value == 5.5 else f"'cost' returned {re.escape(repr(value))}"
        with pytest.raises(ValueError, match=rf"{returned} for row 0, .*: completion 'bad'"):
            objective(prompts("x"), [0] * 3, texts)
    else:
        objective(prompts("x"), [0] * 3, texts)
    objective.close()
    assert asked == [texts] + [["bad"]] * (on_error == "worst" and not out_of_range)
    again = Objective(objective.functions, None, 6.5, **{**settings, "on_error": "worst"})
    with pytest.raises(ValueError, match="negative") if value == -0.5 else contextlib.nullcontext():
        again(prompts("x"), [0] * 3, texts)
    again.close()
    assert ["bad"] in asked, "all else was on disk"
    assert sum(text != "bad" for batch in asked for text in batch) == 2


def test_a_failure_among_costs_of_an_earlier_start_costs_the_worst(tmp_path):
    """The costs found show that the function can be evaluated."""
    tolerant(failing([], "raise"), tmp_path)(ONE, [0] * 4, TEXTS)
    later = tolerant(failing(["e"], "raise"), tmp_path)
    assert later(ONE, [0, 0], ["a", "e"]).tolist() == [1.0, 5.0]
    assert later.functions[0].asked == [["e"], ["e"]]


def test_a_cost_that_never_worked_is_an_error_all_the_same():
    objective = Objective(failing(["a", "b"], "raise"), None, 5.0, on_error="worst")
    with pytest.raises(ObjectiveError, match="no answer"):
        objective(ONE, [0, 0], ["a", "b"])


def test_the_worst_of_several_is_the_worst_of_their_sum():
    functions = [failing(["bb"], "raise"), failing([], "raise")]
    objective = Objective(functions, [0.5, 2.0], 6.0, on_error="worst")
    assert objective(ONE, [0, 0], ["a", "bb"]).tolist() == [2.5, 6.0]


@pytest.mark.parametrize("on_error", ["raise", "worst"])
@pytest.mark.parametrize("value", [-0.1, 10.1, -math.pi, 1e300])
def test_a_number_outside_of_the_range_is_an_error_for_all_completions(on_error, value):
    """Also where another function fails on the same completion."""
    for functions in ([returning(value)], [failing(["bad"], "nan"), returning(value)]):
        evaluate = Objective(functions, None, 10.0, on_error=on_error)
        with pytest.raises(CostRangeError, match=r"negative|above objective_range=10\.0"):
            evaluate(prompts("x"), [0, 0], ["a", "bad"])
        assert evaluate.failures == 0


@pytest.mark.parametrize(("bound", "weights"), [(None, None), (5.0, [0.0])])
def test_failures_need_a_worst_cost(bound, weights):
    with pytest.raises(ValueError, match="objective_on_error='worst' needs objective_range"):
        Objective(failing([], "raise"), weights, bound, on_error="worst")


# ---- What a run counts ----------------------------------------------------------------------------------------------


def counts(objective):
    return objective.calls, objective.failures


@pytest.mark.parametrize("same_folder", [True, False])
def test_a_resumed_run_counts_as_an_uninterrupted_one(same_folder, tmp_path):
    """Also the completions that failed: they cost the worst for the rest of the run, and are counted once."""
    draws = [["a", "bb"], ["bb", "ccc", "a"], ["dddd", "bb", "", "a"]]
    whole, history, states = tolerant(failing(["bb"], "raise"), tmp_path / "whole"), [], []
    for texts in draws:
        costs = whole(ONE, [0] * len(texts), texts).tolist()
        history.append((costs, counts(whole)))
        states.append(whole.state_dict())
    assert history[-1] == ([4.0, 5.0, 0.0, 1.0], (5, 1))

    resumed = tolerant(failing(["bb"], "raise"), tmp_path / ("whole" if same_folder else "other"))
    resumed.load_state_dict(states[0])
    assert counts(resumed) == history[0][1]
    for texts, expected in zip(draws[1:], history[1:]):
        assert (resumed(ONE, [0] * len(texts), texts).tolist(), counts(resumed)) == expected
    assert ["bb"] not in resumed.functions[0].asked
    for state in (states[-1], resumed.state_dict()):
        assert state["asked"].dtype == state["failed"].dtype == torch.int64
        assert [len(state["asked"]), len(state["failed"])] == [5, 1]
    assert torch.equal(states[-1]["asked"], resumed.state_dict()["asked"])


def test_a_checkpoint_of_the_counts_holds_no_costs():
    objective = tolerant(failing([], "raise"))
    assert {name: tuple(value.shape) for name, value in objective.state_dict().items()} == {
        "asked": (0,),
        "before": (0,),
        "failed": (0,),
    }
    objective(ONE, [0] * 4, TEXTS)
    sizes = {name: tuple(value.shape) for name, value in objective.state_dict().items()}
    assert sizes == {"asked": (4,), "before": (0,), "failed": (0,)}


def test_a_new_run_counts_from_zero_and_evaluates_only_what_failed():
    cost = failing(["bb"], "raise")
    objective = tolerant(cost)
    objective(ONE, [0] * 4, TEXTS)
    assert counts(objective) == (4, 1)
    objective.reset()
    assert counts(objective) == (0, 0)
    cost.asked.clear()
    assert objective(ONE, [0, 0, 0], ["dddd", "ccc", "ccc"]).tolist() == [4.0, 3.0, 3.0]
    assert counts(objective) == (0, 0), "both were asked for before the run"
    assert cost.asked == []
    assert objective(ONE, [0, 0], ["bb", "a"]).tolist() == [5.0, 1.0]
    assert counts(objective) == (0, 1)
    assert cost.asked == [["bb"], ["bb"]], "in its batch, and by itself"
    assert objective(ONE, [0, 0], ["eeeee", "eeeee"]).tolist() == [5.0, 5.0]
    assert counts(objective) == (1, 1)
    again = tolerant(cost)
    again.load_state_dict(objective.state_dict())
    assert counts(again) == (1, 1)
    assert again(ONE, [0, 0], ["eeeee", "dddd"]).tolist() == [5.0, 4.0]
    assert counts(again) == (1, 1), "a resumed run knows what was asked for before it"


def test_costs_of_an_earlier_start_count_when_first_asked_for(tmp_path):
    tolerant(failing([], "raise"), tmp_path)(ONE, [0] * 4, TEXTS)
    cost = failing([], "raise")
    later = tolerant(cost, tmp_path)
    assert counts(later) == (0, 0)
    assert later(ONE, [0, 0, 0], ["ccc", "bb", "ccc"]).tolist() == [3.0, 2.0, 3.0]
    assert counts(later) == (2, 0)
    assert len(later.store) == 4
    assert cost.asked == []


def started_since(before):
    """Threads that were not there before; those of earlier tests may end at any moment."""
    return set(threading.enumerate()) - before


@pytest.mark.parametrize("overlap", [True, False])
def test_a_closed_objective_has_no_thread_and_no_file(overlap, tmp_path):
    before = set(threading.enumerate())
    objective = tolerant(failing([], "raise"), tmp_path, overlap=overlap)
    objective(ONE, [0] * 4, TEXTS)
    assert len(started_since(before)) == overlap
    assert {path.name for path in tmp_path.glob("_costs/*")} > {"0.sqlite"}, "the log of an open database"
    for _ in range(2):
        objective.close()
        assert not started_since(before)
        assert [path.name for path in tmp_path.glob("_costs/*")] == ["0.sqlite"]
    assert objective(ONE, [0], ["dddd"]).tolist() == [4.0]


@pytest.mark.parametrize("overlap", [True, False])
def test_leaving_the_outermost_context_closes_the_objective(overlap, tmp_path):
    before = set(threading.enumerate())
    objective = tolerant(failing([], "raise"), tmp_path, overlap=overlap)
    for _ in range(2):
        with objective.open():
            with objective.open():
                assert objective(ONE, [0], ["a"]).tolist() == [1.0]
            assert objective(ONE, [0], [f"a{_}"]).tolist() == [2.0]
            assert len(started_since(before)) == overlap
            assert {path.name for path in tmp_path.glob("_costs/*")} > {"0.sqlite"}
        assert not started_since(before)
        assert [path.name for path in tmp_path.glob("_costs/*")] == ["0.sqlite"]
    with contextlib.suppress(KeyboardInterrupt), objective.open():
        objective.begin(ONE, [0], ["b"])
        raise KeyboardInterrupt
    assert not started_since(before)
    assert not objective._begun.asked


async def length_later(prompts, completions):
    return [float(len(text)) for text in completions]


@pytest.mark.slow
@pytest.mark.parametrize("cost", [length_later, failing([], "raise"), failing(["a"], "raise")])
def test_objectives_that_nobody_uses_leave_nothing_behind(cost, tmp_path):
    """Neither a thread nor an object, although none was closed."""
    objective(length_later)(ONE, [0], ["a"])  # starts the event loop of the process
    gc.collect()
    before, gone = set(threading.enumerate()), []
    for number in range(30):
        one = objective(cost) if number % 2 else tolerant(cost, tmp_path / str(number), on_error="raise")
        with contextlib.suppress(ObjectiveError):
            one(ONE, [0, 0], ["a", "bb"])
        one.begin(ONE, [0], ["cc"])
        gone.append(weakref.ref(one))
        del one
    gc.collect()
    deadline = time.monotonic() + 10
    while started_since(before) or any(ref() for ref in gone):
        assert time.monotonic() < deadline, (started_since(before), sum(bool(ref()) for ref in gone))
        time.sleep(0.01)
        gc.collect()


def test_a_thread_that_waits_for_work_keeps_nothing_alive():
    one = objective(failing([], "raise"))
    one(ONE, [0], ["a"])
    thread, gone = one._worker._thread, weakref.ref(one)
    gc.collect()
    gc.disable()
    try:
        del one
        assert gone() is None
    finally:
        gc.enable()
    thread.join(10)
    assert not thread.is_alive()


def test_closing_does_not_wait_for_a_function_that_hangs(monkeypatch):
    monkeypatch.setattr("aldrift_hf.objective.worker.SECONDS_TO_STOP", 0.1)
    go, begun = threading.Event(), threading.Event()

    def hangs(prompts, completions):
        begun.set()
        go.wait(60)
        return [0.0] * len(completions)

    batch = objective(hangs, batch_size=1)
    batch.begin(ONE, [0, 0], ["a", "b"])
    assert begun.wait(10)
    started = time.monotonic()
    batch.close()
    assert time.monotonic() - started < 10
    go.set()


def test_progress_is_shown_by_batches():
    shown = []

    @contextlib.contextmanager
    def progress(description, total, done=0):
        yield lambda steps: shown.append((description, total, steps))

    Objective(failing([], "raise"), None, None, batch_size=3, progress=progress)(ONE, [0] * 4, TEXTS)
    assert shown == [("objective batches", 2, 1)] * 2


def test_the_worst_costs_sum_to_the_bound():
    cost = lambda prompts, completions: [0.0] * len(completions)  # noqa: E731
    other = lambda prompts, completions: [0.0] * len(completions)  # noqa: E731
    for weights in ([0.25, 0.25], [1, 3], [0, 2]):
        both = WeightedCost([cost, other], weights, 2.0)
        assert sum(w * c for w, c in zip(weights, both.worst())) == pytest.approx(2.0)
        assert both.total(both.worst()) == pytest.approx(2.0)
