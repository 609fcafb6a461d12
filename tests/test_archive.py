"""The archive: its weights are exact, nothing known is computed again, and the models of the past are the past's."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ALDRIFTTrainer, count_a, every_completion, log_probs, lora, lora_config, pool_of, tiny_gpt2

from aldrift_hf.algorithm import diagnostics
from aldrift_hf.algorithm.archive import Archive, mixture
from aldrift_hf.algorithm.samplers import ArchiveSampler
from aldrift_hf.algorithm.samplers.kernels import systematic_resample
from aldrift_hf.models import snapshots
from aldrift_hf.models.prior import base_model
from aldrift_hf.types import Completions, Proposals, join_rungs

# Four events; a prior and two models whose probabilities are whole numbers of draws.
PRIOR = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
MODELS = [
    PRIOR,
    torch.tensor([0.0, 0.5, 0.25, 0.25], dtype=torch.float64),
    torch.tensor([0.25, 0.0, 0.0, 0.75]).double(),
]
DRAWN = [8, 16, 4]
COST = torch.tensor([3.0, 1.0, 0.0, 2.0], dtype=torch.float64)


def draws(model, count, prompts=1):
    """Exactly `count · q(event)` draws of each event, for every prompt: a sample without sampling noise."""
    events = torch.arange(4).repeat_interleave((MODELS[model] * count).round().long())
    assert len(events) == count
    rows = torch.arange(prompts).repeat_interleave(count)
    events = events.repeat(prompts)
    completions = Completions(events[:, None], torch.ones(len(events), dtype=torch.long))
    shape = (prompts, count)
    return Proposals(
        rows,
        completions,
        COST[events].view(shape),
        PRIOR.log()[events].view(shape),
        MODELS[model].log()[events].view(shape),
        [str(event) for event in events.tolist()],
    )


class Scorer:
    """Scores under a model that is known by its number; counts what it is asked."""

    def __init__(self):
        self.present, self.asked = 0, []

    def __call__(self, snapshot, proposals):
        model = self.present if snapshot is None else int(snapshot["number"])
        self.asked.append((model, proposals.objective.shape[1]))
        return MODELS[model].log()[proposals.completions.ids[:, 0]].view_as(proposals.objective)


def filled(models=(0, 1, 2), window=16, prompts=1):
    archive, score = Archive(window), Scorer()
    for model in models:
        score.present = model
        snapshot = {"number": torch.tensor(model)} if model else {}
        archive.extend(draws(model, DRAWN[model], prompts), snapshot, score)
    return archive, score


@pytest.mark.parametrize("tau", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("prompts", [1, 3])
def test_mixture_weights_give_the_target_exactly(tau, prompts):
    """With exactly α_k·N·q_k(s) copies of each draw, the weighted frequencies are p_τ, and the mean weight is Z_τ."""
    pool = mixture(filled(prompts=prompts)[0].entries)
    log_weight = pool.log_weight(tau)
    assert log_weight.shape == (prompts, sum(DRAWN))
    target = PRIOR * torch.exp(-tau * COST)
    for prompt in range(prompts):
        events = pool.completions.ids[pool.rows == prompt, 0]
        frequencies = torch.zeros(4).double().index_add_(0, events, log_weight[prompt].softmax(0))
        assert frequencies == pytest.approx(target / target.sum(), abs=1e-12)
    assert diagnostics.log_z(log_weight).exp().tolist() == pytest.approx([target.sum().item()] * prompts)


LAWS = [
    PRIOR,
    torch.tensor([0.0, 0.25, 0.5, 0.25], dtype=torch.float64),
    torch.tensor([0.5, 0.0, 0.0, 0.5]).double(),
]
"""What an engine with its own rounding draws from in place of each model."""


def test_draws_of_other_laws_than_the_scorers_give_the_target_exactly():
    """Each engine's `log q` is known for its own draws alone; the prior's rung scores nothing for it."""
    archive, score = Archive(16), Scorer()
    for model, law in enumerate(LAWS):
        score.present = model
        events = torch.arange(4).repeat_interleave((law * DRAWN[model]).round().long())
        drawn = replace(
            draws(model, DRAWN[model]),
            completions=Completions(events[:, None], torch.ones(len(events), dtype=torch.long)),
            objective=COST[events][None],
            log_prior=PRIOR.log()[events][None],
            log_model=law.log()[events][None],
            as_scored=False,
        )
        archive.extend(drawn, {"number": torch.tensor(model)} if model else {}, score)
    assert score.asked == [(1, 8), (1, 16), (1, 4), (2, 24), (2, 4)]
    pool, target = mixture(archive.entries), PRIOR * torch.exp(-COST)
    log_weight = pool.log_weight(1.0)[0]
    frequencies = torch.zeros(4).double().index_add_(0, pool.completions.ids[:, 0], log_weight.softmax(0))
    assert frequencies == pytest.approx(target / target.sum(), abs=1e-12)
    assert diagnostics.log_z(log_weight).exp().item() == pytest.approx(target.sum().item())
    kept = Archive(16)
    kept.load_state_dict(archive.state_dict())
    assert torch.equal(mixture(kept.entries).log_model, pool.log_model)


def test_weights_are_bounded_by_the_priors_share():
    """`w ≤ exp(-τd) / α_0`, also for an event that the later models hardly draw."""
    pool = mixture(filled()[0].entries)
    assert (pool.log_weight(0.0).exp() <= sum(DRAWN) / DRAWN[0] + 1e-9).all()


def test_resampled_draws_follow_the_target():
    """Systematic resampling keeps each event's number within one of its share, whatever the number of its copies."""
    pool = mixture(filled()[0].entries)
    index = systematic_resample(pool.log_weight(1.0), 1000, torch.Generator().manual_seed(0))
    events = pool.completions.ids[index[0], 0]
    target = PRIOR * torch.exp(-COST)
    assert (events.bincount(minlength=4) / 1000) == pytest.approx(target / target.sum(), abs=0.02)


