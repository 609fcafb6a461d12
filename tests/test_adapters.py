"""Adapters by any name: trained, saved, resumed, loaded, chosen as the best, and described in the card."""

from pathlib import Path

import pytest
import torch
from conftest import EOS, ALDRIFTTrainer, count_a, every_completion, log_probs, lora, lora_config, perturb, tiny_gpt2
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model

from aldrift_hf.models import adapters
from aldrift_hf.models.prior import base_model

pytestmark = [pytest.mark.slow, pytest.mark.versions]

NAMES = ["mine", "prior", "lora_A"]
EVERY_RUNG = {
    **{"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True, "save_total_limit": None},
    **{"metric_for_best_model": "objective", "greater_is_better": False},
}


def named(name: str, seed: int = 3) -> PeftModel:
    """A model with a trained adapter of this name, and an idle one called `default`, which must stay out of it."""
    model = get_peft_model(tiny_gpt2(), lora_config(tiny_gpt2()), adapter_name=name)
    perturb(model, seed=seed)
    if name == "mine":
        model.add_adapter("default", lora_config(tiny_gpt2()))
    return model.eval()


def scores(model) -> torch.Tensor:
    return log_probs(base_model(model), [EOS], every_completion())


def run(model, args, tokenizer, cost=count_a):
    trainer = ALDRIFTTrainer(model, cost, args, processing_class=tokenizer)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_resumed_to_the_same_numbers(name, config, tokenizer, tmp_path):
    start = scores(named(name))
    whole = run(named(name), config(save_strategy="epoch", save_total_limit=None), tokenizer)
    assert whole.record.settings["adapter_name"] == name
    assert whole.record.settings["prior_adapter"] == ("prior2" if name == "prior" else "prior")
    checkpoints = sorted(Path(whole.args.output_dir).glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    again = ALDRIFTTrainer(named(name), count_a, config(output_dir=str(tmp_path / "again")), processing_class=tokenizer)
    assert torch.equal(scores(again.model), start)
    again.train(resume_from_checkpoint=str(checkpoints[0]))
    assert again.record.rungs[-1]["log_z"] == whole.record.rungs[-1]["log_z"]
    assert torch.equal(scores(again.model), scores(whole.model))
    with again.rollout.prior.active(again.model) as prior:
        assert torch.equal(log_probs(prior, [EOS], every_completion()), start)


def test_the_prior_is_the_adapter_passed_in_and_not_one_that_lies_in_the_checkpoint(config, tokenizer, tmp_path):
    whole = run(named("mine"), config(save_strategy="epoch", save_total_limit=None), tokenizer)
    other = ALDRIFTTrainer(
        named("mine", seed=8), count_a, config(output_dir=str(tmp_path / "other")), processing_class=tokenizer
    )
    with pytest.raises(ValueError, match="another prior"):
        other.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-4"))


@pytest.mark.parametrize("name", ["default", *NAMES])
def test_the_best_model_is_loaded_at_the_end(name, config, tokenizer):
    """Evaluations are arranged so that the first is the best."""
    trainer = ALDRIFTTrainer(named(name), count_a, config(**EVERY_RUNG), processing_class=tokenizer)
    after: list[torch.Tensor] = []

    def evaluate(*args, **kwargs):
        after.append(scores(trainer.model))
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, {})
        return {"eval_objective": float(len(after))}

    trainer.evaluate = evaluate
    trainer.train()
    assert len(after) == 3
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert torch.equal(scores(trainer.model), after[0])
    assert not torch.equal(after[0], after[-1])


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_loaded_and_described_by_any_name(name, config, tokenizer, tmp_path):
    trainer = run(named(name), config(), tokenizer)
    trainer.save_model()
    saved = Path(trainer.args.output_dir)
    again = ALDRIFTTrainer(named(name), count_a, config(output_dir=str(tmp_path / "again")), processing_class=tokenizer)
    again.load_run(saved)
    assert torch.equal(scores(again.model), scores(trainer.model))
    card = ModelCard((saved / "README.md").read_text()).text
    assert f'subfolder="{name}"' in card
    assert f'subfolder="{trainer.record.settings["prior_adapter"]}"' in card


def test_a_run_of_another_prior_is_not_loaded(config, tokenizer, tmp_path):
    trainer = run(named("mine"), config(), tokenizer)
    trainer.save_model()
    other = lora(tiny_gpt2(seed=5))
    again = ALDRIFTTrainer(other, count_a, config(output_dir=str(tmp_path / "again")), processing_class=tokenizer)
    with pytest.raises(ValueError, match="was written with another prior: log-probabilities of short rows differ"):
        again.load_run(trainer.args.output_dir)


def test_a_best_checkpoint_that_is_gone_does_not_end_a_run(config, tokenizer, caplog):
    """Set aside by another run, and gone on with from there."""
    first = run(named("mine"), config(**EVERY_RUNG), tokenizer)
    best = Path(first.state.best_model_checkpoint).name
    run(named("mine"), config(**EVERY_RUNG), tokenizer)
    again = ALDRIFTTrainer(named("mine"), count_a, config(**EVERY_RUNG), processing_class=tokenizer)
    moved = Path(first.args.output_dir) / "_set_aside" / "1"
    assert (moved / best).is_dir()
    again.train(resume_from_checkpoint=str(moved / "checkpoint-12"))
    assert again.record.finished
    again.state.best_model_checkpoint = "nowhere/checkpoint-4"
    again._load_best_model()
    assert "nowhere/checkpoint-4, the best checkpoint, does not exist any more" in caplog.text


def test_a_run_goes_on_under_another_name(config, tokenizer, tmp_path):
    """In another process the same adapter is loaded as `default`, which is what PEFT calls it."""
    named("mine").save_pretrained(tmp_path / "start", selected_adapters=["mine"])

    def loaded():
        return PeftModel.from_pretrained(tiny_gpt2(), str(tmp_path / "start" / "mine"), is_trainable=True)

    whole = run(named("mine"), config(save_strategy="epoch", save_total_limit=None), tokenizer)
    whole.save_model()
    again = ALDRIFTTrainer(loaded(), count_a, config(output_dir=str(tmp_path / "again")), processing_class=tokenizer)
    again.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-4"))
    assert again.model.active_adapter == "default"
    assert torch.equal(scores(again.model), scores(whole.model))
    other = ALDRIFTTrainer(loaded(), count_a, config(output_dir=str(tmp_path / "other")), processing_class=tokenizer)
    other.load_run(whole.args.output_dir)
    assert torch.equal(scores(other.model), scores(whole.model))


def test_a_model_that_has_been_through_a_trainer_is_the_prior_as_it_is_now(config, tokenizer, caplog, tmp_path):
    model = named("mine")
    run(model, config(), tokenizer)
    trained = scores(model)
    again = ALDRIFTTrainer(model, count_a, config(output_dir=str(tmp_path / "again")), processing_class=tokenizer)
    assert "already has an adapter called 'prior'" in caplog.text
    with again.rollout.prior.active(again.model) as prior:
        assert torch.equal(log_probs(prior, [EOS], every_completion()), trained)


def test_adapters_that_cannot_be_loaded_or_pushed_are_refused(config, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="not pushed"):
        ALDRIFTTrainer(named("_mine"), count_a, config(), processing_class=tokenizer)
    named("other").save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="no adapter called 'mine'"):
        adapters.load_active(named("mine"), tmp_path / "saved" / "other")
    wider = get_peft_model(tiny_gpt2(), lora_config(tiny_gpt2()))
    wider.save_pretrained(tmp_path / "wider")
    narrow = lora_config(tiny_gpt2())
    narrow.target_modules = ["c_fc"]
    with pytest.raises(ValueError, match="does not fit"):
        adapters.load_active(get_peft_model(tiny_gpt2(), narrow), tmp_path / "wider")


def test_the_frozen_copy_has_the_precision_of_the_original():
    """PEFT makes new adapters in fp32; a copy in another precision than the original would round otherwise."""
    model = tiny_gpt2().to(torch.bfloat16)
    model = get_peft_model(model, lora_config(model), adapter_name="mine", autocast_adapter_dtype=False)
    perturb(model, seed=3)
    before = scores(model.eval())
    assert adapters.add_frozen_copy(model) == "prior"
    assert {p.dtype for name, p in model.named_parameters() if ".prior." in name} == {torch.bfloat16}
    model.set_adapter("prior")
    assert torch.equal(scores(model), before)
