"""The record of a run, in memory and on disk, and what is said about it."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from conftest import ALDRIFTTrainer, count_a, lora_config, tiny_gpt2

from aldrift_hf import RunCallback
from aldrift_hf.reporting import health, outcome
from aldrift_hf.reporting.record import DRAWS_FILE, MAX_DRAWS, RUN_FILE, RUNGS_FILE, RunRecord
from aldrift_hf.reporting.writers import RecordWriter

SETTINGS = {
    **{"tau_max": 2.0, "objective": ["cost"], "sampler": "archive", "corrects": True, "num_generations": 512},
    "success_threshold": 0.0,
}
RUNG = {"tau": 2.0, "draws": 512, "objective_mean": 1.0, "success": 0.5, "ess": 0.5, "khat": 0.2, "missing_mass": 0.0}


@pytest.fixture
def make(config, tokenizer):
    def build(model=None, train_dataset=None, objective=count_a, **settings):
        model = model or tiny_gpt2()
        return ALDRIFTTrainer(
            model,
            objective,
            config(**settings),
            train_dataset,
            processing_class=tokenizer,
            peft_config=lora_config(model),
        )

    return build


def record(finished=True, metrics=None, **last):
    return RunRecord(SETTINGS, tau_max=2.0, finished=finished, metrics=metrics or {}, rungs=[RUNG, RUNG | last])


@pytest.mark.slow
def test_a_run_is_read_as_it_was_written(make):
    trainer = make(train_dataset=[{"prompt": "a"}, {"prompt": "b"}])
    trainer.train()
    written = RunRecord.read(trainer.args.output_dir)
    assert written.finished
    assert written.settings == json.loads(json.dumps(trainer.record.settings))
    assert written.objective_range == trainer.record.objective_range == 3.0
    assert written.log_z == trainer.record.log_z
    assert len(written.rungs) == 3
    assert written.metrics == {key: value for key, value in trainer.record.metrics.items() if not math.isnan(value)}
    assert written.draws == trainer.record.draws
    assert len(written.draws) == 2 * 64
    draw = written.draws[0]
    assert draw["tau"] == 1.5
    assert draw["objective"] == count_a([], [draw["completion"]])[0]
    assert draw["log_weight"] == draw["log_prior"] - 1.5 * draw["objective"] - draw["log_model"]


@pytest.mark.slow
def test_weights_of_draws_are_multiples_of_their_prompts_mean(make):
    """Of all draws of the prompt, also of those that are not kept."""
    trainer = make(train_dataset=[{"prompt": "a"}, {"prompt": "b"}], num_rungs=1, num_generations=1024)
    trainer.train()
    for prompt in ("a", "b"):
        draws = [draw for draw in trainer.record.draws if draw["prompt"] == prompt]
        assert len(draws) < 1024
        assert sum(draw["weight"] for draw in draws) / len(draws) == pytest.approx(1, abs=0.1)
        offsets = [math.log(draw["weight"]) - draw["log_weight"] for draw in draws]
        assert offsets == pytest.approx([offsets[0]] * len(draws))


@pytest.mark.slow
def test_costs_of_the_prior_are_kept_when_a_run_is_resumed(make):
    first = make(save_strategy="epoch", num_rungs=2)
    first.train()
    costs = first.record.prior_costs
    assert len(costs) == 64
    assert sum(costs) / 64 == pytest.approx(first.record.rungs[0]["objective_mean"])
    resumed = make(save_strategy="epoch", num_rungs=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.record.prior_costs == costs == RunRecord.read(resumed.args.output_dir).prior_costs


@pytest.mark.slow
def test_the_worst_prompts_are_kept(make, monkeypatch):
    """Of a rung's proposals, and then of the final model's draws."""
    for module in ("run", "trainer"):
        monkeypatch.setattr(f"aldrift_hf.trainer.{module}.MAX_PROMPTS", 2)
    seen = []

    class Watch(RunCallback):
        def on_rung_learned(self, args, state, control, *, record, **kwargs):
            seen.append((record.prompt_metrics, record.draws))

        on_run_end = on_rung_learned

    trainer = make(train_dataset=["a", "b", "a b"], num_rungs=1)
    trainer.add_callback(Watch())
    trainer.train()
    (of_rung, drawn), (of_model, drawn_last) = seen
    assert drawn is not drawn_last
    assert of_rung[0]["kl"] >= trainer.record.rungs[-1]["kl_to_target"], "their mean over all prompts"
    assert ("missing_mass" in of_rung[0], "missing_mass" in of_model[0]) == (False, True)
    for rows, draws in seen:
        assert len(rows) == 2
        assert rows[0]["kl"] >= rows[1]["kl"]
        for row in rows:
            of_prompt = [draw for draw in draws if draw["prompt"] == row["prompt"]]
            assert row["objective"] == pytest.approx(sum(draw["objective"] for draw in of_prompt) / 64)


def test_a_notebook_shows_outcome_and_rungs():
    shown = record(finished=False)._repr_html_()
    assert "the model&#x27;s mean cost is 1 (the prior&#x27;s: 1)" in shown
    assert shown.count("<tr>") == 3
    assert "<td>2</td><td>1</td><td>0.500</td>" in shown
    many = RunRecord(SETTINGS, rungs=[RUNG] * 20)._repr_html_()
    assert many.count("<tr>") == 13
    assert "The first 8 rungs are left out." in many
    assert "<table" not in RunRecord(SETTINGS)._repr_html_()


def test_settings_say_what_was_asked(make):
    settings = make(objective=[count_a, lambda prompts, completions: [0.0] * len(completions)]).record.settings
    assert settings["objective"] == ["count_a", "<lambda>"]
    assert (settings["tau_max"], settings["objective_range"], settings["chain_length"]) == (1.5, 3.0, 4)
    assert (settings["num_generations"], settings["corrects"], settings["adapter_name"]) == (64, True, "default")
    assert settings["tuning"] == "LORA adapter of rank 4"
    assert settings["architecture"] == "GPT2LMHeadModel"


def test_a_range_that_was_measured_is_in_the_record(make):
    trainer = make(objective_range=None, tau_step=0.5, num_rungs=1)
    trainer.train()
    written = RunRecord.read(trainer.args.output_dir)
    assert written.objective_range == trainer.record.objective_range > 0
    assert written.settings["objective_range"] is None  # what was asked for is never overwritten


def test_no_token_reaches_the_record(make):
    trainer = make(hub_token="hf_planted", num_rungs=1)
    trainer.train()
    for name in (RUN_FILE, RUNGS_FILE, DRAWS_FILE):
        assert "hf_planted" not in Path(trainer.args.output_dir, name).read_text()


def test_a_run_under_way_can_be_read(make):
    def cost(prompts, completions):
        if len(trainer.record.rungs) == 2:
            raise KeyboardInterrupt
        return count_a(prompts, completions)

    trainer = make(objective=cost, overlap_objective=False)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    under_way = RunRecord.read(trainer.args.output_dir)
    assert not under_way.finished
    assert not under_way.metrics
    assert [rung["rung"] for rung in under_way.rungs] == [0, 1]
    assert outcome.outcome(under_way).startswith("So far, after 2 rungs")


@pytest.mark.slow
def test_a_resumed_run_keeps_the_draws_until_it_has_new_ones(make):
    first = make(save_strategy="epoch", num_rungs=2)
    first.train()
    drawn = RunRecord.read(first.args.output_dir).draws
    resumed = RunRecord(first.record.settings, rungs=first.record.rungs)
    RecordWriter().on_rung_learned(first.args, first.state, first.control, record=resumed)
    assert RunRecord.read(first.args.output_dir).draws == drawn
    assert not RunRecord.read(first.args.output_dir).finished


@pytest.mark.slow
def test_many_draws_are_thinned_evenly(make):
    trainer = make(num_generations=2000, num_rungs=1)
    trainer.train()
    assert MAX_DRAWS / 2 < len(trainer.record.draws) <= MAX_DRAWS


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not the output directory of a run: it has no run\.json"):
        RunRecord.read(tmp_path)


def test_odd_characters_survive(tmp_path):
    drawn = {"prompt": "\u2028", "completion": "a\nb\x85\ud800</script>", "objective": 0.0}
    RunRecord(SETTINGS, rungs=[RUNG | {"khat": math.nan}], draws=[drawn]).write(tmp_path)
    again = RunRecord.read(tmp_path)
    assert again.draws == [drawn]
    assert "khat" not in again.rungs[0]


# ---- In words -------------------------------------------------------------------------------------------------------


def test_a_good_run_has_no_warning():
    good = record(
        metrics={"draws": 512, "objective": 0.1, "success": 0.9, "ess": 0.9, "khat": 0.1, "missing_mass": 0.01}
    )
    assert health.run_warnings(good) == []
    assert outcome.outcome(good) == (
        "After 2 rungs, the model's mean cost is 0.1 (the prior's: 1) and 90.0% of its draws are of cost 0 (the "
        "prior's: 50.0%); by the ladder's log Z, its draws cover 99% of p_T."
    )


def test_few_draws_that_all_count_are_no_fault():
    few = {"draws": 12, "objective": 0.1, "missing_mass": 0.01}
    assert health.run_warnings(record(metrics=few | {"ess": 0.5})) == []
    (warning,) = health.run_warnings(record(metrics=few | {"ess": 0.2}))
    assert "worth 2.4 independent draws per prompt. Take smaller steps (tau_step; on the adaptive ladder" in warning


def test_what_counts_as_success_is_said():
    settings = SETTINGS | {"success_threshold": 0.25}
    strong = dataclasses.replace(record(metrics={"objective": 0.1, "success": 0.9, "ess": 0.9}), settings=settings)
    assert "90.0% of its draws are of cost 0.25 or less" in outcome.outcome(strong)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (record(metrics=RUNG | {"objective": 1.0, "missing_mass": 2.3}), "lost 2.30 nats"),
        (record(metrics=RUNG | {"objective": 1.0, "khat": 0.9}), "k-hat is 0.90"),
        (record(metrics=RUNG | {"objective": 1.0, "ess": 0.01}), "worth 5.1 independent draws per prompt"),
        (record(metrics=RUNG | {"objective": 1.0}, acceptance_rate=0.01), "accept 1.0%"),
        (record(metrics=RUNG | {"objective": 1.0}, tau=1.5), "ended at inverse temperature 1.5, below T = 2"),
        (record(), "before the final model could be measured"),
        (
            dataclasses.replace(record(metrics=RUNG | {"objective": 1.0}), settings=SETTINGS | {"corrects": False}),
            "makes no correction",
        ),
    ],
)
def test_what_a_reader_should_know_is_said(run, said):
    (warning,) = health.run_warnings(run)
    assert said in warning


def test_a_run_under_way_is_not_blamed_for_being_short_of_its_end():
    assert health.run_warnings(record(finished=False, tau=0.5)) == []
    assert health.run_warnings(RunRecord(SETTINGS)) == []
    assert outcome.outcome(RunRecord(SETTINGS)) == "The first rung is still running."


def test_the_share_that_is_covered():
    """However far the ladder's log Z lies below that of the model's draws; unknown where the missing mass is."""
    assert [outcome.covered_share(nats) for nats in (-5000.0, 0.0)] == [1.0, 1.0]
    assert outcome.covered_share(math.log(2)) == pytest.approx(0.5)
    assert math.isnan(outcome.covered_share(math.nan))
