"""An objective that runs what the model writes: each completion in a process of its own, with a time-out and retries.

    accelerate launch recipes/external_objective.py

The prior knows what a small program looks like: a number, a loop, a print. What it prints, if it ends at all, only
running it tells; the cost is how far that is from 42. Two kinds of failure are kept apart:

- the text's: it does not end in time, or raises. That is a property of the text, and costs D.
- the service's: no process to be had, "try again later". That says nothing of the text, which is tried again after a
  wait that doubles (tenacity). If it never answers, training stops with the cause, and can be resumed.

A process is no sandbox: for programs of a large model, start a container where this starts Python. POSIX only.
Every option of ALDRIFTConfig works, here and in YAML (--config FILE.yaml).
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections import Counter
from dataclasses import dataclass, field
from math import log2
from pathlib import Path

import numpy as np
from datasets import Dataset
from evaluation.recipe import RecipeConfig
from evaluation.reports import effort_in_words, missing_mass_in_words
from evaluation.tables import Comparison
from peft import LoraConfig
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from trl import TrlParser

from aldrift_hf import ALDRIFTTrainer
from aldrift_hf.toy import SmallPriorConfig, small_prior

STARTS = [f"x={n}" for n in range(1, 10)]
LOOPS = [f"while(x<{n}):" for n in range(20, 70, 10)]
STEPS = [*(f"\tx+={n}" for n in range(1, 7)), "\tx-=1", "\tx*=2", "\tx*=3"]
END = "print(x)"
D = 8.0

# The child reads the program from its standard input. None of these lines makes it exit with EX_TEMPFAIL.
EVALUATOR = """
import os, random, resource, sys
outages, seconds = float(sys.argv[1]), int(sys.argv[2])
if random.random() < outages:
    sys.exit(os.EX_TEMPFAIL)
resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # should nobody be left to kill it
try:
    exec(sys.stdin.read(), {})
except BaseException:
    sys.exit(1)
"""


class TryLaterError(Exception):
    """The service's fault."""


PATIENCE = {
    "retry": retry_if_exception_type((TryLaterError, OSError)),
    "wait": wait_random_exponential(multiplier=0.1, max=10),  # up to 0.1 s, 0.2 s, 0.4 s, …
    "stop": stop_after_attempt(8),
    "reraise": True,
}


@dataclass
class Programs:
    """The objective, and the settings of what runs behind it."""

    processes: int = field(default=4, metadata={"help": "Programs that run at once."})
    timeout: float = field(default=1.0, metadata={"help": "Seconds after which a program is killed, and costs D."})
    outages: float = field(default=0.05, metadata={"help": "Share of evaluations that fail on purpose, to be retried."})

    def __post_init__(self) -> None:
        if self.processes < 1 or self.timeout <= 0 or not 0 <= self.outages < 1:
            raise ValueError("processes must be at least 1, timeout positive, and outages from 0 to less than 1")
        self.counts: Counter = Counter()

    async def __call__(self, prompts: list, completions: list[str]) -> list[float]:
        """The cost of each: log2(1 + |printed - 42|), 7 at most, and 8 where no number is printed in time."""
        slots = asyncio.Semaphore(self.processes)  # not kept: every batch has an event loop of its own
        return [cost_of(printed) for printed in await asyncio.gather(*(self.run(text, slots) for text in completions))]

    async def run(self, program: str, slots: asyncio.Semaphore) -> bytes:
        """What a program prints; asked again where the service is at fault, and without a slot while it waits."""
        async for attempt in AsyncRetrying(**PATIENCE):
            with attempt:
                async with slots:
                    return await self.run_once(program)

    async def run_once(self, program: str) -> bytes:
        """What a program prints; nothing, if it does not end in time or fails."""
        self.counts["processes"] += 1
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", EVALUATOR, str(self.outages), str(int(self.timeout) + 2)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={},  # tokens and passwords are none of its business
            start_new_session=True,  # a group of its own, to be killed with all that it started
        )
        try:
            printed, _ = await asyncio.wait_for(process.communicate(program.encode(errors="replace")), self.timeout)
        except asyncio.TimeoutError:
            self.counts["timed out"] += 1
            return b""
        finally:  # also where training is stopped
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if process.returncode in (os.EX_TEMPFAIL, -signal.SIGKILL):  # the latter: the machine is out of memory
            self.counts["tried again"] += 1
            raise TryLaterError(f"the evaluator ended with {process.returncode}, again and again")
        return printed if process.returncode == 0 else b""


def cost_of(printed: bytes) -> float:
    try:
        return min(7.0, log2(1 + abs(int(printed) - 42)))
    except ValueError:
        return D


def random_programs(count: int, rng: np.random.Generator) -> list[str]:
    starts, loops, steps = rng.choice(STARTS, count), rng.choice(LOOPS, count), rng.choice(STEPS, (count, 2))
    lengths = rng.integers(1, 3, count)
    return ["\n".join([a, b, *body[:n], END]) for a, b, body, n in zip(starts, loops, steps, lengths)]


def main() -> None:
    parser = TrlParser((Programs, RecipeConfig))
    parser.set_defaults(
        output_dir="out/external_objective", sampler="archive", tau_max=2.0, tau_step=0.25, objective_range=D,
        num_chains=128, chain_length=4, max_completion_length=6, generation_batch_size=256, updates_per_rung=50,
        learning_rate=3e-3, lr_scheduler_type="warmup_stable_decay",
    )  # fmt: skip
    programs, config = parser.parse_args_and_config()
    words = [*STARTS, *LOOPS, *STEPS, END]
    model, tokenizer = small_prior(words, "\n", random_programs, SmallPriorConfig(steps=400))
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear", fan_in_fan_out=True)
    trainer = ALDRIFTTrainer(model, programs, config, processing_class=tokenizer, peft_config=lora)
    # Chains of one step are plain draws of the model, which before training is the prior.
    draws = {"prior": trainer.sample(512, chain_length=1)}
    result = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    draws |= {"model": trainer.sample(512, chain_length=1), "corrected": trainer.sample(512)}
    if trainer.is_world_process_zero():
        report(draws, Path(config.output_dir))
        print(effort_in_words(trainer.progress.records[-1]))
        print(", ".join(f"{programs.counts[what]:,} {what}" for what in ("processes", "tried again", "timed out")))
        print(missing_mass_in_words(result.metrics.get("final_missing_mass")))
    if config.push_to_hub:
        trainer.push_to_hub()  # once more, with the table


def report(draws: dict[str, Dataset], folder: Path) -> None:
    """The table, and one of the programs."""
    costs = {name: np.array(sample["objective"]) for name, sample in draws.items()}
    right = {name: set(np.array(sample["completion"])[costs[name] == 0]) for name, sample in draws.items()}
    table = Comparison("512 draws each", list(draws))
    table.add("print 42", {name: (cost == 0).mean() for name, cost in costs.items()}, ".3f")
    table.add("do not end in time, or fail", {name: (cost == D).mean() for name, cost in costs.items()}, ".3f")
    table.add("mean cost", {name: cost.mean() for name, cost in costs.items()})
    table.add("distinct programs that print 42", {name: len(texts) for name, texts in right.items()}, ",d")
    table.print()
    table.write_markdown(folder / "external_objective.md")
    print(f"one of them:\n{min(right['corrected'], default='none')}")


if __name__ == "__main__":
    main()
