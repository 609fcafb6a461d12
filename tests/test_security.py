"""Nothing downloaded is executed: no pickle and no code in it is run, and no path in it is followed."""

import contextlib
import io
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import EOS, WORDS, ALDRIFTTrainer, count_a, lora_config, tiny_gpt2
from test_cli import COSTS

from aldrift_hf import cli
from aldrift_hf.cli import runs
from aldrift_hf.cli.parser import RunParser
from aldrift_hf.toy import word_tokenizer
from aldrift_hf.trainer import checkpoints

pytestmark = pytest.mark.slow


class Planted:
    """Creates a folder when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def plain(trace):
    return pickle.dumps({"state_dict": Planted(trace)})


def as_torch_saves(trace):
    file = io.BytesIO()
    torch.save({"weight": Planted(trace)}, file)
    assert zipfile.is_zipfile(file)
    return file.getvalue()


@pytest.fixture
def trace(tmp_path):
    """A folder that the planted pickles and code create when they run, and that no test here may leave behind."""
    trace = tmp_path / "trace"
    for write in (plain, as_torch_saves):
        with contextlib.suppress(RuntimeError):  # of the plain one it says that it was not written by torch: too late
            torch.load(io.BytesIO(write(trace)), weights_only=False)
        assert trace.is_dir()
        trace.rmdir()
    yield trace
    assert not trace.exists(), "something that was planted was run"


@pytest.fixture
def make(config, tokenizer):
    def build(model=None, **settings):
        return ALDRIFTTrainer(
            model or tiny_gpt2(),
            count_a,
            config(save_strategy="epoch", **settings),
            processing_class=tokenizer,
            peft_config=lora_config(tiny_gpt2()),
        )

    return build


def sealed(folder):
    """Write a checkpoint's manifest again, as somebody who tampers with its files would."""
    (folder / checkpoints.MANIFEST_FILE).unlink()
    output_dir = folder.parent
    staging = output_dir / checkpoints.STAGING
    staging.mkdir()
    folder.rename(staging / folder.name)
    return checkpoints.commit(str(staging / folder.name), str(output_dir))


@pytest.mark.parametrize("write", [plain, as_torch_saves])
def test_no_pickle_of_a_checkpoint_is_read(make, trace, write):
    trainer = make(num_rungs=2)
    trainer.train()
    earlier = Path(trainer.args.output_dir, "checkpoint-4")
    pickles = sorted(path.name for path in earlier.iterdir() if path.suffix in (".pt", ".pth", ".bin"))
    assert pickles == ["optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"]
    for name in [*pickles, "adapter_model.bin", "pytorch_model.bin"]:
        kept = (earlier / name).read_bytes() if name in pickles else None
        (earlier / name).write_bytes(write(trace))
        folder = sealed(earlier)
        read = name in ("optimizer.pt", "rng_state.pth", "scheduler.pt")
        with pytest.raises(Exception, match=r"(?i)weights.only") if read else contextlib.nullcontext():
            make(num_rungs=2).train(resume_from_checkpoint=folder)
        (earlier / name).unlink()
        if kept:
            (earlier / name).write_bytes(kept)


@pytest.mark.parametrize("write", [plain, as_torch_saves])
def test_no_pickle_of_a_run_or_a_model_is_read(make, trace, write, tmp_path):
    trainer = make()
    trainer.train()
    trainer.save_model()
    out = Path(trainer.args.output_dir)
    for name in ("training_args.bin", "adapter_model.bin"):
        (out / name).write_bytes(write(trace))
    make().load_run(out)
    (out / "adapter_model.safetensors").unlink()
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        make().load_run(out)

    model = tmp_path / "model"
    tiny_gpt2().save_pretrained(model)
    trainer.processing_class.save_pretrained(model)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(write(trace))
    with pytest.raises(Exception, match=r"weights_only|Weights only|pickle"):
        make(str(model))


