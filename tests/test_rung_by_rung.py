"""What each rung has of its own: its random numbers, its step, its losses."""

import torch
from conftest import ALDRIFTTrainer, count_a, lora_config, pool_of, tiny_gpt2

from aldrift_hf.algorithm.ladders import Ladder, LadderState, LinearLadder
from aldrift_hf.algorithm.losses import MaximumLikelihood
from aldrift_hf.algorithm.rung import run_rung
from aldrift_hf.algorithm.samplers import MetropolisHastings
from aldrift_hf.trainer.state import RunState


class Draws:
    """A rollout of 64 random costs, drawn from the prior."""

    @staticmethod
    def propose(rung):
        return pool_of(torch.rand(1, 64, dtype=torch.float64), torch.zeros(1, 64, dtype=torch.float64))

    @staticmethod
    def redraw(*args):
        raise AssertionError


def test_each_rung_has_random_numbers_of_its_own():
    """By its index and the run's seed: reused ones would favour the same chains and the same order on every rung."""
    seen, orders = [], []

    class Watched(MetropolisHastings):
        def select(self, pool, tau_before, tau, size, generator):
            seen.append((generator.initial_seed(), tau_before, tau))
            return super().select(pool, tau_before, tau, size, generator)

    for seed in (7, 8):
        state = LadderState.start(1, 1.25)
        for _ in range(3):
            parts = Watched(4), LinearLadder(0.5), MaximumLikelihood()
            rung = run_rung(state, Draws(), *parts, rows=lambda _: 64, seed=seed)
            state = rung.state
            orders.append(tuple(rung.samples.order.tolist()))
    assert len({seed for seed, *_ in seen}) == len({*orders}) == 6
    assert [taus for _, *taus in seen] == 2 * [[0.0, 0.5], [0.5, 1.0], [1.0, 1.25]]


def test_no_ladder_leads_beyond_t():
    class Far(Ladder):
        def next_tau(self, state, pool):
            return 99.0

    state = LadderState.start(1, 1.25)
    rung = run_rung(state, Draws(), MetropolisHastings(4), Far(), MaximumLikelihood(), rows=lambda _: 8, seed=7)
    assert rung.state.taus == (1.25,)


def test_a_rung_begins_to_learn_with_nothing_learned():
    state = RunState.start(1, 1.5, None)
    state.loss_sum, state.updates, state.learning_rate, state.learn_seconds = 1.0, 2, 0.1, 3.0
    state.begin_learning(5)
    assert (state.loss_sum, state.updates, state.learning_rate, state.learn_seconds, state.planned) == (0, 0, 0, 0, 5)


def test_no_two_rungs_or_moves_are_drawn_by_the_same_random_numbers(config, tokenizer):
    model, seen = tiny_gpt2(), []
    trainer = ALDRIFTTrainer(
        model, count_a, config(sampler="suffix"), processing_class=tokenizer, peft_config=lora_config(model)
    )
    engine = trainer.rollout.engine
    generate = engine.generate
    engine.generate = lambda asked, address, rows, *limits: (
        seen.append((address, rows.start)) or generate(asked, address, rows, *limits)
    )
    trainer.run.start()
    with trainer.objective.open():
        for _ in range(2):
            trainer.run.begin_rung()
    assert len({address for address, _ in seen}) == 2 * 4, "on each rung whole texts and three moves"
    assert len({*seen}) == len(seen)
