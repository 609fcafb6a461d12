"""What a rung costs with 100, 1,000 and 10,000 prompts, when it draws for 16 of them.

    python recipes/prompt_scaling.py

A prompt is a number, a completion five letters, and the model is small and untrained: its arithmetic does not hide what
grows with the number of prompts. Each size is run in a process of its own, for as many rungs, with --prompts_per_rung
and, at the smallest sizes, with all prompts on every rung. Seconds are CPU seconds per rung, the first one left out;
memory is what the run adds to the process. The growth exponent is the slope of their logarithms from the second largest
size to the largest: 0 for no growth, 1 for growth in proportion.
"""

import json
import math
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from evaluation.tables import Comparison
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, TrainerCallback
from trl import TrlParser

from aldrift_hf import ALDRIFTConfig, ALDRIFTTrainer
from aldrift_hf.reporting.writers import ReportWriter
from aldrift_hf.toy import word_tokenizer

LETTERS, DIGITS, LENGTH = "abcdefgh", "0123456789", 5


@dataclass
class ScalingArguments:
    """What is measured."""

    prompts: list[int] = field(default_factory=lambda: [100, 1000, 10000], metadata={"help": "Numbers of prompts."})
    all_up_to: int = field(default=1000, metadata={"help": "Up to so many, also with all prompts on every rung."})
    prompts_per_rung: int = field(default=16, metadata={"help": "Prompts of a rung."})
    proposals: int = field(default=8, metadata={"help": "Proposals per prompt per rung."})
    rungs: int = field(default=6, metadata={"help": "Rungs of a run."})
    output_dir: str = field(default="out/prompt_scaling", metadata={"help": "Folder of the table."})
    one: Optional[str] = field(default=None, metadata={"help": "Only for the command itself: run this size, now."})


class RungEnds(TrainerCallback):
    """CPU time at the end of each rung. Its first draws come before any other callback hears of a rung's beginning."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time())


def cost(prompts: list[str], completions: list[str]) -> list[float]:
    """The number of letters that are not `a`."""
    return [float(sum(word != "a" for word in text.split())) for text in completions]


def run(prompts: int, some: bool, options: ScalingArguments) -> dict[str, float]:
    """CPU seconds per rung and memory (MiB) of one size."""
    torch.set_num_threads(1)
    tokenizer = word_tokenizer([*LETTERS, *DIGITS], " ")
    size = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": len(tokenizer)}
    config = ALDRIFTConfig(
        str(Path(options.output_dir) / "run"), tau_max=1.0, objective_range=float(LENGTH), num_rungs=options.rungs,
        num_generations=options.proposals, prompts_per_rung=options.prompts_per_rung if some else None,
        max_completion_length=LENGTH, updates_per_rung=20, per_device_train_batch_size=32, learning_rate=1e-3,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, log_level="error",
        per_device_generation_batch_size=1024,
    )  # fmt: skip
    before = _resident()
    trainer = ALDRIFTTrainer(
        GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0)), cost, config,
        train_dataset=[" ".join(f"{number:05d}") for number in range(prompts)], processing_class=tokenizer,
    )  # fmt: skip
    for callback in (PrinterCallback, ReportWriter):
        trainer.remove_callback(callback)
    ends = RungEnds()
    trainer.add_callback(ends)
    trainer.train()
    per_rung = (ends.seconds[-1] - ends.seconds[0]) / (len(ends.seconds) - 1)
    return {"CPU seconds per rung": per_rung, "memory, MiB": _resident() - before}


def _resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_child(prompts: int, some: bool, options: ScalingArguments) -> dict[str, float]:
    """The figures of a size, from a process of its own."""
    given = [part for name, value in vars(options).items() if name not in ("one", "prompts")
             for part in (f"--{name}", str(value))]  # fmt: skip
    command = [sys.executable, __file__, *given, "--one", f"{prompts}:{int(some)}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{prompts} prompts: ended with {done.returncode}")
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def main() -> None:
    (options,) = TrlParser(ScalingArguments).parse_args_and_config()
    if options.one is not None:
        prompts, some = map(int, options.one.split(":"))
        print(json.dumps(run(prompts, bool(some), options)))
        return
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    columns = [f"{size:,} prompts" for size in options.prompts]
    table = Comparison(f"a rung of {options.proposals} proposals per prompt", [*columns, "growth exponent"])
    for some, label in ((True, f"{options.prompts_per_rung} prompts per rung"), (False, "all prompts")):
        sizes = [size for size in options.prompts if some or size <= options.all_up_to]
        runs = {size: in_a_child(size, some, options) for size in sizes}
        for name in next(iter(runs.values()), {}):
            cells = {f"{size:,} prompts": figures[name] for size, figures in runs.items()}
            last = [runs[size][name] for size in sizes[-2:]]
            if len(last) == 2 and min(last) > 0:
                cells["growth exponent"] = math.log(last[1] / last[0]) / math.log(sizes[-1] / sizes[-2])
            table.add(f"{label}: {name}", cells, ".3g")
    table.print()
    table.write_markdown(folder / "prompt_scaling.md")


if __name__ == "__main__":
    main()
