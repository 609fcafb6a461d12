"""Costs are on disk before they are used, and none is evaluated twice."""

import gc
import platform
import sqlite3

import pytest
import torch
from conftest import ALDRIFTTrainer, count_a, lora_config, tiny_gpt2

from aldrift_hf.objective.objective import Objective
from aldrift_hf.objective.store import FOLDER, CostStore, Loaded, file_of_machine
from aldrift_hf.types import Prompts

ITEMS = [(("row", "a b"), [1.0, 2.5]), (("row", "\x00\ud800\u2028é"), [0.0, 0.0])]
ROW = Prompts([{"prompt": "x"}], [[0]], ["row"])


def written(folder, items=ITEMS, identity="mine"):
    store = CostStore(folder, identity, 2)
    store.add(items)
    return store


def read(folder, identity="mine", num_functions=2):
    store = CostStore(folder, identity, num_functions)
    store.load()
    return dict(store)


# ---- The file -------------------------------------------------------------------------------------------------------


def test_costs_are_read_as_they_were_written(tmp_path):
    written(tmp_path)
    assert read(tmp_path) == dict(ITEMS)
    assert [path.name for path in (tmp_path / FOLDER).glob("*.sqlite")] == ["0.sqlite"]
    with sqlite3.connect(tmp_path / FOLDER / "0.sqlite") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize("on_disk", [True, False])
def test_costs_are_looked_up_once_they_are_shared(on_disk, tmp_path):
    store = CostStore(tmp_path if on_disk else None, "mine", 2)
    assert store.load() == Loaded(0, 0)
    store.add(ITEMS)
    assert dict(store) == {}
    store.share()
    assert dict(store) == dict(ITEMS)
    assert ITEMS[0][0] in store
    assert ("row", "b") not in store
    assert (tmp_path / FOLDER).exists() == on_disk


def test_an_empty_folder_holds_no_costs(tmp_path):
    assert read(tmp_path) == {}
    assert not (tmp_path / FOLDER).exists()


def test_files_are_read_once(tmp_path):
    store = CostStore(tmp_path, "mine", 2)
    assert store.load() == Loaded(0, 0)
    written(tmp_path)
    assert store.load() is None
    assert dict(store) == {}


def test_a_file_that_another_machine_may_write_to_is_not_opened(tmp_path, monkeypatch):
    """A lock of SQLite may not reach beyond a machine. Commands that sample from a run have a file for each."""
    opened, names, stores, connect = [], set(), [], sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **options: opened.append(path) or connect(path, **options))
    for machine, item in zip(("a", "b"), ITEMS, strict=True):
        monkeypatch.setattr(platform, "node", lambda machine=machine: machine)
        store = CostStore(tmp_path, "mine", 2)
        store.first_file = file_of_machine()
        opened.clear()
        store.load()
        assert not [path for path in opened if path.parent == tmp_path / FOLDER and path.name in names]
        store.add([item])
        stores.append(store)  # and its file stays open
        names |= {path.name for path in opened if path.parent == tmp_path / FOLDER}
    assert len(names) == 2
    opened.clear()
    assert read(tmp_path) == dict(ITEMS)
    assert len(opened) == 2
    assert tmp_path / FOLDER not in {path.parent for path in opened}
    monkeypatch.setattr(platform, "node", lambda: "a")
    again = CostStore(tmp_path, "mine", 2)
    again.first_file = file_of_machine()
    assert again.load() == Loaded(2, 0)
    assert CostStore(tmp_path, "another", 2).load() == Loaded(0, 2)


@pytest.mark.slow
def test_files_of_more_processes_are_read_by_fewer(tmp_path):
    written(tmp_path, ITEMS[:1])
    gc.collect()  # closes it
    (tmp_path / FOLDER / "0.sqlite").rename(tmp_path / FOLDER / "3.sqlite")
    written(tmp_path, ITEMS[1:])
    assert read(tmp_path) == dict(ITEMS)


def test_a_damaged_file_is_named(tmp_path):
    written(tmp_path).close()
    path = tmp_path / FOLDER / "0.sqlite"
    path.write_bytes(b"no database at all, but long enough to be looked at" * 100)
    store = CostStore(tmp_path, "mine", 2)
    for _ in range(2):
        with pytest.raises(OSError, match=r"0\.sqlite, which holds the costs .*, is damaged.*Move the file away"):
            store.load()


def test_a_file_that_another_process_cannot_read_is_an_error_here_too(tmp_path, monkeypatch):
    """Or this process would wait for that one for ever."""

    def gather(mine):
        return [*mine, ([], "1.sqlite cannot be read")]

    monkeypatch.setattr("aldrift_hf.objective.store.gather_object", gather)
    with pytest.raises(OSError, match=r"1\.sqlite cannot be read"):
        read(tmp_path)


def test_a_file_without_a_table_holds_no_costs(tmp_path):
    """As after a kill just after the file was created."""
    (tmp_path / FOLDER).mkdir()
    sqlite3.connect(tmp_path / FOLDER / "0.sqlite").execute("PRAGMA journal_mode=WAL").close()
    assert read(tmp_path) == {}