def test_what_is_known_is_not_computed_again():
    """Rung 2: its model scores the draws of rungs 0 and 1, rung 1's model the new ones; the prior's are known."""
    score = filled()[1]
    assert score.asked == [(1, 8), (1, 4), (2, 8 + 16)]


def test_beyond_the_window_the_oldest_rung_but_the_first_is_forgotten():
    """Its draws and its model together: what is left is as if it had never been."""
    kept, never = filled(window=2)[0], filled(models=(0, 2))[0]
    for ours, theirs in zip(kept.entries, never.entries, strict=True):
        assert torch.equal(ours.log_q, theirs.log_q)
    assert torch.equal(mixture(kept.entries).log_model, mixture(never.entries).log_model)
    assert [entry.snapshot.get("number", torch.tensor(0)).item() for entry in kept.entries] == [0, 2]
    target = PRIOR * torch.exp(-COST)
    assert diagnostics.log_z(mixture(kept.entries).log_weight(1.0)).exp().item() == pytest.approx(target.sum().item())


def test_rungs_are_joined_by_prompt():
    parts = [draws(0, 8, prompts=2), draws(2, 4, prompts=2)]
    # Numbers of their own tell the draws apart: 0, 1, … on the first rung, 100, 101, … on the second.
    parts = [
        replace(part, completions=Completions(100 * number + torch.arange(len(part))[:, None], part.completions.length))
        for number, part in enumerate(parts)
    ]
    joined = join_rungs(parts)
    assert joined.rows.tolist() == [0] * 12 + [1] * 12
    assert joined.completions.ids[:12, 0].tolist() == [*range(8), *range(100, 104)]
    assert joined.completions.ids[12:, 0].tolist() == [*range(8, 16), *range(104, 108)]
    assert joined.texts is None, "texts are decoded again where they are wanted"
    assert joined.completions.ids[:, 0].tolist() == [
        int(event) for prompt in range(2) for part in parts for event in part.completions.ids.view(2, -1)[prompt]
    ]
    assert torch.equal(joined.objective[1], torch.cat([parts[0].objective[1], parts[1].objective[1]]))
    assert joined.completions.length.tolist() == [1] * 24


def test_to_tensors_and_back():
    archive = filled(prompts=2)[0]
    again = Archive(16)
    again.load_state_dict(archive.state_dict())
    ours, theirs = mixture(again.entries), mixture(archive.entries)
    assert torch.equal(ours.log_model, theirs.log_model)
    assert torch.equal(ours.completions.ids, theirs.completions.ids)
    assert torch.equal(ours.rows, theirs.rows)
    for one, other in zip(again.entries, archive.entries, strict=True):
        assert one.snapshot == other.snapshot
        assert torch.equal(one.proposals.log_model, other.proposals.log_model)


