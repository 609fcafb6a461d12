"""`EditedTop` with a surrogate: a model of the cost, on whose predictions the search is made."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ALDRIFTTrainer, lora_config, tiny_gpt2
from test_edited import COST, LETTERS, Letters, far, swapped, words_changed

from aldrift_hf import EditedTop
from aldrift_hf.algorithm.samplers import edited
from aldrift_hf.algorithm.samplers.surrogate import GENERATIONS


def true_cost(text):
    return float(sum(map(COST.get, text)))


class Told:
    """A surrogate that knows the cost, and remembers what it was told."""

    def __init__(self, predict=true_cost):
        self.told, self.predict = [], predict

    def __call__(self, texts, costs, rng):
        self.told.append(dict(zip(texts, costs, strict=True)))
        assert len(texts) == len(self.told[-1]), "each text once"

        seen = {*texts}

        def predicted(new):
            assert seen.isdisjoint(new), "neither evaluated nor predicted before"
            seen.update(new)
            return [self.predict(text) for text in new]

        return predicted


def test_edits_of_edits_are_made_on_predictions():
    """One letter is changed at a time: of "dbdbd", without a surrogate, no edit costs less than 8."""
    lowest = {}
    for name, surrogate in (("none", None), ("told", Told()), ("wrong", Told(lambda text: -true_cost(text)))):
        letters = Letters()
        letters.rung(EditedTop(swapped, edits_per_draw=5, surrogate=surrogate), ["dbdbd"])
        lowest[name] = min(map(true_cost, letters.asked[0]))
        assert len(letters.asked[0]) == 5
    assert lowest["none"] >= 8
    assert lowest["told"] < 3
    assert lowest["wrong"] > 11


def test_it_learns_from_everything_that_was_evaluated_and_no_text_is_evaluated_again():
    """Also from what is no longer among the best; not from what the prior excludes, which is not tried again either."""
    told, letters = Told(), Letters()
    sampler = EditedTop(swapped, edits_per_draw=30, remembered=3, surrogate=told)
    letters.rung(sampler, ["cbc", "dd"])
    assert [len(texts) for texts in letters.asked] == [edited.TOGETHER, 20]
    asked = [text for texts in letters.asked for text in texts]
    again = EditedTop(swapped, edits_per_draw=20, remembered=3, surrogate=told)
    again.load_state_dict(sampler.state_dict())
    letters.rung(again, ["bcb"])
    asked += [text for texts in letters.asked for text in texts]
    evaluated = [{"cbc"}, {"cbc", *asked[:40]}, {"cbc", *asked[:60], "bcb"}]
    for costs, texts in zip(told.told, evaluated, strict=True):
        assert costs == {text: true_cost(text) for text in texts if "dd" not in text}
    assert "dd" not in asked
    repeated = {text for text in asked if asked.count(text) > 1}
    assert repeated <= {"cbc", min(asked, key=true_cost)}, "but for the best one, which stands in for a missing edit"


def test_a_rung_that_was_stopped_is_made_again_as_it_was():
    """A checkpoint within it does not hold what it had evaluated: as known texts these would not be tried again."""
    whole, letters = EditedTop(swapped, edits_per_draw=60, surrogate=Told()), Letters()
    letters.rung(whole, ["cbc"])
    stopped = EditedTop(swapped, edits_per_draw=60, surrogate=Told())
    stopped.load_state_dict(whole.state_dict())
    letters.rung(whole, ["bcb"])
    expected, redraw = letters.asked, letters.redraw

    def stop(step, spans, screen=None):
        if step == 2:
            raise KeyboardInterrupt
        return redraw(step, spans, screen)

    letters.redraw = stop
    with pytest.raises(KeyboardInterrupt):
        letters.rung(stopped, ["bcb"])
    letters.redraw = redraw
    again = EditedTop(swapped, edits_per_draw=60, surrogate=Told())
    again.load_state_dict(stopped.state_dict())
    letters.rung(again, ["bcb"])
    assert letters.asked == expected


def test_of_equal_predictions_the_alphabet_does_not_decide():
    letters = Letters()
    every = [first + second + third for first in LETTERS for second in LETTERS for third in LETTERS]
    sampler = EditedTop(lambda texts, rng: every, edits_per_draw=10, surrogate=Told(lambda text: 0.0))
    letters.rung(sampler, ["bb"])
    assert len({text[0] for text in letters.asked[0]}) > 2


def test_a_run_that_began_without_goes_on_with_one():
    told, letters = Told(), Letters()
    before = EditedTop(swapped, edits_per_draw=2)
    letters.rung(before, ["cbc", "ddc", "bb"])
    best = {*letters.asked[0], *letters.asked[1], "cbc", "bb"}
    sampler = EditedTop(swapped, edits_per_draw=2, surrogate=told)
    sampler.load_state_dict(before.state_dict())
    letters.rung(sampler, ["d"])
    assert {*told.told[0]} == {text for text in best if "dd" not in text} | {"d"}


def test_how_often_texts_are_edited():
    calls = []

    def edit(texts, rng):
        calls.append(texts)
        return swapped(texts, rng)

    sampler = EditedTop(edit, edits_per_draw=40, remembered=3, surrogate=Told(), edits_per_evaluation=5)
    Letters().rung(sampler, ["dbdb"])
    assert len(calls) == 40 * 5 / edited.GENERATION
    assert {len(texts) for texts in calls} == {2 * edited.GENERATION}
    per_generation = len(calls) // GENERATIONS
    assert {*calls[0]} == {"dbdb"}
    last = {text for texts in calls[-per_generation:] for text in texts}
    assert len(last) == 3
    assert "dbdb" not in last, "edits are edited"


def test_each_prompt_has_a_surrogate_of_its_own():
    told, letters = Told(), Letters()
    letters.rung(EditedTop(swapped, edits_per_draw=1, surrogate=told), ["b", "c"], ["ab", "a"])
    assert told.told == [{"b": 1.0, "c": 2.0}, {"ab": 1.0, "a": 0.0}]


def test_where_all_is_excluded_nothing_is_learned():
    told, letters = Told(), Letters()
    letters.rung(EditedTop(swapped, edits_per_draw=1, surrogate=told), ["dd", "ddb"])
    assert not told.told
    assert not {"dd", "ddb"} & {*letters.asked[0]}


def test_the_order_of_edits_does_not_matter():
    """A set has another order in each process, and all processes must evaluate the same edits, whatever is tied."""
    words = [first + second for first in LETTERS for second in LETTERS]
    asked = []
    for order in (words, words[::-1], {*words}):
        letters = Letters()
        letters.rung(EditedTop(lambda texts, rng, order=order: order, surrogate=Told(len)), ["d", "c"])
        asked.append(letters.asked)
    assert asked[0] == asked[1] == asked[2]


@pytest.mark.parametrize(
    ("surrogate", "said"),
    [
        (
            lambda texts, costs: None,
            r"surrogate\(\) raised TypeError: .* takes 2 positional arguments but 3 were given",
        ),
        (
            lambda texts, costs, rng: 1 / 0,
            r"surrogate\(\) raised ZeroDivisionError: division by zero\. It is called as",
        ),
        (lambda texts, costs, rng: None, r"surrogate\(\) raised TypeError: 'NoneType' object is not callable"),
        (
            lambda texts, costs, rng: lambda new: [1.0],
            r"the function that surrogate\(\) returned gave \[1.0\] for \d+ t",
        ),
        (lambda texts, costs, rng: lambda new: [None] * len(new), r"gave \[None, .* It must return a number for each"),
        (lambda texts, costs, rng: lambda new: np.full(len(new), np.nan), r"gave \[nan, .* a number for each"),
        (lambda texts, costs, rng: lambda new: np.zeros((len(new), 1)), r"gave \[\[0.0\], .* a number for each"),
    ],
)
def test_a_surrogate_that_fails_is_named(surrogate, said):
    with pytest.raises((RuntimeError, ValueError), match=f"EditedTop: .*{said}"):
        Letters().rung(EditedTop(swapped, surrogate=surrogate), ["bb", "ab"])


def test_it_must_be_asked_for_at_least_one_edit():
    with pytest.raises(ValueError, match="edits_per_evaluation must be at least 1"):
        EditedTop(swapped, edits_per_evaluation=0)


def cheaper_with_c(texts, costs, rng):
    """Learns what a word c is worth, with a constant of chance: a source of randomness is part of the result."""
    counts = np.array([text.split().count("c") for text in texts])
    worth = np.polyfit(counts, costs, 1)[0] if len({*counts}) > 1 else rng.random()
    return lambda new: [worth * text.split().count("c") for text in new]


def test_a_run_that_is_resumed_goes_on_with_what_it_knows(config, tokenizer, tmp_path):
    """From a rung's last update, and in the middle of one; and it is a better search than without."""

    def trainer_of(name, surrogate=cheaper_with_c):
        settings = config(
            num_generations=24, num_rungs=4, tau_max=4.0, tau_step=1.0, objective_range=8.0, max_completion_length=9,
            updates_per_rung=4, per_device_train_batch_size=8, save_strategy="steps", save_steps=1,
            save_total_limit=None, output_dir=str(tmp_path / name),
        )  # fmt: skip
        model = tiny_gpt2()
        return ALDRIFTTrainer(
            model, far, settings, processing_class=tokenizer, peft_config=lora_config(model),
            sampler=EditedTop(words_changed, 5, surrogate=surrogate),
        )  # fmt: skip

    whole, without = trainer_of("whole"), trainer_of("without", None)
    whole.train()
    without.train()
    for step in (4, 10):
        again = trainer_of(f"from-{step}")
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for one, other in zip(whole.record.rungs, again.record.rungs, strict=True):
            for name in ("sample_objective_mean", "objective_calls", "edits", "log_z"):
                assert one[name] == other[name]
        assert again.sampler.state_dict().keys() == whole.sampler.state_dict().keys()
        for name, content in whole.sampler.state_dict().items():
            assert content.equal(again.sampler.state_dict()[name]), name
    means = [trainer.record.rungs[1]["sample_objective_mean"] for trainer in (whole, without)]
    assert means[0] < means[1] - 0.5


@pytest.mark.slow
def test_processes_search_alike():
    """The order of a set of texts depends on a hash that each process has of its own."""
    program = """
import random
from aldrift_hf.algorithm.samplers.surrogate import Evaluated

def surrogate(texts, costs, rng):
    return lambda new: [len(text) + rng.random() for text in new]

evaluated = Evaluated(surrogate)
evaluated.add(0, ["a"], [1.0])
rng = random.Random(0)
print(evaluated.promising(0, ["a"], 5, lambda texts: {text + each for text in texts for each in "abcd"}, rng))
"""
    found = [
        subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1]
    assert found[0].count(b",") > 10