def test_a_disk_without_room_is_an_error_that_says_so(tmp_path):
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "0.sqlite").mkdir()
    with pytest.raises(OSError, match=r"costs could not be written to .* Free disk space"):
        written(tmp_path)


def test_a_closed_store_writes_again(tmp_path):
    store = written(tmp_path, ITEMS[:1])
    store.close()
    store.close()
    store.add(ITEMS[1:])
    assert read(tmp_path) == dict(ITEMS)


# ---- Whose costs they are -------------------------------------------------------------------------------------------


def test_costs_of_other_objectives_are_counted_and_not_used(tmp_path):
    written(tmp_path)
    assert read(tmp_path, "another") == {}
    assert CostStore(tmp_path, "another", 2).load() == Loaded(0, 2)
    assert CostStore(tmp_path, "mine", 2).load() == Loaded(2, 0)


def test_another_number_of_functions_needs_another_key(tmp_path):
    written(tmp_path)
    with pytest.raises(ValueError, match=r"costs of 2 functions for this objective of 1\. Choose another objective_ca"):
        read(tmp_path, num_functions=1)


def needs(number):
    """As in a loop that tries several costs: they differ in a default alone."""
    return lambda prompts, completions, number=number: [float(text.count("a") != number) for text in completions]


def evaluated(function, folder, texts=("a", "a a"), **settings):
    objective = Objective(function, None, 3.0, output_dir=str(folder), **settings)
    costs = objective(ROW, [0] * len(texts), texts).tolist()
    objective.close()
    return costs


def test_a_cost_does_not_take_the_costs_of_another(tmp_path, caplog):
    assert evaluated(needs(1), tmp_path) == [0.0, 1.0]
    assert evaluated(needs(2), tmp_path) == [1.0, 0.0]
    assert "holds 2 costs of other objectives" in caplog.text
    assert "costs were found" not in caplog.text
    assert evaluated(needs(1), tmp_path) == [0.0, 1.0]
    assert caplog.text.count("2 costs were found in") == 1


def test_a_cache_key_is_the_identity_whatever_the_functions(tmp_path, caplog):
    assert evaluated(needs(1), tmp_path, cache_key="first") == [0.0, 1.0]
    assert evaluated(needs(2), tmp_path, cache_key="first") == [0.0, 1.0]
    assert "objective_cache_key='first' says that the objective is the same" in caplog.text
    assert evaluated(needs(2), tmp_path, cache_key="second") == [1.0, 0.0]
    assert evaluated(needs(2), tmp_path) == [1.0, 0.0]


def test_nothing_of_the_functions_is_hashed_with_a_cache_key(tmp_path, monkeypatch):
    monkeypatch.setattr("aldrift_hf.objective.identity._Computation", None)
    assert evaluated(needs(1), tmp_path, cache_key="first") == [0.0, 1.0]
    with pytest.raises(TypeError):
        evaluated(needs(1), tmp_path)


def test_what_the_identity_cannot_see_is_said_once(tmp_path, caplog):
    objective = Objective(count_a, None, 3.0, output_dir=str(tmp_path))
    with caplog.at_level("INFO"):
        for text in ("a", "b"):
            objective(ROW, [0], [text])
    assert caplog.text.count("changes to files, services and installed packages are not") == 1
    assert "set objective_cache_key" in caplog.text


# ---- Runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(config, tokenizer):
    def build(objective, **settings):
        model = tiny_gpt2()
        args = config(**settings)
        return ALDRIFTTrainer(model, objective, args, processing_class=tokenizer, peft_config=lora_config(model))

    return build


EVALUATED = []


def counted(prompts, completions):
    EVALUATED.extend(completions)
    return count_a(prompts, completions)


@pytest.mark.slow
def test_a_run_started_again_evaluates_nothing_and_ends_alike(make, caplog):
    EVALUATED.clear()
    first = make(counted)
    first.train()
    evaluated = len(EVALUATED)
    assert evaluated == len(set(EVALUATED)) == len(first.objective.store)
    EVALUATED.clear()  # the list is what the function refers to, and so a part of its identity
    second = make(counted)
    second.train()
    assert EVALUATED == []
    assert f"{evaluated:,} costs were found in" in caplog.text
    assert second.objective_calls == first.objective_calls, "the count is that of a run by itself"
    ours, theirs = (trainer.model.state_dict() for trainer in (first, second))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_costs_evaluated_before_an_error_are_not_evaluated_again(make):
    EVALUATED.clear()

    def flaky(prompts, completions):
        if len(EVALUATED) > 10 and not broken[0]:
            broken[0] = True
            raise RuntimeError("no answer")
        return counted(prompts, completions)

    broken = closing = [False]
    trainer = make(flaky, per_device_generation_batch_size=8)
    with pytest.raises(RuntimeError, match="no answer"):
        trainer.train()
    before = len(EVALUATED)
    assert before > 10
    trainer.train()
    assert closing[0]
    assert len(EVALUATED) == len(set(EVALUATED)) > before


@pytest.mark.slow
def test_costs_of_an_earlier_start_are_checked_against_a_smaller_range(make):
    make(count_a).train()
    with pytest.raises(ValueError, match=r"above objective_range=1\.0"):
        make(count_a, objective_range=1.0).train()
