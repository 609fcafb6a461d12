"""A run that is killed among its draws goes on with them, also where it would not draw the same again."""

from pathlib import Path

import pytest
import torch
from conftest import EOS, MAX_LENGTH, ALDRIFTTrainer, count_a, lora_config, tiny_gpt2

from aldrift_hf import TransformersEngine
from aldrift_hf.models.engines import EngineSettings
from aldrift_hf.trainer.draw_journal import DrawJournal
from aldrift_hf.types import Beginnings, Completions

pytestmark = pytest.mark.slow

DRAWS, BATCH = 48, 8


class Unrepeatable(TransformersEngine):
    """Draws other texts each time that it is made, as half precision does in other batches.

    Args:
        start: what makes them others.
        stop_at: the call that is interrupted.
    """

    def __init__(self, start, stop_at=None):
        super().__init__(EngineSettings(MAX_LENGTH, (EOS,), EOS))
        self.start, self.stop_at, self.rows, self.drawn = start, stop_at, [], []

    def generate(self, prompts, address, rows, limits=None):
        if len(self.rows) == self.stop_at:
            raise KeyboardInterrupt
        self.rows.append((tuple(address[1:]), rows))
        draws = super().generate(prompts, (*address, self.start), rows, limits)
        self.drawn += draws.completions.tokens()
        return draws


@pytest.fixture
def start(config, tokenizer):
    """Begins or resumes a run in one folder; returns its trainer after it has ended or was interrupted."""

    def started(number, stop_at=None, resume=None, seed=0, **changes):
        engine = Unrepeatable(number, stop_at)
        settings = {"num_rungs": 2, "sampler": "archive", "updates_per_rung": 4, "chain_length": 1}
        settings |= {"num_generations": DRAWS, "per_device_generation_batch_size": BATCH, "save_strategy": "epoch"}
        model = tiny_gpt2(seed)
        args = config(**settings | changes)
        trainer = ALDRIFTTrainer(
            model, count_a, args, processing_class=tokenizer, peft_config=lora_config(model), engine=engine
        )
        if stop_at is None:
            trainer.train(resume_from_checkpoint=resume)
        else:
            with pytest.raises(KeyboardInterrupt):
                trainer.train(resume_from_checkpoint=resume)
        return trainer

    return started


def journal(trainer) -> Path:
    return Path(trainer.args.output_dir) / "_draws"


@pytest.mark.parametrize(("rung", "resume", "save"), [(0, None, "epoch"), (1, True, "epoch"), (1, None, "no")])
def test_what_was_drawn_is_not_drawn_again(start, rung, resume, save):
    """With a checkpoint, and without one: then all rungs' draws are there, and the model learns from them again."""
    before = rung * DRAWS // BATCH
    first = start(1, stop_at=before + 3, save_strategy=save)
    kept = first.rollout.engine.drawn[before * BATCH :]
    rungs = {path.name.split("-")[1] for path in journal(first).iterdir()}
    assert rungs == ({"1"} if resume else {"0", "1"} if rung else {"0"})
    second = start(2, resume=resume, save_strategy=save)
    rows = [rows for address, rows in second.rollout.engine.rows if address[0] == 0 and address[1] <= rung]
    assert rows == [range(start, start + BATCH) for start in range(3 * BATCH, DRAWS, BATCH)]
    assert len(kept) == 3 * BATCH
    of_the_rung = kept + second.rollout.engine.drawn[: DRAWS - len(kept)]
    costs = count_a([], second.rollout.decode(Completions.of(of_the_rung, EOS)))
    assert second.record.rungs[rung]["objective_mean"] == pytest.approx(sum(costs) / DRAWS)
    assert not journal(second).exists(), "nothing is left when the run has ended"


