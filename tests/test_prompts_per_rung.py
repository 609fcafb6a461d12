"""Rungs that draw for some of the prompts: which, what their draws weigh, and that nothing is lost on resuming."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import ALDRIFTTrainer, count_a, every_completion, log_probs, lora_config, tiny_gpt2
from test_archive import COST, DRAWN, PRIOR, Scorer, draws
from test_resume import assert_same, outcome

from aldrift_hf.algorithm import diagnostics
from aldrift_hf.algorithm.archive import Archive, mixture
from aldrift_hf.algorithm.ladders import LadderState
from aldrift_hf.algorithm.prompt_groups import group_of, num_groups
from aldrift_hf.models import snapshots

PROMPTS = ["", "a", "b", "a b", "c"]


@pytest.mark.parametrize(("prompts", "per_rung", "groups"), [(108, 16, 7), (10, 5, 2), (7, 100, 1), (5, 1, 5)])
def test_an_epoch_takes_every_prompt_once(prompts, per_rung, groups):
    assert num_groups(prompts, per_rung) == groups
    epochs = [
        [group_of(epoch * groups + place, prompts, per_rung, seed=3) for place in range(groups)] for epoch in range(4)
    ]
    for epoch in epochs:
        assert torch.cat(epoch).sort().values.tolist() == list(range(prompts))
        sizes = [len(group) for group in epoch]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= per_rung
        assert all((group[1:] > group[:-1]).all() for group in epoch), "in ascending order"
    as_sets = [{tuple(group.tolist()) for group in epoch} for epoch in epochs]
    assert all(one == other for one, other in pairwise(as_sets)), "groups stay together"


def test_the_order_is_new_in_every_epoch_and_with_every_seed():
    def order(epoch, seed=0):
        return [tuple(group_of(7 * epoch + place, 108, 16, seed).tolist()) for place in range(7)]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert set(order(0, seed=1)) != set(order(0))


def test_without_a_limit_all_prompts_are_drawn_for():
    assert num_groups(5, None) == 1
    assert group_of(3, 5, None, 0).tolist() == [0, 1, 2, 3, 4]


def for_prompts(model, prompts):
    """Exact draws of a model for these prompts."""
    drawn = draws(model, DRAWN[model], len(prompts))
    drawn.rows = torch.tensor(prompts).repeat_interleave(DRAWN[model])
    return drawn


def test_each_group_has_the_mixture_of_the_models_that_drew_for_it():
    """Three groups of which the archive keeps one rung, two, and none: weights of what is left are exact."""
    archive, score = Archive(window=4), Scorer()
    drawn_for = {0: [0, 3], 1: [1, 4], 2: [2]}
    for model, group in [(0, 0), (1, 2), (2, 1), (1, 0), (2, 0)]:
        score.present = model
        snapshot = {"number": torch.tensor(model)} if model else {}
        group = archive.extend(for_prompts(model, drawn_for[group]), snapshot, score)
    assert [entry.proposals.prompts.tolist() for entry in group] == [[0, 3]] * 3
    # The second rung has been forgotten. Models that drew for other prompts have not scored any of these draws.
    assert score.asked == [(1, 8), (1, 4), (2, 24)]
    pools = {tuple(mixture(group).prompts.tolist()): mixture(group) for group in archive.groups()}
    assert pools.keys() == {(0, 3), (1, 4)}
    target = PRIOR * torch.exp(-COST)
    whole, alone = pools[0, 3].log_weight(1.0), pools[1, 4].log_weight(1.0)
    assert diagnostics.log_z(whole).exp().tolist() == pytest.approx([target.sum().item()] * 2)
    # Of one model alone, whose events are the first and the last: what it does not draw is missing.
    assert diagnostics.log_z(alone).exp().tolist() == pytest.approx([(target[0] + target[3]).item()] * 2)


def test_forgetting_a_rung_leaves_the_others_of_its_group():
    """As if it had never been, in a group that is not the first."""
    kept, never = Archive(window=3), Archive(window=3)
    score = Scorer()
    for archive, rungs in [(kept, [(0, 0), (1, 1), (2, 1), (0, 1)]), (never, [(0, 0), (2, 1), (0, 1)])]:
        for model, prompt in rungs:
            score.present = model
            archive.extend(for_prompts(model, [prompt]), {"number": torch.tensor(model)}, score)
    for ours, theirs in zip(kept.entries, never.entries, strict=True):
        assert torch.equal(ours.log_q, theirs.log_q)


@pytest.fixture
def make(config, tokenizer):
    def make(**settings):
        model = tiny_gpt2()
        given = {"prompts_per_rung": 2, "sampler": "archive", "num_generations": 256, "num_rungs": 5, **settings}
        return ALDRIFTTrainer(
            model,
            count_a,
            config(**given),
            train_dataset=PROMPTS,
            processing_class=tokenizer,
            peft_config=lora_config(model),
        )

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "proposals"), [("archive", 2048), ("metropolis_hastings", 2048), ("suffix", 2048), ("span", 4 * 2048)]
)
def test_log_z_of_every_prompt_is_exact_at_its_last_rung(make, tokenizer, sampler, proposals):
    """Prompts were last drawn for at different inverse temperatures. Chains add up from the last one of the prompt."""
    trainer = make(sampler=sampler, num_generations=proposals, chain_length=4, updates_per_rung=2)
    trainer.train()
    taus, ladder = [rung["tau"] for rung in trainer.record.rungs], trainer.run.state.ladder
    last = [max(rung for rung in range(5) if prompt in group_of(rung, 5, 2, 42)) for prompt in range(5)]
    assert ladder.prompt_tau.tolist() == [taus[rung] for rung in last] == trainer.record.prompt_tau
    assert len(set(ladder.prompt_tau.tolist())) > 1, "the test shows nothing otherwise"
    prior, completions = tiny_gpt2(), every_completion()
    cost = torch.tensor(count_a([], tokenizer.batch_decode(completions.tokens(), skip_special_tokens=True)))
    for prompt, ids in enumerate(trainer.inputs.prompts.token_ids):
        exact = (log_probs(prior, ids, completions) - ladder.prompt_tau[prompt] * cost).logsumexp(0)
        assert abs(ladder.log_z[prompt] - exact) <= 5 * ladder.log_z_error[prompt] < 0.3
    assert all(rung["draws"] == 2048 for rung in trainer.record.rungs)
    assert len(trainer.record.metrics) > 0


@pytest.mark.slow
def test_densities_of_each_group_in_a_run(make):
    trainer = make(num_generations=64)
    trainer.train()
    # Groups 1 and 2 are first drawn for by a model that has learned: all that is known of log Z are these draws.
    unknown = [math.isnan(rung["missing_mass"]) for rung in trainer.record.rungs]
    assert unknown == [False, True, True, False, False]
    assert all(math.isfinite(rung["log_z_error"]) for rung in trainer.record.rungs)
    entries = trainer.sampler.archive.entries
    assert [entry.proposals.prompts.tolist() for entry in entries] == [
        group_of(rung, 5, 2, 42).tolist() for rung in range(5)
    ]
    seen = 0
    for group in trainer.sampler.archive.groups():
        for number, model_of in enumerate(group):
            for entry in group:
                with snapshots.loaded(trainer.model, model_of.snapshot):
                    drawn = entry.proposals
                    expected = trainer.rollout.score(trainer.inputs.prompts, drawn)
                if model_of.snapshot:
                    assert entry.log_q[number] == pytest.approx(expected, abs=1e-4)
                    seen += 1
    assert seen > 4
    learned = trainer.run.samples.samples.rows.bincount(minlength=5)
    assert (learned > 0).all(), "also from earlier draws for the other prompts"
    assert learned.max() <= 1.2 * learned.min(), "from each prompt as much"


@pytest.mark.slow
def test_replayed_draws_have_the_rungs_target_and_their_own_density(make):
    """`log p_τ` with log Z of their own pool, and the mixture that drew them."""
    trainer = make(num_generations=64)
    trainer.train()
    samples, tau = trainer.run.samples.samples, trainer.run.state.ladder.tau
    assert len(samples.rows) - len(samples.order) < 2 * len(PROMPTS), "nearly all are learned from, in one pass"
    pools = [mixture(group) for group in trainer.sampler.archive.groups()]
    checked = 0
    for sample, (row, tokens) in enumerate(zip(samples.rows.tolist(), samples.completions.tokens(), strict=True)):
        pool = next(pool for pool in pools if row in pool.prompts)
        place = pool.prompts.tolist().index(row)
        start = place * pool.objective.shape[1]
        drawn = pool.completions.select(torch.arange(start, start + pool.objective.shape[1])).tokens().index(tokens)
        log_weight = pool.log_weight(tau)[place]
        log_p = pool.log_target(tau)[place][drawn] - diagnostics.log_z(log_weight)
        log_r = torch.logaddexp(log_p, pool.log_model[place][drawn]) - math.log(2)
        assert samples.columns["log_target"][sample] == pytest.approx(log_p.item(), abs=1e-6)
        assert samples.columns["log_reference"][sample] == pytest.approx(log_r.item(), abs=1e-6)
        checked += row not in trainer.sampler.archive.entries[-1].proposals.prompts
    assert checked > 4


@pytest.mark.slow
def test_a_budget_counts_the_prompts_of_a_rung(make):
    """So many calls would not do for one draw for each of the prompts."""
    trainer = make(num_generations=1, updates_per_rung=1, max_objective_calls=4, num_rungs=2)
    trainer.train()
    assert trainer.objective_calls <= 4
    with pytest.raises(ValueError, match=r"for each of [23] prompts\. Raise it, or .*\(prompts_per_rung\)"):
        make(max_objective_calls=1, prompts_per_rung=3).train()


@pytest.mark.slow
def test_samples_from_the_archive_are_ordered_by_prompt(make):
    trainer = make(num_rungs=3)
    trainer.train()
    drawn = trainer.sample(2000, correction="archive")
    assert drawn["prompt"] == [prompt for prompt in PROMPTS for _ in range(2000)]
    for pool in map(mixture, trainer.sampler.archive.groups()):
        for position, prompt in enumerate(pool.prompts.tolist()):
            expected = pool.log_weight(1.5)[position].softmax(0) @ pool.objective[position]
            got = sum(drawn["objective"][2000 * prompt : 2000 * (prompt + 1)]) / 2000
            assert got == pytest.approx(expected.item(), abs=0.01)


@pytest.mark.slow
def test_prompts_without_draws_in_the_archive_are_an_error(make):
    trainer = make(num_rungs=2)
    trainer.train()
    with pytest.raises(ValueError, match=r"keeps none for [12] of 5 prompts: the last archive_window=16 rungs"):
        trainer.sample(4, correction="archive")


@pytest.mark.slow
def test_resumed_in_the_middle_of_an_epoch(make, tmp_path):
    save = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "archive_window": 3}
    save |= {"num_generations": 32}
    whole = make(output_dir=str(tmp_path / "whole"), **save)
    whole.train()
    for step in (3, 4, 6, 8, 17):
        resumed = make(output_dir=str(tmp_path / f"from-{step}"), **save)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(outcome(resumed), outcome(whole))
        assert resumed.record.prompt_tau == whole.record.prompt_tau


@pytest.mark.slow
def test_another_number_of_prompts_per_rung_is_another_run(make, tmp_path):
    make(save_strategy="epoch", num_rungs=1).train()
    with pytest.raises(ValueError, match=r"prompts_per_rung = 2, not 3"):
        make(prompts_per_rung=3).train(resume_from_checkpoint=True)


def test_the_last_rung_is_as_large_as_its_own_group_allows(config, tokenizer):
    model = tiny_gpt2()
    settings = config(num_generations=8, sampler="archive", prompts_per_rung=2, max_objective_calls=15)
    prompts, adapter = ["a", "b", "c"], lora_config(model)
    run = ALDRIFTTrainer(model, count_a, settings, prompts, processing_class=tokenizer, peft_config=adapter).run
    affordable = {}
    for rung in range(6):
        run.state.ladder = replace(LadderState.start(3, 1.5), taus=(0.5,) * rung)
        affordable[len(run.on_prompts.group(rung))] = run._affordable()
    assert affordable == {2: 7, 1: 8}
