"""How a run ends: close to the target, no longer coming closer, or with its budget spent; and in what words."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ALDRIFTTrainer, count_a, lora_config, tiny_gpt2

from aldrift_hf.algorithm.ladders import LadderState
from aldrift_hf.reporting.record import RunRecord

LEARNS = {
    **{"sampler": "archive", "num_generations": 512, "updates_per_rung": 40, "per_device_train_batch_size": 32},
    **{"tau_step": 0.5, "num_rungs": None},
}
LONGER = {"max_completion_length": 6, "objective_range": 6.0}
"""So many texts that draws rarely repeat."""


@pytest.fixture
def make(config, tokenizer):
    def build(objective=count_a, **settings):
        model = tiny_gpt2()
        return ALDRIFTTrainer(
            model, objective, config(**settings), processing_class=tokenizer, peft_config=lora_config(model)
        )

    return build


def said(trainer):
    """The sentence in the record, also in the one that is kept."""
    reason = RunRecord.read(trainer.args.output_dir).ended_by
    assert reason == trainer.record.ended_by
    return reason


@pytest.mark.slow
def test_it_stays_at_the_target_until_the_model_is_close(make):
    trainer = make(**LEARNS)
    trainer.train()
    rungs = trainer.record.rungs
    assert [rung["tau"] for rung in rungs[:3]] == [0.5, 1.0, 1.5]
    assert {rung["tau"] for rung in rungs[3:]} == {1.5}
    assert len(rungs) >= 4
    for rung in rungs[-2:]:
        assert rung["ess"] >= 0.5
        assert abs(rung["missing_mass"]) <= rung["missing_mass_error"]
    assert said(trainer).startswith("The model is close to p_T: on 2 rungs running")
    assert trainer.record.metrics["ess"] > 0.5


@pytest.mark.slow
def test_it_ends_where_it_no_longer_comes_closer(make):
    """A model that hardly learns stays where it is."""
    trainer = make(**LEARNS | {"learning_rate": 1e-8, "updates_per_rung": 1, "num_generations": 64, "target_ess": 0.9})
    trainer.train()
    rungs = trainer.record.rungs
    assert len(rungs) >= 2 + 8, "four rungs at T, and four before"
    assert said(trainer).startswith("The model no longer comes closer to p_T")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "whole", "num_rungs"),
    [("archive", 64, None), ("metropolis_hastings", 64, None), ("suffix", 64, None), ("span", 16, 400)],
)
def test_the_budget_of_calls_is_never_exceeded(sampler, whole, num_rungs, make, tokenizer):
    """The last rung draws what is left: more than half a rung, in whole chains. `whole`: whole texts among 64."""
    asked = set()

    def cost(prompts, completions, **columns):
        asked.update(completions)
        return count_a(prompts, completions)

    settings = {**LONGER, "num_generations": 64, "updates_per_rung": 1, "tau_step": 0.1}
    trainer = make(cost, sampler=sampler, max_objective_calls=120, num_rungs=num_rungs, **settings)
    trainer.train()
    rungs = trainer.record.rungs
    assert len(asked) == trainer.objective_calls <= 120
    assert [rung["draws"] for rung in rungs[:-1]] == [whole] * (len(rungs) - 1)
    assert whole // 2 <= rungs[-1]["draws"] <= whole
    assert rungs[-1]["draws"] % 4 == 0 or sampler in ("archive", "span")
    reason = said(trainer)
    assert reason.startswith("The budget is spent")


@pytest.mark.parametrize(("budget", "evaluated"), [(70, True), (40, False)])
def test_evaluation_within_a_run_is_paid_from_the_budget(budget, evaluated, make, caplog):
    asked = set()

    def cost(prompts, completions, **columns):
        asked.update(completions)
        return count_a(prompts, completions)

    settings = {**LONGER, "num_generations": 32, "updates_per_rung": 1, "tau_step": 0.1, "eval_strategy": "epoch"}
    trainer = make(cost, max_objective_calls=budget, **settings)
    trainer.train()
    measured = [log for log in trainer.state.log_history if "eval_objective" in log]
    assert bool(measured) == evaluated
    assert len(asked) == trainer.objective_calls <= budget
    assert evaluated or "an evaluation is skipped" in caplog.text
    assert trainer.evaluate()["eval_draws"] == 32, "after the run nothing limits it"


def test_what_a_callback_stops_is_recorded_as_it_was(make):
    """After two of a rung's ten updates."""
    trainer = make(num_generations=64, updates_per_rung=10, max_steps=12, num_rungs=3, logging_steps=1)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log and "rung" not in log]
    rung = trainer.record.rungs[-1]
    assert (rung["rung"], rung["updates"]) == (1, 2)
    assert rung["loss"] == pytest.approx(sum(losses[10:12]) / 2, rel=1e-3)
    assert said(trainer) == "Training was stopped after update 12, by max_steps or a callback."


def test_a_run_resumed_from_its_last_update_ends_as_it_would_have(make):
    """As after a kill while the final model is measured."""
    settings = {"save_strategy": "epoch", "num_rungs": 2}
    whole = make(**settings)
    whole.train()
    resumed = make(**settings)
    resumed.train(resume_from_checkpoint=True)
    assert said(resumed) == whole.record.ended_by == "All of num_rungs=2 rungs were climbed."