def test_no_folder_disappears_while_the_run_lasts(start, monkeypatch):
    """A push in the background, which walks through the run's folder, would stop at one that it had just seen."""
    forget, seen = DrawJournal.forget, []

    def forgotten(self, rung):
        before = list(self._root.rglob("*"))
        forget(self, rung)
        seen.append((len(before), len(list(self._root.rglob("*"))), [path for path in before if path.is_dir()]))

    monkeypatch.setattr(DrawJournal, "forget", forgotten)
    start(1)
    assert seen == [(DRAWS // BATCH, 0, [])] * 2


def test_draws_of_another_prior_or_length_are_not_taken(start):
    for changes in ({"seed": 1}, {"max_completion_length": 2}):
        start(1, stop_at=3)
        other = start(2, stop_at=6, **changes)
        assert [rows.start for _, rows in other.rollout.engine.rows] == list(range(0, DRAWS, BATCH)), changes


def test_draws_of_other_weights_are_not_taken(start):
    """A run that learns otherwise from the same draws comes to its second rung with another model."""
    start(1, stop_at=DRAWS // BATCH + 3, save_strategy="no")
    other = start(2, stop_at=3, save_strategy="no", learning_rate=1e-3)
    assert [(address, rows.start) for address, rows in other.rollout.engine.rows] == [
        ((0, 1), 0), ((0, 1), BATCH), ((0, 1), 2 * BATCH),
    ]  # fmt: skip


def test_a_damaged_round_ends_what_is_kept(start):
    first = start(1, stop_at=3)
    (path,) = journal(first).glob("*-1.safetensors")
    path.write_bytes(path.read_bytes()[:20])
    second = start(2)
    assert second.rollout.engine.rows[0] == ((0, 0), range(BATCH, 2 * BATCH))


def test_a_run_that_is_killed_as_it_learns_keeps_the_rungs_draws(start, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ALDRIFTTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            start(1)
    second = start(2)
    assert [rows for address, rows in second.rollout.engine.rows if address == (0, 0)] == []
    assert torch.tensor([rung["draws"] for rung in second.record.rungs]).tolist() == [DRAWS, DRAWS]


def test_the_last_measurement_is_kept_as_well(start):
    blocks = DRAWS // BATCH
    start(1, stop_at=2 * blocks + 2)
    second = start(2, resume=True)
    measured = [rows.start for address, rows in second.rollout.engine.rows if address[0] == 3]
    assert measured == list(range(2 * BATCH, DRAWS, BATCH))


def test_moves_of_chains_are_kept(start):
    """Their beginnings are a part of what they depend on."""
    settings = {"sampler": "suffix", "chain_length": 3, "num_generations": 24, "num_rungs": 1}
    whole = start(1, **settings)
    moves = [number for number, (address, _) in enumerate(whole.rollout.engine.rows) if len(address) == 3]
    cut = start(1, stop_at=moves[-1], **settings)
    again = start(1, **settings)
    made = len(cut.rollout.engine.rows)
    assert again.rollout.engine.rows == whole.rollout.engine.rows[made:]
    assert again.record.rungs[0]["objective_mean"] == whole.record.rungs[0]["objective_mean"]


@pytest.fixture
def drawing(config, tokenizer):
    """Draws kept in a journal: how many calls of the engine they took."""

    def draw(per_prompt=8, prompts=("a b", "c"), **settings):
        model = tiny_gpt2()
        trainer = ALDRIFTTrainer(model, count_a, config(**settings), train_dataset=[*prompts],
                                 processing_class=tokenizer)  # fmt: skip
        calls, generate = [], trainer.rollout.engine.generate
        trainer.rollout.engine.generate = lambda *args: calls.append(1) or generate(*args)
        with trainer.objective.open():
            trainer.rollout.propose(trainer.inputs.prompts, per_prompt, (0, 0), keep=True)
        return len(calls)

    return draw


@pytest.mark.parametrize(
    "other", [{"seed": 7}, {"prompts": ("a c", "b")}, {"per_prompt": 4}, {"max_completion_length": 2}]
)
def test_draws_of_another_law_are_not_taken_from_the_journal(drawing, other):
    assert drawing() > 0
    assert drawing() == 0
    assert drawing(**other) > 0


def test_draws_after_other_beginnings_are_not_taken_from_the_journal(config, tokenizer):
    model = tiny_gpt2()
    trainer = ALDRIFTTrainer(
        model, count_a, config(sampler="suffix"), processing_class=tokenizer, peft_config=lora_config(model)
    )
    calls, generate = [], trainer.rollout.engine.generate
    trainer.rollout.engine.generate = lambda *args: calls.append(1) or generate(*args)
    for token, made in ((2, 1), (2, 1), (3, 2)):
        begun = Beginnings([[token]] * 4, [[-1.0]] * 4)
        with trainer.objective.open():
            drawn = trainer.rollout.propose(trainer.inputs.prompts, 4, (0, 0, 1), begun, keep=True)
        assert drawn.completions.ids[:, 0].tolist() == [token] * 4
        assert len(calls) == made
