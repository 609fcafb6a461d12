"""FSDP2 and ZeRO-3 on two processes on the CPU (gloo) against DDP: the same proposals, the same model.

With GPUs the same runs go through the configs that are shipped. DeepSpeed is not among the package's dependencies, and
its tests skip without it (CONTRIBUTING.md).
"""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from conftest import CONFIGS, accelerate_launch, tiny_gpt2
from safetensors.torch import load_file
from test_distributed import records, result

from aldrift_hf.models import sharding

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from conftest import count_a, lora_config, tiny_gpt2, tiny_llama
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from aldrift_hf import ALDRIFTConfig, ALDRIFTTrainer, TransformersEngine
from aldrift_hf.models.engines import EngineSettings
from aldrift_hf.models.engines.vllm import save_adapter, whole_adapter
from aldrift_hf.models.prior import base_model
from aldrift_hf.models import sharding
from aldrift_hf.toy import word_tokenizer
from peft import PeftModel

torch.set_num_threads(1)
output, flags = sys.argv[1], sys.argv[2:]
fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
zero = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


class Elsewhere(TransformersEngine):
    # Draws with a copy of its own, as vLLM does.

    draws_with_policy = False
    layers = set()

    def sync(self, policy):
        names = [name for name, _ in tiny_llama().named_parameters()]
        weights = {{n.replace(".base_layer", ""): sharding.whole(p) for n, p in base_model(policy).named_parameters()}}
        copy = tiny_llama()
        copy.load_state_dict({{name: weights[name] for name in names}})
        folder = save_adapter(policy, whole_adapter(policy), Path(output) / f"adapter-{{config.process_index}}")
        self.own = PeftModel.from_pretrained(copy, folder).eval()
        self.policy = base_model(policy)
        super().sync(self.own)

    def generate(self, prompts, address, rows, limits=None):
        self.layers |= {{sharding.is_apart(p) for p in self.policy.model.layers.parameters()}}
        return super().generate(prompts, address, rows, limits)


model = tiny_gpt2() if "--gpt2" in flags else tiny_llama()
config = ALDRIFTConfig(
    output_dir=output, tau_max=1.5, objective_range=None if "--range" in flags else 3.0, tau_step=0.5,
    num_generations=80, chain_length=4, max_completion_length=3, per_device_generation_batch_size=16,
    per_device_train_batch_size=4, num_rungs=3, scoring_batch_tokens=20 if "--elsewhere" in flags else 2**14,
    updates_per_rung=4, learning_rate=1e-2, disable_tqdm=True, use_cpu="--gpu" not in flags, save_strategy="steps",
    save_steps=6, sampler="archive",
)
if fsdp and "--gpu" not in flags:
    # Accelerate has FSDP on accelerators alone, and gives DDP on the CPU without a word; its code runs on gloo as well.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
peft_config = None
if "--full" not in flags:
    peft_config = lora_config(model)
    if "--head" in flags:
        peft_config.target_modules = [*peft_config.target_modules, "lm_head"]
words = word_tokenizer(["a", "b", "c"], " ")
engine = Elsewhere(EngineSettings(3, (words.eos_token_id,), words.eos_token_id)) if "--elsewhere" in flags else None
trainer = ALDRIFTTrainer(
    model, count_a, config, train_dataset=["", "a b", "c"], processing_class=words, peft_config=peft_config,
    engine=engine,
)
assert trainer.is_fsdp_enabled == fsdp, (trainer.is_fsdp_enabled, fsdp)
assert trainer.args.world_size == 2
before = trainer.sample(7)
trainer.evaluate()
resume = os.path.join(output, "checkpoint-6") if "--resume" in flags else None
Elsewhere.layers.clear()  # before training the model is not sharded yet
trainer.train(resume_from_checkpoint=resume)
if fsdp or zero:
    assert all(map(sharding.is_apart, trainer.model.parameters())), "sharded again"
    if engine:
        assert engine.layers == {{True}}, "sharded all the time"
    assert all(p.requires_grad == ("lora_" in n and ".prior." not in n or "--full" in flags)
               for n, p in trainer.model.named_parameters())
after = trainer.sample(50, chain_length=5)
metrics = trainer.evaluate()
trainer.save_model(os.path.join(output, "final"))
with open(os.path.join(output, f"rank-{{trainer.args.process_index}}.json"), "w") as file:
    json.dump({{"before": before.to_dict(), "after": after.to_dict(), "metrics": metrics}}, file)
