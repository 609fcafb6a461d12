"""What DeepSpeed's config asks for, which is checked before anything is paid for.

DeepSpeed is not among the package's dependencies: what needs DeepSpeed itself skips without it (CONTRIBUTING.md).
"""

from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from bitsandbytes.nn import Params4bit
from conftest import CONFIGS, accelerate_launch, tiny_gpt2
from test_sharded import accelerator

from aldrift_hf.models import sharding
from aldrift_hf.trainer.deepspeed import in_precision, makes_optimizer
from aldrift_hf.trainer.loop import RungLoop
from aldrift_hf.trainer.open_settings import settled
from aldrift_hf.trainer.optimizer import check_optimizer

LAUNCHED = """
import sys
sys.path.insert(0, {tests!r})
import torch
from conftest import count_a, lora_config, tiny_llama
from aldrift_hf import ALDRIFTConfig, ALDRIFTTrainer
from aldrift_hf.toy import word_tokenizer

config = ALDRIFTConfig(
    sys.argv[1], tau_max=1.5, num_generations=80, max_completion_length=3, num_rungs=2, updates_per_rung=4,
    disable_tqdm=True, use_cpu=True, save_strategy="no",
)
words = word_tokenizer(["a", "b", "c"], " ")
trainer = ALDRIFTTrainer(
    tiny_llama(), count_a, config, train_dataset=["", "a b"], processing_class=words,
    peft_config=lora_config(tiny_llama()),
)
drawn = trainer.rollout.propose(trainer.inputs.prompts, 20, (99, 0))  # before DeepSpeed has the model
trainer.train()
rates = [rung["learning_rate"] for rung in trainer.record.rungs]
again = trainer.rollout.score(trainer.inputs.prompts, drawn, under_prior=True)
print("moved by", (again - drawn.log_prior).abs().max().item(), "rates", rates)
"""


def deepspeed(**config):
    return SimpleNamespace(hf_ds_config=SimpleNamespace(config=config))


@pytest.fixture
def settings(config):
    """Settings as they are after they were made, with changes."""

    def changed(**changes):
        made = config()
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    return changed


@pytest.mark.parametrize("own", [["optimizer"], ["scheduler"], ["optimizer", "scheduler"]])
def test_an_optimizer_of_its_own_needs_a_rate(own, settings):
    """Its `auto` takes what is set as the settings are read, and a rate that is found comes later."""
    plugin = deepspeed(**{name: {"params": {"lr": "auto"}} for name in own})
    args = settings(deepspeed_plugin=plugin, learning_rate=None)
    with pytest.raises(ValueError, match=f"own {' and '.join(own)}, .* Set learning_rate"):
        check_optimizer(args)
    args.learning_rate = 1e-4
    check_optimizer(args)
    assert makes_optimizer(args) == ("optimizer" in own)
    assert not makes_optimizer(settings(deepspeed_plugin=deepspeed(bf16={}), learning_rate=None))


def test_what_differs_from_the_settings_is_refused_before_draws():
    differs = SimpleNamespace(mismatches=["- ds gradient_accumulation_steps=1 vs hf gradient_accumulation_steps=8"])
    plugin = SimpleNamespace(zero_stage=2, hf_ds_config=differs)
    with pytest.raises(ValueError, match="settings: ds gradient_accumulation_steps=1 vs hf"):
        sharding.check(accelerator(deepspeed_plugin=plugin), tiny_gpt2())


def test_draws_before_the_model_is_sharded_are_warned_of(caplog):
    three = SimpleNamespace(zero_stage=3, hf_ds_config=SimpleNamespace())
    sharding.check(accelerator(deepspeed_plugin=three), tiny_gpt2())
    sharding.check(accelerator(deepspeed_plugin=SimpleNamespace(zero_stage=2)), tiny_gpt2(), draws_first=True)
    assert not caplog.text
    sharding.check(accelerator(deepspeed_plugin=three), tiny_gpt2(), draws_first=True)
    assert "set objective_range" in caplog.text


@pytest.mark.parametrize("launched", ["no", "bf16", "fp16"])
def test_the_precision_that_was_launched_is_the_settings(launched, settings, monkeypatch):
    """Accelerate takes its own, and who asks the settings (fp16's scaler skips updates, DeepSpeed) must hear of it."""
    config = settings()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    args = settled(config, 1)
    assert (args.bf16, args.fp16) == (launched == "bf16", launched == "fp16")
    assert (config.bf16, config.fp16) == (False, False)  # of which a copy may be launched otherwise
    config.bf16 = True
    args = settled(config, 1)
    assert (args.bf16, args.fp16) == (True, False)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_model_has_its_precision_from_the_beginning(name, dtype, settings):
    model = tiny_gpt2()
    bytes_of_four_bits = torch.zeros(8, dtype=torch.uint8)
    model.four = Params4bit(bytes_of_four_bits, requires_grad=False)
    in_precision(model, settings(deepspeed_plugin=None, **{name: True}))
    assert model.dtype == torch.float32
    assert in_precision(model, settings(deepspeed_plugin=deepspeed(), **{name: True})) is model
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert types.pop("four") == torch.uint8
    assert {*types.values()} == {dtype}
    with pytest.raises(ValueError, match=rf"weights in {str(dtype)[6:]} \(.*\) without mixed precision: set bf16=True"):
        in_precision(model, settings(deepspeed_plugin=deepspeed()))


def test_an_update_that_it_leaves_out_ends_the_run(settings):
    """It checks gradients by itself, and goes on without a word."""
    args, loop = settings(), RungLoop()
    loop.run = SimpleNamespace(state=SimpleNamespace(settled=False))
    weight = torch.nn.Parameter(torch.ones(1))
    inner = torch.optim.SGD([weight], lr=0.25)
    inner.overflow = False
    optimizer = DeepSpeedOptimizerWrapper.__new__(DeepSpeedOptimizerWrapper)
    optimizer.optimizer, optimizer.__has_overflow__ = inner, True
    loop.on_pre_optimizer_step(args, None, None, optimizer=optimizer, model=None)
    inner.overflow = True
    with pytest.raises(FloatingPointError, match=r"DeepSpeed has left the update out.* \(it is 0.25\)"):
        loop.on_pre_optimizer_step(args, None, None, optimizer=optimizer, model=None)


@pytest.mark.slow
def test_the_prior_is_the_same_before_and_after_it_has_the_model(tmp_path):
    """In bf16, which the launch alone asks for, as in the configs that are shipped. The learning rate is found."""
    pytest.importorskip("deepspeed")
    asked = {"distributed_type": "DEEPSPEED", "mixed_precision": "bf16", "num_machines": 1, "use_cpu": True}
    zero = {"zero_stage": 2, "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
    config, script = tmp_path / "zero2.yaml", tmp_path / "script.py"
    config.write_text(yaml.safe_dump(asked | {"deepspeed_config": zero}))
    script.write_text(LAUNCHED.format(tests=str(CONFIGS.parent / "tests")))
    done = accelerate_launch(config, "--num_processes", "2", str(script), str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    assert "moved by 0.0 rates [" in done.stdout
    assert "1e-05, 1e-05" not in done.stdout