def test_a_last_rung_that_was_cut_short_was_not_climbed(make):
    trainer = make(num_rungs=2, max_steps=7)  # of twice four updates
    trainer.train()
    assert [rung["updates"] for rung in trainer.record.rungs] == [4, 3]
    assert said(trainer) == "Training was stopped after update 7, by max_steps or a callback."


def test_an_evaluation_of_any_name_leaves_the_result_alone(make):
    trainer = make(num_generations=64, num_rungs=1)
    trainer.train()
    result, draws = dict(trainer.record.metrics), list(trainer.record.draws)
    trainer.evaluate(["b b"], metric_key_prefix="final")
    assert (trainer.record.metrics, trainer.record.draws) == (result, draws)


def test_a_schedule_over_an_unknown_number_of_updates_is_told(make, caplog):
    for settings, said in ({"warmup_steps": 0.1}, "a warm-up over a share"), ({"warmup_steps": 10}, ""):
        caplog.clear()
        make(num_generations=64, num_rungs=None, max_rungs=1, learning_rate=1e-3, **settings).train()
        assert ("is not known beforehand" in caplog.text) == bool(said)
        assert said in caplog.text


@pytest.mark.parametrize(("budget", "measured"), [(104, True), (36, False)])
def test_the_final_model_is_measured_with_what_is_left(make, budget, measured):
    """On 32 draws at least; one rung has left fewer calls of 36."""
    trainer = make(num_generations=64, max_objective_calls=budget, num_rungs=1, **LONGER)
    trainer.train()
    assert bool(trainer.record.metrics) == measured
    assert trainer.objective_calls <= budget
    assert not measured or 32 <= trainer.record.metrics["draws"] <= 64


def test_a_budget_below_one_chain_is_refused(make):
    with pytest.raises(ValueError, match=r"max_objective_calls=3 does not allow one proposal .*chain_length=4"):
        make(max_objective_calls=3).train()
    trainer = make(max_objective_calls=5)
    trainer.train()
    assert trainer.record.rungs[0]["draws"] == 4


@pytest.mark.slow
def test_max_rungs_is_a_budget(make):
    trainer = make(**LEARNS | {"target_ess": 0.999, "max_rungs": 5})
    trainer.train()
    assert len(trainer.record.rungs) == 5
    assert said(trainer) == "The budget is spent, with rung 4 at tau = 1.5: 5 rungs, as many as max_rungs allows."


@pytest.mark.parametrize(
    ("settings", "prompts", "most"),
    [
        ({}, 1, 200),
        ({"tau_step": 0.005}, 1, 2 * 300),
        ({"tau_step": 0.5, "prompts_per_rung": 1}, 150, 3 + 2 * 150),
        ({"max_rungs": 7, "tau_step": 0.005}, 1, 7),
    ],
)
def test_most_rungs_without_a_number_of_them(config, tokenizer, settings, prompts, most):
    """Twice as many as a long ladder has to T, or two epochs over many prompts there."""
    model = tiny_gpt2()
    settings = config(num_rungs=None, num_generations=16, **settings)
    trainer = ALDRIFTTrainer(
        model, count_a, settings, processing_class=tokenizer, peft_config=lora_config(model),
        train_dataset=[" ".join("ab"[number >> bit & 1] for bit in range(8)) for number in range(prompts)],
    )  # fmt: skip
    trainer.run.start()
    assert trainer.run.rungs_to_climb(resumed=False) == most


@pytest.mark.slow
def test_a_sampler_without_a_correction_ends_with_the_ladder(make):
    trainer = make(sampler="top", num_rungs=None)
    trainer.train()
    assert len(trainer.record.rungs) == 3
    assert "sampler='top' does not aim at p_T" in said(trainer)


@pytest.mark.slow
def test_a_set_number_of_rungs_is_what_is_climbed(make):
    trainer = make(num_rungs=4)
    trainer.train()
    assert [rung["tau"] for rung in trainer.record.rungs] == [0.5, 1.0, 1.5, 1.5]
    assert said(trainer) == "All of num_rungs=4 rungs were climbed."


def test_it_is_the_last_line_and_in_the_card(make, capsys):
    trainer = make(num_rungs=1, disable_tqdm=False)
    trainer.train()
    trainer.create_model_card()
    reason = "All of num_rungs=1 rungs were climbed."
    assert capsys.readouterr().out.strip().splitlines()[-1] == reason
    assert reason in Path(trainer.args.output_dir, "README.md").read_text()


@pytest.mark.slow
def test_a_run_that_stays_at_the_target_is_resumed_as_if_never_interrupted(make):
    settings = LEARNS | {"save_strategy": "epoch", "save_total_limit": None, "max_rungs": 6, "target_ess": 0.999}
    whole = make(**settings)
    whole.train()
    resumed = make(**settings)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{40 * 4}")
    assert resumed.record.ended_by == whole.record.ended_by
    assert resumed.record.log_z == whole.record.log_z
    assert resumed.record.log_z_error == whole.record.log_z_error
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters()):
        assert torch.equal(ours, theirs)


def test_less_than_half_of_a_rung_is_left_for_measuring(make):
    trainer = make(sampler="archive")
    run = trainer.run
    run.start()
    for limit, first, later in ((31, 31, 0), (32, 32, 32), (63, 63, 63), (1000, 64, 64)):
        trainer.args.max_objective_calls = run.args.max_objective_calls = limit
        run.state.ladder = LadderState.start(1, 1.5)
        assert run._affordable() == first
        run.state.ladder = replace(run.state.ladder, taus=(0.5,))
        assert run._affordable() == later