def test_snapshots_are_of_the_trained_parameters_and_leave_no_trace():
    model = lora(tiny_gpt2(), seed=1)
    snapshot = snapshots.take(model)
    assert all("lora" in name for name in snapshot)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    past = log_probs(model.get_base_model(), [0], every_completion())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    now = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def look_and_fail():
        with snapshots.loaded(model, snapshot):
            assert torch.equal(log_probs(model.get_base_model(), [0], every_completion()), past)
            raise KeyError

    with pytest.raises(KeyError):
        look_and_fail()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, now[name])
        assert name in before


@pytest.mark.slow
@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_a_run_with_the_archive(peft, config, tokenizer):
    """Every column is the log-probability under the model that drew that rung; log Z is that of the target."""
    model = tiny_gpt2()
    prior = tiny_gpt2()
    settings = config(sampler="archive", num_generations=512, tau_max=1.5, tau_step=0.5)
    trainer = ALDRIFTTrainer(
        model,
        count_a,
        settings,
        train_dataset=["", "a b"],
        processing_class=tokenizer,
        peft_config=lora_config(model) if peft else None,
    )
    trainer.train()
    entries = trainer.sampler.archive.entries
    assert len(entries) == 3
    assert entries[0].snapshot == {}, "the first rung's model is the prior"
    for number, model_of in enumerate(entries):
        for entry in entries:
            rung = entry.proposals
            for prompt, ids in enumerate(trainer.inputs.prompts.token_ids):
                drawn = rung.completions.select(torch.arange(len(rung.rows))[rung.rows == prompt])
                with snapshots.loaded(trainer.model, model_of.snapshot):
                    expected = log_probs(prior if number == 0 else base_model(trainer.model), ids, drawn)
                assert entry.log_q[number][prompt] == pytest.approx(expected, abs=1e-4)
    completions = every_completion()
    cost = torch.tensor(count_a([], tokenizer.batch_decode(completions.tokens(), skip_special_tokens=True)))
    exact = [
        (log_probs(prior, ids, completions) - 1.5 * cost).logsumexp(0).item()
        for ids in trainer.inputs.prompts.token_ids
    ]
    log_weight = mixture(entries).log_weight(1.5)
    error = (1 / diagnostics.effective_sample_size(log_weight) - 1).sqrt() / log_weight.shape[1] ** 0.5
    assert ((torch.tensor(trainer.record.log_z) - torch.tensor(exact)).abs() <= 5 * error).all()
    record = trainer.record.rungs[-1]
    assert record["archive_draws"] == 3 * 128 * 4
    assert 0 < record["archive_ess"] <= 1
    assert record["log_z"] == pytest.approx(sum(trainer.record.log_z) / 2)


@pytest.mark.slow
def test_an_adapter_that_does_not_begin_as_the_prior_is_not_taken_for_it(config, tokenizer):
    """`init_lora_weights=False`: the first rung's model is known, so that its draws get the right weights."""
    model = tiny_gpt2()
    adapter = lora_config(model)
    adapter.init_lora_weights = False
    settings = config(sampler="archive", num_generations=512, tau_max=1.5, tau_step=1.5)
    trainer = ALDRIFTTrainer(model, count_a, settings, processing_class=tokenizer, peft_config=adapter)
    prior, ids = tiny_gpt2(), trainer.inputs.prompts.token_ids[0]
    first = log_probs(base_model(trainer.model), ids, every_completion())
    assert (first - log_probs(prior, ids, every_completion())).abs().max() > 0.1
    trainer.train()
    entries = trainer.sampler.archive.entries
    assert entries[0].snapshot, "a model of its own"
    place = {tuple(tokens): row for row, tokens in enumerate(every_completion().tokens())}
    drawn = [place[tuple(tokens)] for tokens in entries[0].proposals.completions.tokens()]
    assert mixture(entries).log_model[0] == pytest.approx(first[drawn], abs=1e-4)