def test_a_manifest_names_no_file_outside_its_folder(make, tmp_path):
    trainer = make(num_rungs=1)
    trainer.train()
    folder = Path(trainer.args.output_dir, "checkpoint-4")
    outside = tmp_path / "outside"
    outside.write_text("secret")
    for name in ("../../outside", str(outside), "/dev/zero"):
        (folder / checkpoints.MANIFEST_FILE).write_text(json.dumps({name: "0"}))
        assert checkpoints.damage(str(folder)) == f"{name} is missing"
    for text in ("[]", "null", "1", '"optimizer.pt"', "\x00", ""):
        (folder / checkpoints.MANIFEST_FILE).write_text(text)
        assert checkpoints.damage(str(folder)) == f"{checkpoints.MANIFEST_FILE} is damaged"


CODE = """
import os
from transformers import GPT2Config, GPT2LMHeadModel
os.mkdir({trace!r})
class OwnConfig(GPT2Config):
    model_type = "own"
class Own(GPT2LMHeadModel):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(tmp_path, trace, monkeypatch):
    """A model that comes with its own code, and a module with a cost."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    tiny_gpt2().save_pretrained(folder)
    word_tokenizer(WORDS, " ").save_pretrained(folder)
    (folder / "code.py").write_text(CODE.format(trace=str(trace)))
    described = json.loads((folder / "config.json").read_text())
    described |= {"model_type": "own", "auto_map": {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.Own"}}
    (folder / "config.json").write_text(json.dumps(described))
    (tmp_path / "costs.py").write_text(COSTS)
    monkeypatch.delitem(sys.modules, "costs", raising=False)  # another test's
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_models_own_code_runs_only_when_it_is_asked_for(make, with_code, trace, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked whether to run code"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        make(str(with_code))
    assert not trace.exists()
    make(str(with_code), model_init_kwargs={"trust_remote_code": True})
    trace.rmdir()  # it was run, as it was asked for


def test_no_run_asks_for_code(make, with_code, trace, monkeypatch, capsys):
    """Neither a local run nor one from the Hub can make foreign code run, by any of its files."""
    trainer = make(model=None)
    trainer.train()
    trainer.save_model()
    out = Path(trainer.args.output_dir)
    kwargs = {"trust_remote_code": True, "weights_only": False}
    options = {"model_name_or_path": str(with_code), "trust_remote_code": True, "model_init_kwargs": kwargs}
    options |= {"tau_max": 1.5, "max_completion_length": 3, "objective": ["costs:not_a"]}
    (out / "run.yaml").write_text(yaml.safe_dump(options))
    with pytest.raises((SystemExit, ValueError)):
        cli.main(["evaluate", str(out)])
    assert "trust_remote_code" in capsys.readouterr().err

    monkeypatch.setattr(runs, "snapshot_download", lambda name: str(out))
    local = {"deepspeed": "ds.json", "report_to": "wandb", "attn_implementation": "somebody/kernels", "max_steps": 7}
    (out / "run.yaml").write_text(yaml.safe_dump(options | local))
    argv = ["somebody/model", "--objective", "costs:not_a"]
    folder, (task, config, model) = runs.parse(RunParser("aldrift evaluate", "", ""), argv, str(out / "scratch"))
    assert folder == out
    assert (config.model_init_kwargs, config.deepspeed, config.report_to, config.max_steps) == (None, None, [], -1)
    assert (model.attn_implementation, model.trust_remote_code) == (None, False)
    assert (config.tau_max, task.objective) == (1.5, ["costs:not_a"])


def test_text_of_prompts_and_completions_becomes_no_path(make, tmp_path, tokenizer):
    """Whatever the prompts and completions are, a run writes files of the same names."""
    ordinary = make(num_rungs=1)
    ordinary.train()
    names = {str(path.relative_to(ordinary.args.output_dir)) for path in Path(ordinary.args.output_dir).rglob("*")}
    spoken = word_tokenizer(["../../up", "/tmp/down", "CON"], " ")

    def cost(prompts, completions):
        return [0.0 for _ in completions]

    cost.__name__ = "../../cost"
    args = ordinary.args
    args.output_dir = str(tmp_path / "other")
    trainer = ALDRIFTTrainer(
        tiny_gpt2(),
        [cost, count_a],
        args,
        train_dataset=["../../prompt"],
        processing_class=spoken,
        peft_config=lora_config(tiny_gpt2()),
    )
    trainer.train()
    assert {str(path.relative_to(args.output_dir)) for path in Path(args.output_dir).rglob("*")} == names
    assert spoken.eos_token_id == EOS