PartialState().destroy_process_group()
"""


def launch(folder: Path, config: str, *flags: str) -> subprocess.CompletedProcess:
    folder.parent.mkdir(parents=True, exist_ok=True)
    script = folder.parent / f"{folder.name}.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    how = ["--num_processes", "2", *(["--mixed_precision", "no"] if "--gpu" in flags else [])]
    return accelerate_launch(config_file(folder, config), *how, str(script), str(folder), *flags)


def config_file(folder: Path, config: str) -> Path:
    """One of those that are shipped, or one for the CPU."""
    if config == "zero3_cpu":
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
        asked = dict.fromkeys(["train_micro_batch_size_per_gpu", "gradient_accumulation_steps"], "auto")
        settings, path = folder.with_suffix(".json"), folder.with_suffix(".yaml")
        settings.write_text(json.dumps({"zero_optimization": zero, "gradient_clipping": "auto"} | asked))
        deepspeed = {"deepspeed_config_file": str(settings), "zero3_init_flag": False}
        launched = {"distributed_type": "DEEPSPEED", "deepspeed_config": deepspeed, "num_machines": 1, "use_cpu": True}
        path.write_text(yaml.safe_dump(launched))
        return path
    return (Path(__file__).parent if config == "fsdp2_cpu" else CONFIGS) / f"{config}.yaml"


KINDS = {
    "head": ["--head"],  # the output embedding is adapted, and so no longer tied to FSDP's root alone
    "full": ["--gpt2", "--full", "--range"],
    "elsewhere": ["--elsewhere"],  # the engine has weights of its own, and the model is never whole
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = [*folder.glob("adapter_model.safetensors"), *folder.glob("model.safetensors")]
    return load_file(path)


@pytest.mark.parametrize(
    ("config", "kind"), [*(("fsdp2_cpu", kind) for kind in KINDS), *(("zero3_cpu", kind) for kind in KINDS)]
)
def test_the_run_is_that_of_ddp_and_resumes(config, kind, tmp_path, monkeypatch):
    """Forward passes made in step by processes with unlike numbers of them, too; their order is all that changes."""
    if config == "zero3_cpu":
        pytest.importorskip("deepspeed")
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    ddp, sharded = (tmp_path / name for name in ("multi_cpu", config))
    for folder in (ddp, sharded):
        done = launch(folder, folder.name, *KINDS[kind])
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-6000:]

    for one, two in zip(records(ddp), records(sharded), strict=True):
        assert one.keys() == two.keys()
        for key in one:
            if not key.startswith("seconds_") and "khat" not in key:  # a fit to a few extremes multiplies rounding
                assert two[key] == (None if one[key] is None else pytest.approx(one[key], rel=1e-3, abs=1e-5)), key
    one, two = result(ddp), result(sharded)
    assert one["before"] == two["before"]
    assert two["after"] == result(sharded, rank=1)["after"]
    assert one["after"]["completion"] == two["after"]["completion"]
    assert one["after"]["log_model"] == pytest.approx(two["after"]["log_model"], abs=1e-4)
    one, saved = weights(ddp / "final"), weights(sharded / "final")
    # Of an output embedding that is tied and frozen, FSDP writes the weight twice, and DeepSpeed once.
    left_out = {"base_model.model.lm_head.base_layer.weight"} if config == "zero3_cpu" else set()
    assert one.keys() - saved.keys() <= left_out
    for name in one.keys() & saved.keys():
        if not name.endswith("c_attn.bias"):  # a key's bias has no gradient but rounding, which Adam blows up
            assert torch.allclose(one[name], saved[name], rtol=0, atol=1e-5), name

    if kind == "elsewhere":
        return
    done = launch(sharded, config, "--resume", *KINDS[kind])
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-6000:]
    again = weights(sharded / "final")
    for name in saved:
        assert torch.equal(saved[name], again[name]), name
    assert result(sharded)["after"] == two["after"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs")
@pytest.mark.parametrize("config", ["fsdp2", "zero2", "zero3"])
def test_the_shipped_configs_on_two_gpus(config, tmp_path):
    if config.startswith("zero"):
        pytest.importorskip("deepspeed")
    for name in ("multi_gpu", config):
        done = launch(tmp_path / name, name, "--gpu", *KINDS["head"])
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-6000:]
    ddp, other = (weights(tmp_path / name / "final") for name in ("multi_gpu", config))
    for name in ddp:
        assert torch.allclose(ddp[name], other[name], rtol=0, atol=1e-4), name


def accelerator(**state):
    return SimpleNamespace(state=SimpleNamespace(**state))


def test_what_cannot_work_is_refused(monkeypatch, caplog):
    model = tiny_gpt2()
    sharding.check(accelerator(), model)
    whole = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="FULL_STATE_DICT")
    sharding.check(accelerator(fsdp_plugin=whole), model)
    old = FullyShardedDataParallelPlugin(fsdp_version=1, state_dict_type="FULL_STATE_DICT")
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        sharding.check(accelerator(fsdp_plugin=old), model)
    parts = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    with pytest.raises(ValueError, match="FULL_STATE_DICT"):
        sharding.check(accelerator(fsdp_plugin=parts), model)
    model.is_quantized = True
    sharding.check(accelerator(deepspeed_plugin=SimpleNamespace(zero_stage=2)), model)
    for state in ({"fsdp_plugin": whole}, {"deepspeed_plugin": SimpleNamespace(zero_stage=3)}):
        with pytest.raises(ValueError, match=r"multi_gpu\.yaml"):
            sharding.check(accelerator(**state), model)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    sharding.check(accelerator(), model)
    assert "plain DDP" in caplog.text
