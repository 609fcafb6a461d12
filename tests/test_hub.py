"""Pushing to a stand-in for the Hub and loading from it, with the client and the trainer as they are."""

import copy
import json
import logging
import os
import pickle
import socket
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from conftest import (
    CONFIGS,
    ALDRIFTTrainer,
    accelerate_launch,
    count_a,
    every_completion,
    log_probs,
    lora_config,
    perturb,
    tiny_gpt2,
)
from hub_stand_in import TOKEN, HubStandIn, Repository
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import filter_repo_objects
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from problems.training import one_of_several
from test_card import check_code
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from aldrift_hf import cli
from aldrift_hf.cli import runs
from aldrift_hf.cli.parser import RunParser
from aldrift_hf.reporting.record import RunRecord
from aldrift_hf.trainer.checkpoints import OBJECTIVE_FILE, SAMPLES_FILE, STATE_FILE

pytestmark = pytest.mark.versions

RECIPE = Path(__file__).parents[1] / "recipes" / "spanning_tree.py"
RECORD = {"run.json", "rungs.jsonl", "draws.jsonl", "README.md"}
ADAPTER = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "training_args.bin"}


@pytest.fixture
def hub(monkeypatch, tmp_path, tokenizer):
    """A stand-in that holds the model `me/base`, and a client that talks to nothing else."""
    connect = socket.socket.connect

    def connect_to_loopback(self, address):
        assert self.family == socket.AF_UNIX or address[0] == "127.0.0.1", f"a request left the machine: {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_to_loopback)
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01)))
    with HubStandIn() as server:
        client = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }
        for name, value in client.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # a newer one keeps its client
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        tiny_gpt2().save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
        server.repositories["me/base"] = Repository([files], ["a model"])
        yield server


class OnePushAfterTheOther(TrainerCallback):
    """The Trainer leaves out a push where the last one is still under way; a run this short would leave out most."""

    def on_save(self, args, state, control, **kwargs):
        if args.push_to_hub:
            self.trainer._finish_current_push()


def trainer_on(args, **changes) -> ALDRIFTTrainer:
    """LoRA on the model that the stand-in holds."""
    given = {"model": "me/base", "objective": count_a, "args": args, "peft_config": lora_config(tiny_gpt2())}
    callback = OnePushAfterTheOther()
    callback.trainer = ALDRIFTTrainer(**{**given, "callbacks": [callback], **changes})
    return callback.trainer


def same_log_probs(model, trainer: ALDRIFTTrainer) -> bool:
    completions = every_completion()
    first, second = (log_probs(policy.eval(), [0], completions) for policy in (model, trainer.model))
    return torch.allclose(first, second, atol=1e-6) and not torch.allclose(
        first, log_probs(tiny_gpt2(), [0], completions), atol=0.1
    )


