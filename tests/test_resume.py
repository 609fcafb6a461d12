"""A run that is interrupted anywhere and resumed gives the numbers of a run left alone, bit for bit."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import ALDRIFTTrainer, count_a, lora, lora_config, tiny_gpt2

from aldrift_hf import streams
from aldrift_hf.trainer import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.versions]

# Dropout, so that the Trainer's random state matters; 4 updates a rung and 3 rungs make 12 updates.
KINDS = {
    "adapter-off": lambda: (tiny_gpt2(dropout=0.1), lora_config(tiny_gpt2(), dropout=0.1)),
    "peft-model": lambda: (lora(tiny_gpt2(dropout=0.1), dropout=0.1, seed=3), None),
    "full": lambda: (tiny_gpt2(dropout=0.1), None),
}


def trainer_of(kind, settings, tokenizer):
    model, peft_config = KINDS[kind]()
    return ALDRIFTTrainer(
        model, count_a, settings, train_dataset=["", "a b"], processing_class=tokenizer, peft_config=peft_config
    )


def outcome(trainer):
    """Everything that must not differ: parameters, records without their seconds, log, counters."""
    records = [
        {key: value for key, value in record.items() if not key.startswith("seconds")}
        for record in map(json.loads, Path(trainer.args.output_dir, "rungs.jsonl").read_text().splitlines())
    ]
    logs = [
        {key: value for key, value in log.items() if not key.startswith("seconds")}
        for log in trainer.state.log_history
        if "rung" in log
    ]
    state = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    reached, asked = trainer.run.state, trainer.objective.state_dict()["asked"].tolist()
    return state, (records, logs, trainer.record.log_z, reached.ladder.taus, reached.proposals, asked)


def assert_same(resumed, alone):
    assert resumed[1] == alone[1]
    assert resumed[0].keys() == alone[0].keys()
    for name, tensor in alone[0].items():
        assert torch.equal(resumed[0][name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_from_any_checkpoint_the_run_is_the_same(kind, config, tokenizer, tmp_path):
    """Checkpoints in mid-rung (1, 3, 6, 11) and of a rung's last update (4, 8, 12), in the first rung and later."""
    save = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    whole = trainer_of(kind, config(output_dir=str(tmp_path / "whole"), **save), tokenizer)
    whole.train()
    alone = outcome(whole)
    for step in (1, 3, 4, 6, 8, 11, 12):
        resumed = trainer_of(kind, config(output_dir=str(tmp_path / f"from-{step}"), **save), tokenizer)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(outcome(resumed), alone)


def test_resumed_from_an_epochs_checkpoint(config, tokenizer, tmp_path):
    save = {"save_strategy": "epoch", "save_total_limit": None, "lr_scheduler_type": "linear"}
    whole = trainer_of("adapter-off", config(output_dir=str(tmp_path / "whole"), **save), tokenizer)
    whole.train()
    resumed = trainer_of("adapter-off", config(output_dir=str(tmp_path / "resumed"), **save), tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same(outcome(resumed), outcome(whole))


@pytest.mark.parametrize(("kind", "window"), [("adapter-off", 2), ("full", 2), ("adapter-off", 3)])
def test_resumed_with_the_archive(kind, window, config, tokenizer, tmp_path):
    """In mid-rung, and from a rung's last update, with whose model the next one draws. A window of 2 has forgotten it
    by the last rung; one of 3 asks for the density of that rung's draws under it."""
    save = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    save |= {"sampler": "archive", "archive_window": window}
    whole = trainer_of(kind, config(output_dir=str(tmp_path / "whole"), **save), tokenizer)
    whole.train()
    for step in (3, 4, 6, 8, 11):
        resumed = trainer_of(kind, config(output_dir=str(tmp_path / f"from-{step}"), **save), tokenizer)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(outcome(resumed), outcome(whole))


@pytest.mark.parametrize("sampler", ["suffix", "span"])
def test_resumed_with_chains_within_texts(sampler, config, tokenizer, tmp_path):
    """In mid-rung, and from a rung's last update, after which further proposals are drawn."""
    save = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "sampler": sampler}
    whole = trainer_of("adapter-off", config(output_dir=str(tmp_path / "whole"), **save), tokenizer)
    whole.train()
    for step in (3, 4, 6, 8, 11):
        resumed = trainer_of("adapter-off", config(output_dir=str(tmp_path / f"from-{step}"), **save), tokenizer)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(outcome(resumed), outcome(whole))


