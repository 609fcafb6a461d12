"""Tiny models and tokenizers on which everything can be enumerated."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of what tests launch: see _one_thread

import pytest
import torch
from hypothesis import HealthCheck, settings
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers import logging as transformers_logging

import aldrift_hf
from aldrift_hf import ALDRIFTConfig
from aldrift_hf.algorithm.ladders.linear import linear_ladder
from aldrift_hf.models.prior import base_model
from aldrift_hf.models.scoring import inference, sequence_logprobs
from aldrift_hf.reporting.writers import ReportWriter
from aldrift_hf.selftest import exact
from aldrift_hf.toy import word_tokenizer
from aldrift_hf.types import Completions, Proposals

transformers_logging.set_verbosity_error()
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs in the background without it
transformers_logging.disable_progress_bar()
gc.freeze()  # what the packages made stays: each collection would look through half a million objects in vain

WORDS = ["a", "b", "c"]
VOCABULARY = 5  # end of text, unknown, and the three words
EOS = 0
MAX_LENGTH = 3


REPEATABLE = {"database": None, "deadline": None, "print_blob": True}
settings.register_profile("suite", derandomize=True, **REPEATABLE)
settings.register_profile("fuzz", max_examples=10_000, **REPEATABLE)
settings.load_profile("suite")  # `--hypothesis-profile` is read later


def fuzz(examples: int) -> settings:
    """So many examples, the same in every run of the suite; with `--hypothesis-profile fuzz` 100 times as many, new."""
    thorough = settings.default.max_examples // 100
    return settings(max_examples=thorough * examples, suppress_health_check=list(HealthCheck))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: last, it would leave one worker idle, or be set up on both."""
    items.sort(key=lambda item: item.path.name != "test_killed.py")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Models this small spend their time on waking threads up."""
    torch.set_num_threads(1)


class ALDRIFTTrainer(aldrift_hf.ALDRIFTTrainer):
    """Without the report: it takes two seconds to draw, and those of most runs here are not looked at."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(ReportWriter)


def printed_by_two_processes(source: str) -> list[str]:
    """What a program prints in two processes in which texts have other hashes, and sets another order."""
    processes = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", source]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    return [process.communicate()[0] for process in processes]


@pytest.fixture
def no_report(monkeypatch) -> None:
    """For commands and recipes that make their trainers themselves: nothing is drawn."""
    monkeypatch.setattr("aldrift_hf.reporting.report.write_report", lambda *args: None)


@pytest.fixture(scope="session")
def priors(tmp_path_factory) -> Path:
    """The folder of the priors, which are trained once for all pages, and by one of the test processes."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "priors"


@pytest.fixture
def tokenizer():
    return word_tokenizer(WORDS, " ")


def tiny_gpt2(seed: int = 0, dropout: float = 0.0, **overrides) -> GPT2LMHeadModel:
    """Sharp enough that its distribution is far from uniform."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCABULARY,
        "n_positions": 16,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "resid_pdrop": dropout,
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
        "initializer_range": 0.3,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
    }
    return GPT2LMHeadModel(GPT2Config(**{**config, **overrides})).eval()


def tiny_llama(seed: int = 0, dropout: float = 0.0, **overrides) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 16,
        "attention_dropout": dropout,
        "initializer_range": 0.3,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "pad_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**config | overrides)).eval()


def lora(model: PreTrainedModel, dropout: float = 0.0, seed: int | None = None, scale: float = 0.3):
    """`model` with LoRA; with a seed, weights that move its distribution away from the base model's."""
    peft_model = get_peft_model(model, lora_config(model, dropout))
    if seed is not None:
        perturb(peft_model, seed, scale)
    return peft_model.eval()


def lora_config(model: PreTrainedModel, dropout: float = 0.0) -> LoraConfig:
    gpt2 = model.config.model_type == "gpt2"
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules=["c_attn", "c_fc"] if gpt2 else ["q_proj", "v_proj", "up_proj"],
        fan_in_fan_out=gpt2,
    )


def perturb(model: torch.nn.Module, seed: int = 0, scale: float = 0.3) -> None:
    """Move the trainable parameters: a policy that is not the prior."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += (
                    scale * torch.randn(parameter.shape, generator=generator) * (0.5 if parameter.dim() > 1 else 0)
                )


every_completion = functools.partial(exact.every_completion, length=MAX_LENGTH, vocabulary=VOCABULARY, eos=(EOS,))


def log_probs(model: torch.nn.Module, prompt: list[int], completions: Completions) -> torch.Tensor:
    """Log-probabilities of `completions` after one prompt."""
    with inference(model):
        return sequence_logprobs(
            model, [prompt] * len(completions.length), completions, pad_token_id=EOS, batch_size=64
        )


def exact_target(tokenizer) -> tuple[torch.Tensor, float]:
    """`log p_T` of every completion for the tests' cost at T = 1.5, with `tiny_gpt2` as prior, and `log Z_T`, nats."""
    completions = every_completion()
    cost = torch.tensor(count_a([], tokenizer.batch_decode(completions.tokens(), skip_special_tokens=True)))
    log_weight = log_probs(tiny_gpt2(), [EOS], completions) - 1.5 * cost
    return log_weight.log_softmax(0), log_weight.logsumexp(0).item()


