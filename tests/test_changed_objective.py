"""A run is resumed with the costs that it has learned from, or not at all."""

import pytest
from conftest import ALDRIFTTrainer, count_a, lora_config, tiny_gpt2

from aldrift_hf import evaluated_texts

pytestmark = pytest.mark.versions


def counted(prompts, completions, calls=[], **columns):  # noqa: B006 - the same function with another default
    calls.extend(completions)
    return count_a(prompts, completions)


def another(prompts, completions, **columns):
    return [3 - cost for cost in count_a(prompts, completions)]


another.__name__ = "counted"


def partly(prompts, completions, **columns):
    """Another cost of the texts of three words, which are two in three."""
    return [
        cost if len(text) < 5 else 3 - cost
        for text, cost in zip(completions, count_a(prompts, completions), strict=True)
    ]


partly.__name__ = "counted"


@pytest.fixture
def trainer_of(config, tokenizer):
    def make(objective, **changes):
        model = tiny_gpt2()
        settings = config(save_strategy="epoch", num_rungs=2)
        for name, value in changes.items():
            setattr(settings, name, value)
        return ALDRIFTTrainer(
            model, objective, settings, train_dataset=["", "a b"], processing_class=tokenizer,
            peft_config=lora_config(model),
        )  # fmt: skip

    return make


@pytest.mark.parametrize("other", [another, partly])
def test_an_objective_with_other_costs_is_refused(trainer_of, other):
    trainer_of(counted).train()
    changed = trainer_of(other, num_rungs=3)
    with pytest.raises(
        ValueError, match=r"checkpoint-8 was written with other costs .*' cost \d\.\d and costs \d\.\d\."
    ):
        changed.train(resume_from_checkpoint=True)
    paid = evaluated_texts(changed.args.output_dir)
    assert len(paid) > 16, "what was compared is not the run's"
    assert [text["objective"] for text in paid] == sorted(count_a([], [text["completion"] for text in paid]))


def test_an_objective_that_only_looks_another_is_asked_a_few_texts_and_goes_on(trainer_of, monkeypatch):
    trainer_of(counted).train()
    asked = []
    monkeypatch.setattr(counted, "__defaults__", (asked,))
    longer = trainer_of(counted, num_rungs=3)
    asked.append("so its identity is another")
    resumed = trainer_of(counted, num_rungs=3)
    assert resumed.objective.store.identity != longer.objective.store.identity
    del asked[:]
    taken = []
    read = type(resumed.checkpointer).read
    monkeypatch.setattr(
        type(resumed.checkpointer),
        "read",
        lambda *args: (read(*args), taken.append((len(asked), resumed.objective_calls))),
    )
    resumed.train(resume_from_checkpoint=True)
    ((compared, calls),) = taken
    assert 1 <= compared <= 16
    assert calls > 16, "what is compared was counted as the run's calls"
    assert resumed.record.rungs[-1]["rung"] == 2


def test_the_same_objective_is_asked_for_nothing(trainer_of):
    trainer_of(count_a).train()
    resumed = trainer_of(count_a, num_rungs=3)
    resumed.objective.store.sample = None
    resumed.train(resume_from_checkpoint=True)


def test_with_a_key_the_user_vouches_for_the_costs(trainer_of):
    trainer_of(counted).train()
    trainer_of(another, num_rungs=3, objective_cache_key="random").train(resume_from_checkpoint=True)


def test_a_key_that_has_changed_says_that_costs_have(trainer_of):
    trainer_of(counted, objective_cache_key="one").train()
    with pytest.raises(ValueError, match="was written with other costs"):
        trainer_of(another, num_rungs=3, objective_cache_key="two").train(resume_from_checkpoint=True)


def test_without_costs_on_disk_it_is_a_warning(trainer_of, caplog):
    first = trainer_of(counted)
    first.train()
    for file in first.objective.store.folder.iterdir():
        file.unlink()
    trainer_of(another, num_rungs=3).train(resume_from_checkpoint=True)
    assert "no cost is on disk to be compared" in caplog.text


def test_another_budget_names_what_follows_from_it(trainer_of):
    def budget(calls):
        return {"sampler": "archive", "num_generations": None, "chain_length": None, "max_objective_calls": calls}

    trainer_of(count_a, **budget(60)).train()
    with pytest.raises(ValueError, match=r"num_generations = .*follows from max_objective_calls: set it\."):
        trainer_of(count_a, **budget(120)).train(resume_from_checkpoint=True)
