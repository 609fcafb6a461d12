"""The adaptive ladder in the trainer: it climbs to T by steps that its weights allow, or says why it cannot."""

import itertools
import math
from dataclasses import replace

import pytest
from conftest import ALDRIFTTrainer, count_a, lora_config, tiny_gpt2
from test_goals import exact_pool

from aldrift_hf.algorithm.ladders import AdaptiveLadder, LadderState

pytestmark = pytest.mark.slow

ADAPTIVE = {"ladder": "adaptive", "tau_step": None, "num_generations": 256, "updates_per_rung": 8}


def trainer_of(settings, tokenizer):
    model = tiny_gpt2()
    return ALDRIFTTrainer(
        model, count_a, settings, processing_class=tokenizer, peft_config=lora_config(model), train_dataset=["", "a b"]
    )


@pytest.mark.parametrize("sampler", ["metropolis_hastings", "archive"])
def test_it_climbs_to_the_target(sampler, config, tokenizer):
    settings = {**ADAPTIVE, "updates_per_rung": 24, "per_device_train_batch_size": 16}
    trainer = trainer_of(config(**settings, sampler=sampler, ess_threshold=0.6, tau_max=3.0), tokenizer)
    trainer.train()
    records = trainer.record.rungs
    taus = [record["tau"] for record in records]
    assert len(taus) >= 2
    assert taus[-1] == 3.0, "the end is T exactly"
    assert all(a <= b for a, b in itertools.pairwise(taus))
    for before, record in itertools.pairwise(records):
        if record["tau"] > before["tau"]:
            share = record["ess"] if sampler == "metropolis_hastings" else record["archive_ess"]
            draws = 1 if sampler == "metropolis_hastings" else record["archive_draws"] / (64 * 4)
            assert share * draws >= 0.6 - 1e-6
            if record["tau"] < 3.0:
                assert share * draws == pytest.approx(0.6, abs=1e-3), "no smaller step than the threshold asks for"
    assert trainer.state.global_step == 24 * len(records)


def test_it_says_when_it_cannot_move(config, tokenizer, caplog):
    """Nothing is learnt, and so the draws of the prior never allow the second step."""
    trainer = trainer_of(config(**ADAPTIVE, ess_threshold=0.9, tau_max=3.0, learning_rate=0.0), tokenizer)
    trainer.train()
    taus = [record["tau"] for record in trainer.record.rungs]
    assert 0 < taus[0] < 1
    assert len(set(taus[-6:])) == 1
    assert taus[-1] < 3.0
    assert "The adaptive ladder cannot leave tau = " in caplog.text
    assert "Lower ess_threshold" in caplog.text


def test_a_number_of_rungs_is_kept(config, tokenizer):
    trainer = trainer_of(config(**ADAPTIVE, ess_threshold=0.3, tau_max=0.2, num_rungs=3), tokenizer)
    trainer.train()
    assert [record["tau"] for record in trainer.record.rungs] == [0.2] * 3, "further rungs stay at T"


def test_resumed_at_the_end_nothing_is_left_to_do(config, tokenizer, tmp_path):
    settings = {**ADAPTIVE, "ess_threshold": 0.5, "tau_max": 1.0, "save_strategy": "epoch", "save_total_limit": None}
    trainer = trainer_of(config(**settings), tokenizer)
    trainer.train()
    taus = [record["tau"] for record in trainer.record.rungs]
    for step in sorted({8, trainer.state.global_step}):
        resumed = trainer_of(config(**settings, output_dir=str(tmp_path / f"from-{step}")), tokenizer)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        assert [record["tau"] for record in resumed.record.rungs] == taus
        assert resumed.state.global_step == trainer.state.global_step


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "top"}, "takes its steps by the weights, and sampler='top' has none"),
        ({"sampler": "reweight"}, "sampler='reweight' has none"),
        ({"tau_step": 0.5}, "tau_step=0.5 has no meaning for ladder='adaptive'"),
        ({"ess_threshold": 1.0}, "ess_threshold must be greater than 0 and less than 1"),
        ({"ess_threshold": 0.0}, "ess_threshold must be greater than 0 and less than 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message, config):
    with pytest.raises(ValueError, match=message):
        config(**{**ADAPTIVE, **changes})


def test_without_a_t_in_sight_the_ladder_leaves_zero():
    pool, state = exact_pool(), LadderState.start(1, None)
    state = LadderState(state.log_z, state.log_z_error, state.prompt_tau, (), None, math.inf, math.inf)
    tau = AdaptiveLadder(0.01, 16).next_tau(state, pool)
    assert tau == pytest.approx(4 / pool.objective.max().item()) or 0 < tau < 4 / pool.objective.max().item()
    later = LadderState(state.log_z, state.log_z_error, state.prompt_tau, (10.0,), None, math.inf, math.inf)
    pool.log_model = pool.log_target(10.0)
    assert AdaptiveLadder(0.01, 16).next_tau(later, pool) > 10.0


def test_at_the_target_the_ladder_is_not_stuck():
    state = replace(LadderState.start(1, 2.0), taus=(1.0, *[2.0] * 20))
    assert AdaptiveLadder(0.5, 8).stop_reason(state) is None
