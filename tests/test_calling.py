"""How cost functions are called: on one event loop if they are async, and with copies that they may edit."""

import asyncio
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import ALDRIFTTrainer, lora_config, tiny_gpt2
from datasets import Dataset

from aldrift_hf import from_reward
from aldrift_hf.objective.calling import ObjectiveError
from aldrift_hf.objective.copies import copy_of
from aldrift_hf.objective.objective import Objective
from aldrift_hf.objective.testing import check_objective
from aldrift_hf.types import Prompts

ONE = Prompts([{"prompt": "x"}], [[0]], ["row"])


def evaluated(*functions, texts=("a", "bb"), **settings):
    objective = Objective(list(functions), None, None, batch_size=4, **settings)
    try:
        return objective(ONE, [0] * len(texts), list(texts)).tolist()
    finally:
        objective.close()


# ---- Async functions -------------------------------------------------------------------------------------------------

LIMIT = asyncio.Semaphore(1)
QUEUE = asyncio.Queue()


async def one(text):
    async with LIMIT:
        await asyncio.sleep(0.001)
        return float(len(text))


async def all_of(prompts, completions):
    return await asyncio.gather(*map(one, completions))


async def waits_for_its_queue(prompts, completions):
    producer = asyncio.ensure_future(QUEUE.put(1.0))
    values = [await QUEUE.get()] * len(completions)
    await producer
    return values


@pytest.mark.parametrize("overlap", [True, False])
def test_what_belongs_to_an_event_loop_works_in_every_batch_trainer_and_check(overlap):
    for _ in range(2):
        texts = [letter * length for letter in "abc" for length in range(1, 5)]
        costs = evaluated(all_of, waits_for_its_queue, texts=texts, overlap=overlap)
        assert costs == [len(text) + 1 for text in texts]
        check_objective(all_of, ["a", "bb"])
    assert sum(thread.name == "aldrift-event-loop" for thread in threading.enumerate()) == 1


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Callable:
    def __call__(self, prompts, completions, **columns):
        return all_of(prompts, completions)

    async def method(self, prompts, completions):
        return await all_of(prompts, completions)


class Awaitable:
    def __init__(self, completions):
        self.completions = completions

    def __await__(self):
        return all_of(None, self.completions).__await__()


def makes_a_task(prompts, completions):
    return asyncio.get_running_loop().create_task(all_of(prompts, completions))


AWAITABLES = {
    "async": all_of,
    "lambda": lambda prompts, completions: all_of(prompts, completions),
    "decorated": decorated(all_of),
    "twice": decorated(decorated(all_of)),
    "partial": functools.partial(all_of),
    "partial of a lambda": functools.partial(lambda prompts, completions: all_of(prompts, completions)),
    "callable": Callable(),
    "bound method": Callable().method,
    "awaitable": lambda prompts, completions: Awaitable(completions),
    "gather": lambda prompts, completions: asyncio.gather(*map(one, completions)),
    "task": makes_a_task,
    "namespace": SimpleNamespace(cost=all_of).cost,
}


@pytest.mark.filterwarnings("ignore:coroutine 'one' was never awaited", "ignore:There is no current event loop")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", AWAITABLES)
@pytest.mark.parametrize("overlap", [True, False])
def test_a_function_may_return_an_awaitable(name, overlap):
    function = AWAITABLES[name]
    assert evaluated(function, overlap=overlap) == [1.0, 2.0]
    assert evaluated(from_reward(function, best=5.0), overlap=overlap) == [4.0, 3.0]

    async def notebook():
        return evaluated(function, overlap=overlap)

    assert asyncio.run(notebook()) == [1.0, 2.0]


def test_a_function_that_runs_its_own_event_loop_works():
    assert evaluated(lambda prompts, completions: asyncio.run(asyncio.sleep(0, [1.0, 2.0]))) == [1.0, 2.0]


def test_an_async_function_that_fails_is_named_and_the_others_are_cancelled():
    ended = []

    async def waits(prompts, completions):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")

    async def fails(prompts, completions):
        await asyncio.sleep(0.01)
        raise KeyError("no such thing")

    with pytest.raises(ObjectiveError, match=r"'fails' raised KeyError.*the first of which is 'a'") as error:
        evaluated(waits, fails)
    assert isinstance(error.value.__cause__, KeyError)
    assert ended == ["cancelled"]

    def not_async(prompts, completions):
        raise KeyError("no such thing")

    with pytest.raises(ObjectiveError, match="'not_async'"):
        evaluated(waits, not_async)
    assert ended == ["cancelled"], "it had begun"