def test_resumed_with_gradient_accumulation(config, tokenizer, tmp_path):
    save = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": None, "gradient_accumulation_steps": 2}
    whole = trainer_of("adapter-off", config(output_dir=str(tmp_path / "whole"), **save), tokenizer)
    whole.train()
    resumed = trainer_of("adapter-off", config(output_dir=str(tmp_path / "resumed"), **save), tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert_same(outcome(resumed), outcome(whole))


def test_a_budget_spent_before_the_interruption_stays_spent(config, tokenizer, tmp_path):
    save = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None, "max_objective_calls": 30}
    whole = trainer_of("adapter-off", config(output_dir=str(tmp_path / "whole"), **save), tokenizer)
    whole.train()
    assert whole.state.global_step == 4
    for step in (2, 4):
        resumed = trainer_of("adapter-off", config(output_dir=str(tmp_path / f"from-{step}"), **save), tokenizer)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.state.global_step == 4
        assert_same(outcome(resumed), outcome(whole))


def test_a_checkpoint_holds_everything(config, tokenizer, tmp_path):
    trainer = trainer_of("adapter-off", config(save_strategy="epoch"), tokenizer)
    trainer.train()
    folder = Path(trainer.args.output_dir, "checkpoint-12")
    assert {checkpoints.STATE_FILE, checkpoints.SAMPLES_FILE, checkpoints.OBJECTIVE_FILE} <= set(os.listdir(folder))


def test_a_checkpoint_of_another_run_is_refused(config, tokenizer, tmp_path):
    trainer = trainer_of("adapter-off", config(save_strategy="epoch"), tokenizer)
    trainer.train()
    folder = os.path.join(trainer.args.output_dir, "checkpoint-12")
    other = trainer_of("adapter-off", config(updates_per_rung=5), tokenizer)
    with pytest.raises(ValueError, match="written for 4 updates per rung on 4 training rows each; this run has 5 on 4"):
        other.train(resume_from_checkpoint=folder)
    os.remove(os.path.join(folder, checkpoints.MANIFEST_FILE))
    with pytest.raises(ValueError, match="it is not a complete checkpoint of ALDRIFTTrainer: it has no"):
        trainer.train(resume_from_checkpoint=folder)


