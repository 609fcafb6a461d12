"""What does a long prompt cost? A rung of a real chat model, in which a prompt is computed once for all completions.

    python recipes/long_prompts.py

For prompts of several lengths, each in a process of its own, on one thread: a rung of ALDRIFTTrainer (draws, scores and
updates), the same rung with every copy of the prompt computed, and as many completions and updates of TRL's RLOO
trainer. CPU seconds per proposal, and the process's largest resident memory. Figures that are known are kept in
--output_dir, so that the command can be run again.

The model is SmolLM2-135M-Instruct, made from a package on PyPI; --model_name_or_path takes any. Where every copy of a
long prompt is computed a proposal takes a minute, so --proposals_apart are fewer than --proposals.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from evaluation.kept_runs import check_same
from trl import TrlParser

METHODS = ("shared", "apart", "rloo")
BATCH = 32


@dataclass
class LongPromptArguments:
    """What is measured."""

    lengths: list[int] = field(default_factory=lambda: [40, 500, 2000], metadata={"help": "Tokens of the prompt."})
    proposals: list[int] = field(
        default_factory=lambda: [256, 128, 128], metadata={"help": "Proposals of a rung, for each length."}
    )
    proposals_apart: list[int] = field(
        default_factory=lambda: [256, 16, 4],
        metadata={"help": "The same where every copy of the prompt is computed, and for RLOO."},
    )
    max_completion_length: int = field(default=32, metadata={"help": "Largest number of tokens per completion."})
    model_name_or_path: Optional[str] = field(default=None, metadata={"help": "None: SmolLM2-135M-Instruct."})
    dtype: str = field(default="float32", metadata={"help": "Precision of the weights."})
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Compute layers again in the backward pass, as TRL's trainers do by default."}
    )
    output_dir: str = field(default="out/long_prompts", metadata={"help": "Folder of figures and table."})
    one: Optional[str] = field(default=None, metadata={"help": "Only for the command itself: measure this, now."})

    def __post_init__(self) -> None:
        if not len(self.lengths) == len(self.proposals) == len(self.proposals_apart):
            raise ValueError("--lengths, --proposals and --proposals_apart need equally many numbers")


def cost(completions, **kwargs):
    return [min(len(text) / 200, 1.0) for text in completions]


def measure(method: str, length: int, proposals: int, options: LongPromptArguments) -> dict[str, float]:
    """A rung of one method, in this process."""
    import torch
    from peft import LoraConfig
    from problems.real_model import real_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    path = options.model_name_or_path or str(real_model())
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=options.dtype)
    text = tokenizer.decode(tokenizer("It was a Tuesday in May, and it rained. " * length).input_ids[:length])
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    with tempfile.TemporaryDirectory() as folder:
        make = rloo if method == "rloo" else aldrift
        trainer = make(model, tokenizer, text, lora, folder, proposals, options)
        if method == "apart":
            from aldrift_hf.models.shared_prompts import cache, packing

            cache.MIN_PROMPT, packing.MAX_SHARE = 2**62, 0.0
        began = time.process_time()
        trainer.train()
        seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds / proposals, "memory": peak, "proposals": proposals}


def aldrift(model, tokenizer, text, lora, folder, proposals, options):
    """A trainer for one rung, with as many rows learned as drawn."""
    from aldrift_hf import ALDRIFTConfig, ALDRIFTTrainer

    batch = min(BATCH, proposals)
    args = ALDRIFTConfig(
        folder, tau_max=1.0, objective_range=1.0, tau_step=1.0, num_rungs=1, num_generations=proposals,
        chain_length=1, max_objective_calls=proposals, updates_per_rung=proposals // batch,
        per_device_train_batch_size=batch, max_completion_length=options.max_completion_length,
        per_device_generation_batch_size=proposals, learning_rate=1e-4, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True, gradient_checkpointing=options.gradient_checkpointing,
    )  # fmt: skip
    return ALDRIFTTrainer(
        model, lambda prompts, completions: cost(completions), args, train_dataset=[text], processing_class=tokenizer,
        peft_config=lora,
    )  # fmt: skip


def rloo(model, tokenizer, text, lora, folder, proposals, options):
    """TRL's trainer for one batch of completions, learned once."""
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    batch = min(BATCH, proposals)
    args = RLOOConfig(
        folder, beta=1.0, num_generations=proposals, per_device_train_batch_size=batch,
        steps_per_generation=proposals // batch, max_steps=proposals // batch,
        max_completion_length=options.max_completion_length, temperature=1.0, top_k=0, learning_rate=1e-4, bf16=False,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        gradient_checkpointing=options.gradient_checkpointing,
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": [text] * proposals})
    return RLOOTrainer(
        model, lambda completions, **kwargs: [-value for value in cost(completions)], args, train_dataset=rows,
        processing_class=tokenizer, peft_config=lora,
    )  # fmt: skip


def in_a_process(method: str, length: int, proposals: int, options: LongPromptArguments) -> dict[str, float]:
    """The figures of one method: kept ones, or measured in a process of its own."""
    about = (method, length, proposals, options.max_completion_length, options.dtype, options.gradient_checkpointing)
    kept = Path(options.output_dir) / ("_".join(map(str, about)) + ".json")
    model = {"model_name_or_path": options.model_name_or_path}
    if not kept.exists():
        command = [
            sys.executable, __file__, "--one", f"{method}:{length}:{proposals}", "--dtype", options.dtype,
            "--max_completion_length", str(options.max_completion_length),
            "--gradient_checkpointing", str(options.gradient_checkpointing),
            *(["--model_name_or_path", options.model_name_or_path] if options.model_name_or_path else []),
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{method}, {length} tokens: ended with {done.returncode}\n{done.stderr}")
        kept.write_text(json.dumps(json.loads(done.stdout.strip().splitlines()[-1]) | {"settings": model}))
    figures: dict[str, Any] = json.loads(kept.read_text())
    check_same(kept, figures.pop("settings", {}), model)
    return figures


def main() -> None:
    try:
        (options,) = TrlParser(LongPromptArguments).parse_args_and_config()
    except ValueError as error:
        sys.exit(str(error))
    if options.one is not None:
        method, length, proposals = options.one.split(":")
        print(json.dumps(measure(method, int(length), int(proposals), options)))
        return
    from evaluation.tables import Comparison

    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    columns = [f"{length} tokens" for length in options.lengths]
    figures = {method: [] for method in METHODS}
    for length, many, few in zip(options.lengths, options.proposals, options.proposals_apart, strict=True):
        for method in METHODS:
            figures[method].append(in_a_process(method, length, many if method == "shared" else few, options))
            print(f"{length} tokens, {method}:", {name: round(value, 2) for name, value in figures[method][-1].items()})
    table = Comparison("a rung with prompts of", columns)
    for method, name in zip(METHODS, ("prompt once", "every copy", "TRL's RLOO"), strict=True):
        table.add(f"{name}: proposals", dict(zip(columns, (figure["proposals"] for figure in figures[method]))), ".0f")
        table.add(f"{name}: s per proposal", dict(zip(columns, (figure["seconds"] for figure in figures[method]))))
        table.add(f"{name}: memory, MiB", dict(zip(columns, (figure["memory"] for figure in figures[method]))), ".0f")
    for method, name in (("apart", "every copy"), ("rloo", "TRL's RLOO")):
        ratios = [one["seconds"] / other["seconds"] for one, other in zip(figures[method], figures["shared"])]
        table.add(f"{name} / prompt once: time", dict(zip(columns, ratios)))
    table.print()
    table.write_markdown(Path(options.output_dir) / "long_prompts.md")


if __name__ == "__main__":
    main()