@pytest.mark.slow
def test_what_is_pushed_loads_as_the_model_that_was_trained(hub, config, tmp_path, monkeypatch, capsys):
    """Each kind of request is answered with 503 at first, and made again."""
    for kind in (("POST", "repos/create"), ("POST", "preupload"), ("POST", "objects/batch"), ("PUT", "/lfs/")):
        hub.faults[kind] = 1
    args = config(hub_model_id="dice")
    trainer = trainer_on(args)
    trainer.train()
    (Path(args.output_dir) / "figures").mkdir()
    for name in ("figures/ladder.png", "figures/ladder.svg", "report.html"):
        (Path(args.output_dir) / name).write_bytes(b"drawn")
    trainer.push_to_hub(license="mit", tags="dice")
    assert not any(hub.faults.values())

    files = hub.repositories["me/dice"].files
    assert RECORD | ADAPTER | {"figures/ladder.png", "figures/ladder.svg", "report.html"} <= set(files)
    assert len(files["rungs.jsonl"].splitlines()) == 3
    assert json.loads(files["run.json"])["finished"]
    card = ModelCard(files["README.md"].decode())
    assert {"license": "mit", "base_model": "me/base", "library_name": "peft"}.items() <= card.data.to_dict().items()
    assert {"aldrift", "peft", "lora", "dice"} <= set(card.data.tags)
    assert "![Metrics of the run along its ladder](figures/ladder.png)" in card.text

    monkeypatch.chdir(tmp_path)
    check_code(card.text, trainer)
    assert same_log_probs(AutoPeftModelForCausalLM.from_pretrained("me/dice"), trainer)
    assert AutoTokenizer.from_pretrained("me/dice").get_vocab() == trainer.processing_class.get_vocab()

    (tmp_path / "costs.py").write_text("def cost(prompts, completions):\n    return [0.0 for _ in completions]\n")
    capsys.readouterr()
    cli.main(["sample", "me/dice", "-n", "3", "--objective", "costs.py:cost"])  # as the card has it
    assert [json.loads(line)["objective"] for line in capsys.readouterr().out.splitlines()] == [0.0] * 3


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_checkpoints_are_pushed_by_strategy_and_no_token_with_them(hub, config, strategy, caplog, capfd):
    args = config(
        push_to_hub=True,
        hub_model_id="me/dice",
        hub_strategy=strategy,
        hub_token=TOKEN,
        save_strategy="epoch",
        model_init_kwargs={"token": TOKEN},
    )
    trainer = trainer_on(args)
    trainer.train()
    repository = hub.repositories["me/dice"]
    of_checkpoints = [message for message in repository.messages if message.endswith(", checkpoint")]
    in_progress = [message for message in repository.messages if message.startswith("Training in progress")]
    assert len(in_progress) - len(of_checkpoints) == 3
    assert len(of_checkpoints) == (3 if strategy == "checkpoint" else 0)
    rungs = [
        len(files["rungs.jsonl"].splitlines())
        for files, message in zip(repository.commits, repository.messages)
        if message in in_progress and message not in of_checkpoints
    ]
    assert rungs == [1, 2, 3]
    assert set(repository.files) >= RECORD | ADAPTER
    assert ModelCard(repository.files["README.md"].decode()).data.base_model == "me/base"
    assert "So far, after 3 rungs" in repository.files["README.md"].decode()
    if strategy == "checkpoint":
        last = Path(args.output_dir) / "checkpoint-12"
        for name in (STATE_FILE, SAMPLES_FILE, OBJECTIVE_FILE, "optimizer.pt", "README.md"):
            assert repository.files[f"last-checkpoint/{name}"] == (last / name).read_bytes()
        assert "aldrift" in ModelCard.load(last / "README.md").data.tags

    trainer.save_model()
    assert repository.messages[-1] == "Model save"
    assert "After 3 rungs" in repository.files["README.md"].decode()
    trainer.evaluate()
    written = {str(path): path.read_bytes() for path in Path(args.output_dir).rglob("*") if path.is_file()}
    assert any(name.endswith("training_args.bin") for name in written)
    sent = {f"{each.method} {each.path}": each.headers.encode() + each.body for each in hub.requests}
    shown = {
        "log": caplog.text.encode(),
        **{name: text.encode() for name, text in capfd.readouterr()._asdict().items()},
    }
    held = {
        f"{message}: {name}": data
        for files, message in zip(repository.commits, repository.messages)
        for name, data in files.items()
    }
    for name, data in {**written, **sent, **shown, **held}.items():
        assert TOKEN.encode() not in data, name


@pytest.mark.slow
def test_nothing_is_deleted_once_a_push_has_begun(hub, config, tmp_path, monkeypatch):
    """The client lists output_dir in a thread, and a folder that goes meanwhile is an error there."""
    trainer = trainer_on(config(push_to_hub=True, hub_model_id="me/dice", save_strategy="epoch", save_total_limit=1))
    push, seen = trainer._push_from_checkpoint, []

    def look_and_push(checkpoint):
        if trainer.checkpointer.staging is None:
            seen.append([folder.name for folder in (tmp_path / "out").glob("checkpoint-*")])
        push(checkpoint)

    monkeypatch.setattr(trainer, "_push_from_checkpoint", look_and_push)
    trainer.train()
    assert seen == [["checkpoint-4"], ["checkpoint-8"], ["checkpoint-12"]]