def test_a_file_is_known_by_all_of_its_bytes(tmp_path):
    digests = set()
    for last in (b"a", b"b"):
        (tmp_path / "file").write_bytes(bytes(3 << 20) + last)
        digests.add(checkpoints._digest(tmp_path / "file"))
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tau_max": 2.0}, r"tau_max = 1\.5, not 2\.0"),
        ({"objective_range": 4.0}, r"objective_range = 3\.0, not 4\.0"),
        ({"sampler": "archive"}, "sampler = 'metropolis_hastings', not 'archive'"),
        ({"seed": 1, "num_generations": 32}, "num_generations = 64, not 32; .*seed = 42, not 1"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_with_the_difference(config, tokenizer, change, said):
    trainer_of("adapter-off", config(save_strategy="epoch"), tokenizer).train()
    with pytest.raises(ValueError, match=f"was written with other settings than this run's: .*{said}"):
        trainer_of("adapter-off", config(**change), tokenizer).train(resume_from_checkpoint=True)


def test_what_is_a_success_may_change_unless_it_decides_the_target(config, tokenizer, tmp_path):
    settings = {"save_strategy": "epoch", "sampler": "archive", "chain_length": 1, "tau_max": None, "tau_step": None}
    first = trainer_of("adapter-off", config(**settings, target_success=0.6, success_threshold=0.5), tokenizer)
    first.train()
    other = trainer_of("adapter-off", config(**settings, target_success=0.6), tokenizer)
    with pytest.raises(ValueError, match=r"success_threshold = 0\.5, not 0\.0"):
        other.train(resume_from_checkpoint=True)
    trainer_of("adapter-off", config(save_strategy="epoch", output_dir=str(tmp_path)), tokenizer).train()
    again = trainer_of("adapter-off", config(output_dir=str(tmp_path), success_threshold=1.0), tokenizer)
    again.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_vocabulary_is_refused(config, tokenizer):
    trainer_of("adapter-off", config(save_strategy="epoch"), tokenizer).train()
    tokenizer.add_tokens(["z"])
    with pytest.raises(ValueError, match="vocabulary = "):
        trainer_of("adapter-off", config(), tokenizer).train(resume_from_checkpoint=True)


def test_what_may_change_may_change(config, tokenizer):
    trainer_of("adapter-off", config(save_strategy="epoch", num_rungs=2), tokenizer).train()
    longer = trainer_of("adapter-off", config(learning_rate=1e-3, per_device_generation_batch_size=16), tokenizer)
    longer.train(resume_from_checkpoint=True)
    assert longer.run.state.rung == 2


def test_a_damaged_checkpoint_is_refused_and_a_good_one_offered(config, tokenizer):
    trainer = trainer_of("adapter-off", config(save_strategy="epoch"), tokenizer)
    trainer.train()
    newest, good = (Path(trainer.args.output_dir, f"checkpoint-{step}") for step in (12, 8))
    files = [path for path in newest.iterdir() if path.name != checkpoints.MANIFEST_FILE]
    assert len(files) > 8
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(
            ValueError, match=rf"checkpoint-12 .*{path.name} has changed since.*newest undamaged one is .*checkpoint-8"
        ):
            trainer.train(resume_from_checkpoint=True)
        path.write_bytes(whole)
    assert checkpoints.damage(str(newest)) is None
    os.remove(newest / "optimizer.pt")
    assert checkpoints.damage(str(newest)) == "optimizer.pt is missing"
    (good / checkpoints.MANIFEST_FILE).write_text("{")
    with pytest.raises(ValueError, match="There is no undamaged one; start again"):
        trainer.train(resume_from_checkpoint=str(newest))


def test_a_checkpoint_without_the_optimizer_is_refused(config, tokenizer):
    trainer = trainer_of("adapter-off", config(save_strategy="epoch", save_only_model=True), tokenizer)
    trainer.train()
    with pytest.raises(
        ValueError, match="checkpoint-12 cannot be resumed from: it was saved with save_only_model=True"
    ):
        trainer.train(resume_from_checkpoint=True)


def test_the_folder_may_be_a_path_and_nothing_else(config, tokenizer):
    trainer = trainer_of("adapter-off", config(save_strategy="epoch"), tokenizer)
    trainer.train()
    earlier = Path(trainer.args.output_dir, "checkpoint-8")
    assert checkpoints.to_resume_from(earlier, str(trainer.args.output_dir)) == str(earlier)
    with pytest.raises(TypeError, match="must be a checkpoint's folder, True or False, got 8"):
        trainer.train(resume_from_checkpoint=8)


def test_a_checkpoint_has_its_name_only_when_it_is_whole(config, tokenizer, monkeypatch):
    trainer = trainer_of("adapter-off", config(save_strategy="steps", save_steps=4), tokenizer)
    seen = []

    def commit(folder, output_dir):
        seen.append(sorted(path.name for path in Path(output_dir).glob("checkpoint-*")))
        if len(seen) == 2:
            raise KeyboardInterrupt  # as if killed with all files written
        return whole(folder, output_dir)

    whole = checkpoints.commit
    monkeypatch.setattr(checkpoints, "commit", commit)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert seen == [[], ["checkpoint-4"]]
    for asked in (True, "True", "true"):  # text: from the command line
        assert checkpoints.to_resume_from(asked, trainer.args.output_dir).endswith("checkpoint-4")
    for asked in (None, False, "False", "false"):
        assert checkpoints.to_resume_from(asked, trainer.args.output_dir) is None
    monkeypatch.setattr(checkpoints, "commit", whole)
    trainer.train(resume_from_checkpoint=True)
    assert not Path(trainer.args.output_dir, checkpoints.STAGING).exists(), "what was left lying is cleared away"


def test_the_best_checkpoint_is_known_by_its_own_name(config, tokenizer):
    best = {"save_strategy": "epoch", "eval_strategy": "epoch", "metric_for_best_model": "objective"}
    trainer = trainer_of("adapter-off", config(**best, load_best_model_at_end=True, greater_is_better=False), tokenizer)
    trainer.train()
    state = json.loads(
        (Path(checkpoints.get_last_checkpoint(trainer.args.output_dir)) / "trainer_state.json").read_text()
    )
    for known in (trainer.state.best_model_checkpoint, state["best_model_checkpoint"]):
        assert Path(known).parent == Path(trainer.args.output_dir)
        assert Path(known).is_dir()


def test_the_accept_variates_of_a_rung_depend_on_its_address_alone():
    first = torch.rand(3, generator=streams.generator(5, streams.CORRECT, 7))
    torch.manual_seed(99)
    assert torch.equal(torch.rand(3, generator=streams.generator(5, streams.CORRECT, 7)), first)
    assert streams.generator(5, 1, 7).initial_seed() == streams.stream_seed(5, 1, 7)


def test_no_two_purposes_share_a_stream():
    """What proposals, chains, the order of the rows, evaluations and samples are drawn by."""
    purposes = (streams.PROPOSE, streams.CORRECT, streams.SHUFFLE, streams.EVALUATE, streams.SAMPLE)
    assert len({streams.stream_seed(5, purpose, rung) for purpose in purposes for rung in range(20)}) == 100
