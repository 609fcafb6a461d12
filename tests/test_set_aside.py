"""Checkpoints of another run in the output directory: kept, but neither resumed from nor counted as this run's."""

from pathlib import Path

import pytest
from conftest import ALDRIFTTrainer, count_a, lora_config, tiny_gpt2

from aldrift_hf.trainer.set_aside import FOLDER, set_aside

pytestmark = pytest.mark.slow


def trainer_of(config, tokenizer, **settings):
    model = tiny_gpt2()
    args = config(save_strategy="epoch", **settings)  # 3 rungs of 4 updates
    return ALDRIFTTrainer(model, count_a, args, processing_class=tokenizer, peft_config=lora_config(model))


def checkpoints(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).glob("checkpoint-*"))


def test_a_new_run_in_an_old_folder_keeps_its_own_checkpoints(config, tokenizer, caplog):
    """With a limit of 2, the first run leaves 8 and 12; by number, the second run's 4 would be the oldest."""
    first = trainer_of(config, tokenizer, save_total_limit=2)
    first.train()
    folder = Path(first.args.output_dir)
    assert checkpoints(folder) == ["checkpoint-12", "checkpoint-8"]
    assert not (folder / FOLDER).exists()
    second = trainer_of(config, tokenizer, save_total_limit=2, learning_rate=1e-3, max_steps=8)
    second.train()
    assert checkpoints(folder) == ["checkpoint-4", "checkpoint-8"]
    assert checkpoints(folder / FOLDER / "1") == ["checkpoint-12", "checkpoint-8"]
    assert f"(checkpoint-8, checkpoint-12). They are now in {folder / FOLDER / '1'}" in caplog.text
    again = trainer_of(config, tokenizer, learning_rate=1e-3, max_steps=8)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8
    assert again.record.log_z == second.record.log_z


def test_what_was_set_aside_can_be_resumed(config, tokenizer):
    first = trainer_of(config, tokenizer, save_total_limit=None)
    first.train()
    trainer_of(config, tokenizer, learning_rate=1e-3, max_steps=4).train()
    folder = Path(first.args.output_dir)
    assert checkpoints(folder) == ["checkpoint-4"]
    again = trainer_of(config, tokenizer, save_total_limit=None)
    again.train(resume_from_checkpoint=str(folder / FOLDER / "1" / "checkpoint-4"))
    assert again.record.rungs[-1]["log_z"] == first.record.rungs[-1]["log_z"]
    assert checkpoints(folder) == ["checkpoint-12", "checkpoint-8"]
    assert checkpoints(folder / FOLDER / "2") == ["checkpoint-4"]


def test_a_run_that_goes_back_keeps_what_it_goes_on_from(config, tokenizer):
    """Resumed from an earlier checkpoint, the later ones are of a run that has been left."""
    first = trainer_of(config, tokenizer, save_total_limit=None)
    first.train()
    again = trainer_of(config, tokenizer, save_total_limit=2)
    again.train(resume_from_checkpoint=str(Path(first.args.output_dir) / "checkpoint-4"))
    assert checkpoints(first.args.output_dir) == ["checkpoint-12", "checkpoint-8"]
    assert checkpoints(Path(first.args.output_dir) / FOLDER / "1") == ["checkpoint-12", "checkpoint-8"]


def test_a_trainer_that_begins_again_sets_its_own_checkpoints_aside(config, tokenizer):
    trainer = trainer_of(config, tokenizer, save_total_limit=None, num_rungs=1)
    trainer.train()
    trainer.train()
    folder = Path(trainer.args.output_dir)
    assert checkpoints(folder) == checkpoints(folder / FOLDER / "1") == ["checkpoint-4"]


def test_a_refused_resume_moves_nothing(config, tokenizer):
    first = trainer_of(config, tokenizer, save_total_limit=None, num_rungs=1)
    first.train()
    other = trainer_of(config, tokenizer, save_total_limit=None, num_rungs=1, seed=5)
    with pytest.raises(ValueError, match="seed"):
        other.train(resume_from_checkpoint=True)
    assert checkpoints(first.args.output_dir) == ["checkpoint-4"]


def test_the_next_free_number_is_taken(tmp_path, caplog):
    set_aside(str(tmp_path), None)
    assert not [*tmp_path.iterdir()]
    for number in ("1", "2"):
        (tmp_path / "checkpoint-5").mkdir()
        (tmp_path / "checkpoint-5" / "file").write_text(number)
        set_aside(str(tmp_path), str(tmp_path / "elsewhere" / "checkpoint-5"))
        assert (tmp_path / FOLDER / number / "checkpoint-5" / "file").read_text() == number
    (tmp_path / "checkpoint-5").mkdir()
    set_aside(str(tmp_path), str(tmp_path / "checkpoint-5" / ".." / "checkpoint-5"))
    assert checkpoints(tmp_path) == ["checkpoint-5"]