def test_a_token_is_neither_shown_nor_pickled(config):
    args = config(hub_token=TOKEN, model_init_kwargs=json.dumps({"token": TOKEN}))
    assert args.hub_token == args.model_init_kwargs["token"] == copy.deepcopy(args).hub_token == TOKEN
    for text in (repr(args), str(args), args.to_json_string(), str(args.to_sanitized_dict())):
        assert TOKEN not in text
    args.set_push_to_hub("me/dice", token=TOKEN)
    assert TOKEN.encode() not in pickle.dumps(args)
    assert pickle.loads(pickle.dumps(args)).tau_max == args.tau_max

    parser = RunParser("aldrift train", "", "")
    kwargs = json.dumps({"token": TOKEN, "revision": "v1"})
    server = ["--engine_kwargs", json.dumps({"api_key": TOKEN, "timeout": 3})]
    parser.parse(["--objective", "a:b", "--hub_token", TOKEN, "--model_init_kwargs", kwargs, *server])
    assert parser.given["model_init_kwargs"] == {"revision": "v1"}  # what goes into run.yaml
    assert parser.given["engine_kwargs"] == {"timeout": 3}
    assert TOKEN not in str(parser.given)


def test_a_bad_token_is_found_before_anything_is_computed(hub, config):
    def cost(prompts, completions):
        raise AssertionError("computed")

    with pytest.raises(OSError, match=r"(?s)401.*hf auth login.*HF_TOKEN.*hub_model_id.*leave push_to_hub out"):
        trainer_on(config(push_to_hub=True, hub_token="hf_wrong"), objective=cost)


@pytest.mark.slow
def test_a_token_that_expires_costs_nothing_but_the_push(hub, config, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("aldrift_hf"), "propagate", True)
    args = config(push_to_hub=True, save_strategy="epoch")
    trainer = trainer_on(args)
    hub.expired = True
    trainer.train()
    assert "A push of a checkpoint to the Hub failed" in caplog.text
    with pytest.raises(OSError, match=r"(?s)401.*Nothing that was saved is lost.*hf upload me/out"):
        trainer.save_model()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(trainer.args, "model_init_kwargs", None)
    assert same_log_probs(PeftModel.from_pretrained(tiny_gpt2(), args.output_dir), trainer)