def exact_kl(log_p: torch.Tensor, model: torch.nn.Module) -> float:
    """`KL(p‖q)` of a model's law, nats; `log_p` of every completion."""
    return (log_p.exp() * (log_p - log_probs(base_model(model), [EOS], every_completion()))).sum().item()


def count_a(prompts: list, completions: list[str], **columns) -> list[float]:
    """The tests' cost: words that are not `a`, in [0, 3]."""
    return [float(sum(word != "a" for word in text.split())) for text in completions]


@pytest.fixture
def chat_model(tokenizer, tmp_path) -> Path:
    """The folder of a small model with a chat template."""
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    for part in (tiny_gpt2(n_positions=64), tokenizer):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def config(tmp_path) -> Callable[..., ALDRIFTConfig]:
    """Settings for a quick run to T and no further; keyword arguments change them."""

    def make(**changes) -> ALDRIFTConfig:
        settings = {
            "output_dir": str(tmp_path / "out"),
            "tau_max": 1.5,
            "objective_range": 3.0,
            "tau_step": 0.5,
            "sampler": "metropolis_hastings",
            "num_generations": 64,
            "chain_length": 4,
            "max_completion_length": MAX_LENGTH,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "updates_per_rung": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "disable_tqdm": True,
            "use_cpu": True,
            "save_strategy": "no",
        }
        batch = max(32, changes.get("num_generations", 64) // 8)
        settings |= {"per_device_generation_batch_size": batch, **changes}
        if "num_rungs" not in changes and settings.get("ladder", "linear") == "linear":
            with contextlib.suppress(ValueError, TypeError, ZeroDivisionError):  # settings that are to be refused
                step = settings["tau_step"] or 1 / settings["objective_range"]
                settings["num_rungs"] = len(linear_ladder(settings["tau_max"], step))
        return ALDRIFTConfig(**settings)

    return make


CONFIGS = Path(__file__).parents[1] / "accelerate_configs"


def accelerate_launch(config: Path, *what: str) -> subprocess.CompletedProcess:
    """Runs `accelerate launch` with a config file: flags of its own first, then a script (or `-m` and a module)."""
    how = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    how += ["--main_process_port", str(free_port())]
    return subprocess.run([*how, *what], capture_output=True, text=True, timeout=300)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def recipe_module(monkeypatch) -> Callable[[str], ModuleType]:
    """A recipe as a module, by name."""

    def load(name: str) -> ModuleType:
        path = Path(__file__).parents[1] / "recipes" / f"{name}.py"
        spec = util.spec_from_file_location(f"{name}_recipe", path)
        module = util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def run_recipe(tmp_path, monkeypatch, recipe_module, no_report) -> Callable[..., Path]:
    """Runs a recipe's `main` in this process, with the flags and settings given; returns its output directory."""

    def run(name: str, *flags: str, **settings) -> Path:
        module = recipe_module(name)
        monkeypatch.setenv("ALDRIFT_CACHE", str(tmp_path / "cache"))
        settings = {"output_dir": tmp_path / "out", **settings}
        line = [text for key, value in settings.items() for text in (f"--{key}", *str(value).split())]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *line, *flags])
        module.main()
        return Path(settings["output_dir"])

    return run


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright  # not in the environment of vLLM

    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        installed = map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))
        found = next((path for path in (own if own.exists() else None, *installed) if path), None)
        if found is None:
            pytest.skip("no Chromium found: apt-get install chromium-headless-shell, or playwright install chromium")
        with playwright.chromium.launch(executable_path=found) as chromium:
            yield chromium


def pool_of(cost: torch.Tensor, log_prior: torch.Tensor) -> Proposals:
    """Draws of a prior for each prompt, `[prompts, n]`, each a text of one token of its own."""
    shape, n = cost.shape, cost.numel()
    completions = Completions(torch.arange(n)[:, None], torch.ones(n, dtype=torch.long))
    rows = torch.arange(shape[0]).repeat_interleave(shape[1])
    return Proposals(rows, completions, cost, log_prior, torch.zeros(shape, dtype=torch.float64))
