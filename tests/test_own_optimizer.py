"""An optimizer and a schedule of the user's own: they must be those of what is trained."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ALDRIFTTrainer, count_a, lora, lora_config, tiny_gpt2
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

from aldrift_hf.trainer.optimizer import check_given_optimizer

pytestmark = pytest.mark.versions


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def halved(optimizer):
    return LambdaLR(optimizer, lambda step: 0.5)


def trainer_of(config, tokenizer, model, optimizers, peft_config=None):
    return ALDRIFTTrainer(
        model, count_a, config(), processing_class=tokenizer, peft_config=peft_config, optimizers=optimizers
    )


def test_an_optimizer_made_before_the_adapter_is_refused(config, tokenizer):
    """It holds the base weights, which the adapter freezes: nothing would be trained, and nothing would say so."""
    model = tiny_gpt2()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match="holds none of the 8 trainable parameters"):
        trainer_of(config, tokenizer, model, (optimizer, None), lora_config(model))
    with pytest.raises(ValueError, match="holds none"):
        trainer_of(config, tokenizer, tiny_gpt2(), (AdamW(tiny_gpt2().parameters(), lr=1e-2), None))


@pytest.mark.slow
def test_an_optimizer_of_a_part_is_warned_of(config, tokenizer, caplog):
    model = lora(tiny_gpt2(), seed=3)
    optimizer = AdamW(trained(model)[:2], lr=1e-2)
    trainer = trainer_of(config, tokenizer, model, (optimizer, None))
    assert "does not hold 6 of the 8 trainable parameters" in caplog.text
    before = [parameter.clone() for parameter in trained(model)]
    trainer.train()
    moved = [not torch.equal(old, new) for old, new in zip(before, trained(model), strict=True)]
    assert moved == [True, True, *[False] * 6]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["peft-model", "full"])
def test_an_optimizer_of_what_is_trained_trains_it(kind, config, tokenizer, caplog):
    model = lora(tiny_gpt2(), seed=3) if kind == "peft-model" else tiny_gpt2()
    optimizer = SGD([{"params": trained(model)[:1], "lr": 0.1}, {"params": trained(model)[1:]}], lr=0.05)
    trainer = trainer_of(config, tokenizer, model, (optimizer, halved(optimizer)))
    before = [parameter.clone() for parameter in trained(model)]
    trainer.train()
    assert any(not torch.equal(old, new) for old, new in zip(before, trained(model), strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.025]
    assert "does not hold" not in caplog.text


def test_a_schedule_of_another_optimizer_is_refused(config, tokenizer):
    """It would change the learning rates of an optimizer that nobody steps."""
    model = lora(tiny_gpt2(), seed=3)
    own, other = (AdamW(trained(model), lr=1e-2) for _ in range(2))
    for optimizers in ((own, halved(other)), (None, halved(other))):
        with pytest.raises(ValueError, match="schedule in optimizers belongs to another optimizer"):
            trainer_of(config, tokenizer, model, optimizers)


def test_a_schedule_may_be_that_of_the_optimizer_inside():
    model = tiny_gpt2()
    inner = AdamW(model.parameters(), lr=1e-2)
    wrapped = SimpleNamespace(optimizer=inner, param_groups=inner.param_groups)
    check_given_optimizer(wrapped, LambdaLR(inner, lambda step: 0.5), model)