@pytest.mark.slow
def test_a_refused_repository_leaves_the_model_on_disk(hub, config):
    """Where push_to_hub was not set, the Hub is first asked when all is computed."""
    args = config()
    trainer = trainer_on(args)
    trainer.train()
    hub.expired = True
    with pytest.raises(OSError, match=r"(?s)hf auth login.*Nothing that was saved is lost"):
        trainer.push_to_hub()
    assert (Path(args.output_dir) / "adapter_model.safetensors").is_file()
    hub.expired = False
    hub.faults["POST", "repos/create"] = 100
    with pytest.raises(OSError, match="503"):
        trainer.push_to_hub()
    assert hub.faults["POST", "repos/create"] == 93  # asked once, and six times more with waits in between


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["an adapter", "in full"])
def test_a_prior_of_an_older_revision(hub, config, tmp_path, monkeypatch, capsys, tuning):
    """The repository has another model by now, which must not become the prior of the card's code or of a command."""
    base = hub.repositories["me/base"]
    perturbed = tiny_gpt2()
    with torch.no_grad():
        perturbed.transformer.wte.weight.mul_(3)
    perturbed.save_pretrained(tmp_path / "base")
    base.commits.append({path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
    args = config(hub_model_id="me/old", model_init_kwargs={"revision": base.sha(0)})
    trainer = trainer_on(args, **({} if tuning == "an adapter" else {"peft_config": None}))
    trainer.train()
    trainer.push_to_hub()
    monkeypatch.chdir(tmp_path)
    card = hub.repositories["me/old"].files["README.md"].decode()
    check_code(ModelCard(card).text, trainer)
    (tmp_path / "costs.py").write_text("def cost(prompts, completions):\n    return [0.0 for _ in completions]\n")
    parser = RunParser("aldrift sample", "usage", "what it does")
    for run in ("me/old", args.output_dir):
        _, again = runs.load(parser, [run, "--objective", "costs.py:cost"], str(tmp_path / "scratch"))
        assert again.rollout.prior.row_scores.tolist() == trainer.rollout.prior.row_scores.tolist()


@pytest.mark.slow
def test_a_fully_fine_tuned_model_through_the_pipelined_client(hub, config, monkeypatch):
    """The client's other way, with hf_xet: here the commit, too, is made again after a 503."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.lfs = False
    hub.faults["POST", "/commit/"] = 2
    trainer = trainer_on(config(hub_model_id="me/whole"), peft_config=None)
    trainer.train()
    trainer.push_to_hub()
    assert not hub.faults["POST", "/commit/"]
    card = ModelCard(hub.repositories["me/whole"].files["README.md"].decode())
    assert (card.data.library_name, card.data["base_model_relation"]) == ("transformers", "finetune")
    assert same_log_probs(AutoModelForCausalLM.from_pretrained("me/whole"), trainer)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "mine"])
def test_the_frozen_start_of_an_adapter_is_pushed_beside_it(hub, config, tokenizer, name):
    """The prior of a run that trains on from an adapter: without it nothing could be corrected."""
    args = config(push_to_hub=True, hub_model_id="me/on", save_strategy="epoch")
    model = get_peft_model(tiny_gpt2(), lora_config(tiny_gpt2()), adapter_name=name)
    perturb(model, seed=1)
    trainer = trainer_on(args, model=model, processing_class=tokenizer, peft_config=None)
    trainer.train()
    files = hub.repositories["me/on"].files
    assert {"prior/adapter_model.safetensors", "prior/adapter_config.json"} <= set(files)
    trained = "" if name == "default" else "mine/"
    assert files["prior/adapter_model.safetensors"] != files[f"{trained}adapter_model.safetensors"]
    assert f"{trained}adapter_config.json" in files


def test_a_half_written_record_is_not_pushed(monkeypatch, tmp_path):
    """Pushes go on in the background, and may find one."""

    def interrupted(source, target):
        raise InterruptedError

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(InterruptedError):
        RunRecord({}, rungs=[{"rung": 0}], draws=[{"completion": "a"}]).write(tmp_path)
    left = [path.name for path in tmp_path.iterdir()]
    assert left
    assert not [*filter_repo_objects(left, ignore_patterns=["_*", "checkpoint-*"])]  # the Trainer's


def test_each_of_several_runs_has_a_repository_of_its_own(config):
    run = one_of_several(config(hub_model_id="me/steps", hub_token=TOKEN), "step-2")
    assert run.hub_model_id == "me/steps-step-2"
    assert run.hub_token == TOKEN
    assert one_of_several(config(), "step-2").hub_model_id == "out-step-2"


@pytest.mark.slow
def test_a_recipe_on_two_processes_pushes_once(hub, tmp_path, monkeypatch):
    """From its command line; the settings of the client come from the environment."""
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
        "ALDRIFT_CACHE": str(tmp_path / "priors"),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    flags = (
        "--graph florentine-core --prior_steps 20 --tau_max 0.6 --num_generations 64 --updates_per_rung 2 --draws 32"
    )
    flags += f" --push_to_hub True --hub_model_id trees --output_dir {tmp_path / 'out'} --disable_tqdm True"
    done = accelerate_launch(CONFIGS / "multi_cpu.yaml", str(RECIPE), *flags.split())
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(hub.asked("POST", "/api/repos/create")) == 1
    repository = hub.repositories["me/trees"]
    assert repository.messages[-2:] == ["Model save", "End of training"]
    assert len(set(repository.messages)) == len(repository.messages)
    assert RECORD | ADAPTER | {"spanning_tree.png", "spanning_tree.md"} <= set(repository.files)
    card = ModelCard(repository.files["README.md"].decode())
    assert card.data.base_model is None
    assert str(tmp_path) not in str(card)