@pytest.mark.parametrize("on_error", ["raise", "worst"])
def test_what_a_function_has_started_is_cancelled_if_it_fails_and_goes_on_if_it_does_not(on_error):
    ended, served = [], asyncio.Queue()

    async def request(text):
        try:
            if text == "bad":
                raise KeyError("no answer")
            await asyncio.sleep(600 if text == "slow" else 0)
            return 1.0
        finally:
            await asyncio.sleep(0.01)
            ended.append(text)

    async def serve():
        while True:
            text, answer = await served.get()
            answer.set_result(float(len(text)))

    server = []

    async def cost(prompts, completions):
        if not server:
            server.append(asyncio.ensure_future(serve()))
        answers = [asyncio.get_running_loop().create_future() for _ in completions]
        for text, answer in zip(completions, answers):
            served.put_nowait((text, answer))
        return await asyncio.gather(*answers)

    async def fails(prompts, completions):
        return await asyncio.gather(*map(request, completions))

    objective = Objective([cost, fails], None, 9.0, batch_size=3, on_error=on_error)
    assert objective(ONE, [0, 0], ["a", "bb"]).tolist() == [2.0, 3.0]
    ended.clear()
    with pytest.raises(ObjectiveError, match="no answer"):
        Objective(fails, None, None)(ONE, [0, 0], ["slow", "bad"])
    assert sorted(ended) == ["bad", "slow"]
    assert objective(ONE, [0, 0], ["ccc", "dddd"]).tolist() == [4.0, 5.0], "the server of the first call has ended"
    objective.close()
    server[0].get_loop().call_soon_threadsafe(server[0].cancel)


@pytest.mark.parametrize("overlap", [True, False])
def test_an_async_function_that_exits_the_program_does_so(overlap):
    async def leaves(prompts, completions):
        await asyncio.sleep(0)
        raise SystemExit("enough")

    with pytest.raises(SystemExit, match="enough"):
        evaluated(leaves, overlap=overlap)
    assert evaluated(all_of) == [1.0, 2.0], "the event loop has ended"


def waiting_for_ever():
    state = SimpleNamespace(begun=threading.Event(), cancelled=threading.Event())

    async def cost(prompts, completions):
        state.begun.set()
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            state.cancelled.set()
            raise

    return cost, state


class TimedOut(BaseException):
    """As some libraries' time-outs and panics: not an `Exception`."""


@pytest.mark.parametrize("kind", [TimedOut, KeyboardInterrupt])
@pytest.mark.parametrize("is_async", [False, True])
def test_what_is_no_exception_ends_the_evaluation_too(kind, is_async):
    """And does not hang it: a `KeyboardInterrupt` in the function's thread is of the function's own making."""

    def cost(prompts, completions):
        raise kind("not in time")

    async def later(prompts, completions):
        cost(prompts, completions)

    if is_async and kind is KeyboardInterrupt:
        pytest.skip("asyncio itself ends with the program then")
    with pytest.raises(ObjectiveError, match=f"raised {kind.__name__}: not in time"):
        evaluated(later if is_async else cost, overlap=True)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_function_whose_own_tasks_are_cancelled_is_named(overlap):
    """As by a client that gives up: nobody has cancelled the run."""

    async def cancelled(prompts, completions):
        raise asyncio.CancelledError

    with pytest.raises(ObjectiveError, match=r"objective 'cancelled' raised CancelledError"):
        evaluated(cancelled, overlap=overlap)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_function_may_ask_for_the_threads_event_loop(overlap):
    def cost(prompts, completions):
        async def lengths():
            return [len(text) for text in completions]

        return asyncio.get_event_loop().run_until_complete(lengths())

    assert evaluated(cost, overlap=overlap) == [1, 2]


def test_an_interrupt_cancels_what_async_functions_are_doing():
    cost, state = waiting_for_ever()

    def interrupt():
        state.begun.wait()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        evaluated(cost, overlap=False)
    assert state.cancelled.wait(10)
    assert evaluated(all_of) == [1.0, 2.0]


def test_closing_cancels_what_async_functions_are_doing():
    cost, state = waiting_for_ever()
    objective = Objective(cost, None, None)
    objective.begin(ONE, [0], ["a"])
    assert state.begun.wait(10)
    started = time.monotonic()
    objective.close()
    assert state.cancelled.wait(10)
    assert time.monotonic() - started < 3


def program(code):
    start = (
        "import asyncio, os, time\nfrom aldrift_hf.objective.objective import Objective\n"
        "from aldrift_hf.types import Prompts\nwhere = Prompts([{'prompt': 'x'}], [[0]], ['x'])\n"
    )
    return subprocess.run([sys.executable, "-c", start + code], timeout=100, capture_output=True, text=True)


