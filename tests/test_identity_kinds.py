"""Costs of every kind, and costs made at random, are known by their content, in any process."""

import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from pathlib import Path

import cost_grammar
import cost_kinds
import cost_values
import httpx
import pytest
import torch
import transformers
from conftest import fuzz
from hypothesis import given
from hypothesis import strategies as st

from aldrift_hf.objective.identity import identity_of

NUM_SPECS = 100


def identity(function):
    return identity_of([function])


@pytest.fixture(scope="module")
def elsewhere():
    """The identities of all kinds of functions, and of some of the grammar's, in another process, in which sets have
    another order."""
    program = (
        "import json, cost_kinds, cost_grammar\nfrom aldrift_hf.objective.identity import identity_of\n"
        "named = {name: identity_of([make(1)]) for name, make in cost_kinds.KINDS.items()}\n"
        f"built = [identity_of([spec.build()]) for spec in cost_grammar.random_specs({NUM_SPECS})]\n"
        "print(json.dumps([named, built]))"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", cost_kinds.KINDS)
def test_a_cost_of_this_kind_is_known_by_its_content(name, elsewhere):
    make = cost_kinds.KINDS[name]
    first = identity(make(1))
    assert identity(make(1)) == first == elsewhere[0][name]
    assert identity(make(2)) != first


@pytest.mark.slow
def test_a_cost_of_the_grammar_is_the_same_in_another_process(elsewhere):
    specs = cost_grammar.random_specs(NUM_SPECS)
    found = [identity(spec.build()) for spec in specs]
    assert found == elsewhere[1]
    assert len(set(found)) == len({spec.effective() for spec in specs})


def test_every_part_of_the_grammar_is_told_from_the_others():
    """Also a set from the frozen set, and a dict from the view, that equal it: a cost may ask for the type."""
    spec = cost_grammar.Spec("def", *[0] * 6)
    found = [identity(spec._replace(closure=part).build()) for part in range(len(cost_grammar.PARTS))]
    assert len(set(found)) == len(found)


@st.composite
def pairs_of_specs(draw):
    """Two specifications that differ in one part, in some, or in none."""
    parts = st.integers(0, len(cost_grammar.PARTS) - 1)
    fields = dict.fromkeys(cost_grammar.Spec._fields, parts)
    fields |= {
        "shape": st.sampled_from(sorted(cost_grammar.SHAPES)),
        "literal": st.integers(0, len(cost_grammar.LITERALS) - 1),
    }
    one = cost_grammar.Spec(**{field: draw(strategy) for field, strategy in fields.items()})
    changed = draw(st.sets(st.sampled_from(cost_grammar.Spec._fields), max_size=2))
    return one, one._replace(**{field: draw(fields[field]) for field in sorted(changed)})


@pytest.mark.slow
@fuzz(200)
@given(pairs_of_specs())
def test_two_costs_have_one_identity_exactly_if_they_are_made_alike(pair):
    one, other = pair
    assert (identity(one.build()) == identity(other.build())) == (one.effective() == other.effective())


@pytest.mark.parametrize(
    ("make", "use"),
    [
        (lambda: cost_kinds.caches(1), lambda cost: cost.__closure__[0].cell_contents("text")),
        (lambda: cost_kinds.single_dispatch(1), lambda cost: cost.__closure__[0].cell_contents(1.5)),
        (
            lambda: cost_kinds.closing_over(cost_values.classifier(1, pad_token_id=0).eval()),
            lambda cost: cost.__closure__[0].cell_contents(torch.tensor([[1, 2]])),
        ),
        (
            lambda: cost_kinds.closing_over(torch.nn.Linear(2, 2)),
            lambda cost: cost.__closure__[0].cell_contents.zero_grad(),
        ),
        (lambda: cost_kinds.closing_over(re.compile("a")), lambda cost: cost.__closure__[0].cell_contents.match("a")),
    ],
    ids=["cached", "single dispatch", "classifier", "layer", "pattern"],
)
def test_using_a_cost_does_not_make_it_another(make, use):
    cost = make()
    before = identity(cost)
    use(cost)
    assert identity(cost) == before


async def _waited(semaphore):
    async def wait():
        async with semaphore:
            await asyncio.sleep(0)

    await asyncio.gather(*(wait() for _ in range(3)))


def test_what_a_process_has_of_a_semaphore_a_pool_or_a_client_changes_no_cost():
    semaphore, pool, client = asyncio.Semaphore(1), ThreadPoolExecutor(1), httpx.Client(base_url="http://localhost:1")
    costs = [cost_kinds.closing_over(each) for each in (semaphore, pool, client)]
    before = [*map(identity, costs)]
    asyncio.run(_waited(semaphore))
    pool.submit(int).result()
    with contextlib.suppress(httpx.TransportError):
        client.get("/")
    assert [*map(identity, costs)] == before
    other = cost_kinds.closing_over(httpx.Client(base_url="http://localhost:2"))
    assert identity(other) != before[2], "another service may have other costs"
    pool.shutdown()


def test_processes_change_no_cost_and_programs_do():
    """Each start of the run has its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as one, context.Pool(1) as other, ThreadPool(1) as threads, ThreadPool(1) as others:
        assert identity(cost_kinds.closing_over(one)) == identity(cost_kinds.closing_over(other))
        assert identity(cost_kinds.closing_over(threads)) == identity(cost_kinds.closing_over(others))
    programs = [subprocess.Popen([sys.executable, "-c", text]) for text in ("1", "1", "2")]
    for program in programs:
        program.wait()
    one, same, other = (identity(cost_kinds.closing_over(program)) for program in programs)
    assert one == same != other


def test_a_model_is_the_same_wherever_it_was_loaded_from(tmp_path):
    cost_values.classifier(1).save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    load = transformers.GPT2ForSequenceClassification.from_pretrained
    one, other = (identity(cost_kinds.closing_over(load(tmp_path / name))) for name in ("one", "other"))
    assert one == other