@pytest.mark.slow
def test_models_that_are_too_large_for_memory_are_mapped_from_disk(config, tokenizer, monkeypatch, tmp_path):
    """The run is the same bit for bit; the files are unlinked, and their pages are in the operating system's hands."""
    runs = []
    for share in (1.0, 0.0):
        monkeypatch.setattr(snapshots, "MEMORY_SHARE", share)
        settings = config(sampler="archive", output_dir=str(tmp_path / str(share)))
        trainer = ALDRIFTTrainer(tiny_gpt2(), count_a, settings, processing_class=tokenizer)
        trainer.train()
        runs.append(trainer)
    for name, tensor in runs[0].model.state_dict().items():
        assert torch.equal(runs[1].model.state_dict()[name], tensor)
    maps = Path("/proc/self/maps").read_text()
    assert len({line.split()[5] for line in maps.splitlines() if str(tmp_path / "0.0" / "_snapshots") in line}) == 2
    assert str(tmp_path / "1.0" / "_snapshots") not in maps
    assert not os.listdir(tmp_path / "0.0" / "_snapshots")


@pytest.mark.slow
def test_samples_from_the_archive(config, tokenizer):
    """Resampled from the run's own proposals by their weights for T: no draw is made, no objective is called."""
    model = tiny_gpt2()
    settings = config(sampler="archive", num_generations=512)
    trainer = ALDRIFTTrainer(
        model, count_a, settings, train_dataset=["", "a b"], processing_class=tokenizer, peft_config=lora_config(model)
    )
    with pytest.raises(ValueError, match=r"train with a sampler that keeps them \(sampler='archive'\) first"):
        trainer.sample(10, correction="archive")
    trainer.train()
    calls = trainer.objective.calls
    drawn = trainer.sample(20_000, correction="archive")
    assert trainer.objective.calls == calls
    with pytest.raises(ValueError, match="leave prompts out"):
        trainer.sample(10, prompts=["b"], correction="archive")
    with pytest.raises(ValueError, match="correction must be"):
        trainer.sample(10, correction="gibbs")
    pool = mixture(trainer.sampler.archive.entries)
    assert drawn["prompt"] == [""] * 20_000 + ["a b"] * 20_000
    for prompt in range(2):
        expected = pool.log_weight(1.5)[prompt].softmax(0) @ pool.objective[prompt]
        got = sum(drawn["objective"][20_000 * prompt : 20_000 * (prompt + 1)]) / 20_000
        assert got == pytest.approx(expected.item(), abs=0.005)


@pytest.mark.slow
def test_smoothed_weights_are_the_ones_drawn_by(config, tokenizer, monkeypatch):
    model = tiny_gpt2()
    settings = config(sampler="archive", num_generations=512, pareto_smoothing=True)
    trainer = ALDRIFTTrainer(model, count_a, settings, processing_class=tokenizer, peft_config=lora_config(model))
    # All weight on the first proposal: no tie of these tiny weights keeps the real smoothing from showing.
    only = lambda log_weight: torch.where(torch.arange(log_weight.shape[-1]) == 0, 0.0, -torch.inf)[None]  # noqa: E731
    monkeypatch.setattr(diagnostics, "pareto_smoothed", only)
    trainer.train()
    assert len(set(trainer.sample(50, correction="archive")["completion"])) == 1


@pytest.mark.slow
def test_a_second_training_starts_a_new_archive(config, tokenizer):
    """Its first model is not the prior any more, and is not taken for it."""
    model = tiny_gpt2()
    trainer = ALDRIFTTrainer(
        model, count_a, config(sampler="archive"), processing_class=tokenizer, peft_config=lora_config(model)
    )
    trainer.train()
    trainer.train()
    assert len(trainer.sampler.archive.entries) == 3
    assert trainer.sampler.archive.entries[0].snapshot, "a fine-tuned model, kept as such"


def test_smoothing_is_for_the_archive(config):
    with pytest.raises(ValueError, match=r"pareto_smoothing smooths the weights .* does not draw by weight"):
        config(pareto_smoothing=True)


def test_a_window_that_is_too_small_is_refused(config):
    with pytest.raises(ValueError, match="archive_window must be between 2 and"):
        config(sampler="archive", archive_window=1)


def test_a_rungs_own_prompts_are_not_replayed():
    class Prior:
        snapshot = staticmethod(dict)
        log_prob = staticmethod(lambda snapshot, proposals: proposals.log_prior)

    sampler = ArchiveSampler()
    for prompt, replayed in ((0, []), (1, [[0]]), (2, [[0], [1]]), (0, [[1], [2]])):
        one = pool_of(torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64))
        sampler.pool(replace(one, rows=torch.full((4,), prompt)), Prior())
        assert [other.prompts.tolist() for other in sampler.replay()] == replayed