@pytest.mark.slow
def test_an_async_cost_that_hangs_does_not_keep_the_program_alive():
    done = program(
        "slow = Objective(lambda prompts, completions: asyncio.sleep(600), None, None)\n"
        "slow.begin(where, [0], ['a'])\ntime.sleep(0.2)\nraise SystemExit(3)\n"
    )
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_an_event_loop_of_its_own():
    done = program(
        "cost = lambda prompts, completions: asyncio.sleep(0, [1.0])\n"
        "assert Objective(cost, None, None)(where, [0], ['a']).tolist() == [1.0]\n"
        "child = os.fork()\n"
        "assert Objective(cost, None, None)(where, [0], ['a']).tolist() == [1.0]\n"
        "if child:\n    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "os._exit(5)\n"
    )
    assert done.returncode == 5, done.stderr


# ---- Copies ----------------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "?"}]


def edits_everything(prompts, completions, target, **columns):
    for prompt in prompts:
        prompt.append({"role": "assistant", "content": "!"})
        prompt[0]["content"] = "edited"
    for item in target:
        item["x"][0] += 1
    completions.reverse()
    prompts.clear()
    columns.clear()
    return [0.0] * len(completions)


async def edits_later(prompts, completions, target, **columns):
    await asyncio.sleep(0)
    return edits_everything(prompts, completions, target)


@pytest.mark.parametrize("edits", [edits_everything, edits_later, from_reward(edits_everything, best=0)])
def test_a_function_that_edits_its_arguments_changes_nothing_else(edits):
    data = Dataset.from_dict({"prompt": [CHAT, CHAT], "target": [{"x": [1]}, {"x": [2]}]})
    rows = [dict(row) for row in data]
    rows[1]["prompt"] = rows[0]["prompt"]  # as where one prompt is repeated
    seen = []

    def looks(prompts, completions, target):
        seen.extend(zip(prompts, completions, target, strict=True))
        return [float(target["x"][0]) for target in target]

    objective = Objective([edits, looks, edits], None, None, batch_size=3)
    prompts = Prompts(rows, [[0], [0]], ["0", "1"])
    for texts in (["a", "c", "b", "d"], ["e", "f", "g", "h"]):
        assert objective(prompts, [0, 1, 0, 1], texts).tolist() == [1.0, 2.0, 1.0, 2.0]
    assert [(prompt, target["x"]) for prompt, _, target in seen] == [(CHAT, [1]), (CHAT, [2])] * 4
    assert [text for _, text, _ in seen] == list("acbdefgh")
    assert rows == [{"prompt": CHAT, "target": {"x": [number]}} for number in (1, 2)]
    objective.close()


def test_items_share_nothing_with_each_other():
    """Two rows of the same prompt, which one deep copy of the batch would keep as one object."""
    seen = []

    def appends(prompts, completions, **columns):
        for prompt, text in zip(prompts, completions):
            prompt.append({"role": "assistant", "content": text})
        seen.extend(map(len, prompts))
        return [0.0] * len(completions)

    prompts = Prompts([{"prompt": CHAT}], [[0]], ["row"])
    Objective(appends, None, None, overlap=False)(prompts, [0] * 3, ["a", "b", "c"])
    assert seen == [2, 2, 2]
    assert len(CHAT) == 1


@pytest.mark.parametrize(
    ("value", "edit", "read"),
    [
        (np.zeros(2), lambda x: x.fill(1), lambda x: x.tolist()),
        (torch.zeros(2), lambda x: x.add_(1), lambda x: x.tolist()),
        (PIL.Image.new("L", (1, 1)), lambda x: x.putpixel((0, 0), 1), lambda x: x.getpixel((0, 0))),
        ({"a": [1]}, lambda x: x["a"].append(2), lambda x: x["a"]),
        ((["a"],), lambda x: x[0].append(2), lambda x: x[0]),
        ({"a"}, lambda x: x.add("b"), sorted),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_of_columns_are_copied(value, edit, read):
    before, copied = read(value), copy_of(value)
    assert type(copied) is type(value)
    before = list(before) if isinstance(before, list) else before
    edit(copied)
    assert read(value) == before != read(copied)


def test_what_cannot_be_copied_is_passed_as_it_is_and_what_is_beside_it_is_copied():
    lock = threading.Lock()
    value = [{"lock": lock, "list": [1]}, (lock, [2])]
    copied = copy_of(value)
    assert copied[0]["lock"] is copied[1][0] is lock
    assert copied == value
    copied[0]["list"].append(3)
    assert value[0]["list"] == [1]


def test_texts_are_not_copied():
    text = "a" * 1000
    assert copy_of(text) is text


def test_a_run_with_a_function_that_edits_its_arguments_is_as_one_without(config, tokenizer):
    def sorts(prompts, completions):
        completions.sort()
        prompts.clear()
        return [0.0] * len(completions)

    def count(prompts, completions):
        return [float(text.count("a")) for text in completions]

    model = tiny_gpt2()
    trainer = ALDRIFTTrainer(
        model, [sorts, count], config(), processing_class=tokenizer, peft_config=lora_config(model)
    )
    samples = trainer.sample(8, chain_length=1)
    assert samples["objective"][:] == [float(text.count("a")) for text in samples["completion"]]
