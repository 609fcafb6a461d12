"""An objective that runs what the model writes: each completion in its own process, with a timeout and retries.

    accelerate launch recipes/external_objective.py

The prior knows what a small program looks like: a number, a loop, a print. The cost is how far the printed number is
from 42, which can only be found out by running the program. There are two kinds of failure:

- Failures of the text: the program does not end in time, or raises. This is a property of the text, and costs D.
- Failures of the service: no process can be started, or it says "try again later". They say nothing about the text,
  which is evaluated again (with tenacity) after a waiting time that doubles. If the service never answers, training
  stops with the cause, and can be resumed.

A process is not a sandbox: for programs of a large model, start a container instead of Python. POSIX only.
All options of ALDRIFTConfig work, here and in YAML (--config FILE.yaml).
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
from evaluation.sentences import effort_in_words, missing_mass_in_words
from evaluation.tables import Comparison
from peft import LoraConfig
from problems.training import RecipeConfig
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from trl import TrlParser

from aldrift_hf import ALDRIFTTrainer
from aldrift_hf.toy import SmallPriorConfig, small_prior

STARTS = [f"x={n}" for n in range(1, 10)]
LOOPS = [f"while(x<{n}):" for n in range(20, 70, 10)]
STEPS = [*(f"\tx+={n}" for n in range(1, 7)), "\tx-=1", "\tx*=2", "\tx*=3"]
END = "print(x)"
D = 8.0

# The child process reads the program from its standard input. Only an outage makes it exit with EX_TEMPFAIL.
EVALUATOR = """
import os, random, resource, sys
outages, seconds = float(sys.argv[1]), int(sys.argv[2])
if random.random() < outages:
    sys.exit(os.EX_TEMPFAIL)
resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # in case no parent is left to kill it
try:
    exec(sys.stdin.read(), {})
except BaseException:
    sys.exit(1)
"""


class TryLaterError(Exception):
    """A failure of the service."""


PATIENCE = {
    "retry": retry_if_exception_type((TryLaterError, OSError)),
    "wait": wait_random_exponential(multiplier=0.1, max=10),  # up to 0.1 s, 0.2 s, 0.4 s, …
    "stop": stop_after_attempt(8),
    "reraise": True,
}


@dataclass
class Programs:
    """The objective, with the settings of its processes."""

    processes: int = field(default=4, metadata={"help": "Number of programs that run at once."})
    timeout: float = field(default=1.0, metadata={"help": "Seconds after which a program is killed and costs D."})
    outages: float = field(
        default=0.05, metadata={"help": "Share of evaluations that fail on purpose, to show the retries."}
    )

    def __post_init__(self) -> None:
        if self.processes < 1 or self.timeout <= 0 or not 0 <= self.outages < 1:
            raise ValueError("processes must be at least 1, timeout positive, and outages from 0 to less than 1")
        self.counts: Counter = Counter()

    async def __call__(self, prompts: list, completions: list[str]) -> list[float]:
        """The cost of each program: log2(1 + |printed - 42|), at most 7; or 8 if it does not print a number in time."""
        slots = asyncio.Semaphore(self.processes)  # the most that run at a time
        return [cost_of(printed) for printed in await asyncio.gather(*(self.run(text, slots) for text in completions))]

    async def run(self, program: str, slots: asyncio.Semaphore) -> bytes:
        """What a program prints. After failures of the service it is run again; meanwhile it occupies no slot."""
        async for attempt in AsyncRetrying(**PATIENCE):
            with attempt:
                async with slots:
                    return await self.run_once(program)

    async def run_once(self, program: str) -> bytes:
        """What a program prints; nothing if it fails or does not end in time."""
        self.counts["processes"] += 1
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", EVALUATOR, str(self.outages), str(int(self.timeout) + 2)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={},  # no tokens and no passwords
            start_new_session=True,  # its own process group, so that processes it starts are killed as well
        )
        try:
            printed, _ = await asyncio.wait_for(process.communicate(program.encode(errors="replace")), self.timeout)
        except asyncio.TimeoutError:
            self.counts["timed out"] += 1
            return b""
        finally:  # also when training is stopped
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if process.returncode in (os.EX_TEMPFAIL, -signal.SIGKILL):  # the latter if the machine is out of memory
            self.counts["tried again"] += 1
            raise TryLaterError(f"the evaluator exited with {process.returncode} on every attempt")
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


@dataclass
class ExternalArguments:
    """The prior, and what is compared."""

    prior_steps: int = field(default=400, metadata={"help": "Optimizer updates that train the prior."})
    draws: int = field(
        default=512, metadata={"help": "Number of draws of the prior, the model and the chains that are compared."}
    )


def main() -> None:
    parser = TrlParser((ExternalArguments, Programs, RecipeConfig))
    parser.set_defaults(
        output_dir="out/external_objective", sampler="archive", tau_max=2.0, tau_step=0.25, objective_range=D,
        num_generations=512, chain_length=4, max_completion_length=6, per_device_generation_batch_size=256,
        updates_per_rung=50, learning_rate=3e-3, lr_scheduler_type="warmup_stable_decay",
    )  # fmt: skip
    options, programs, config = parser.parse_args_and_config()
    words = [*STARTS, *LOOPS, *STEPS, END]
    model, tokenizer = small_prior(words, "\n", random_programs, SmallPriorConfig(steps=options.prior_steps))
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear", fan_in_fan_out=True)
    trainer = ALDRIFTTrainer(model, programs, config, processing_class=tokenizer, peft_config=lora)
    # With chains of length 1, samples are uncorrected draws of the model, which is the prior before training.
    draws = {"prior": trainer.sample(options.draws, chain_length=1)}
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    draws |= {"model": trainer.sample(options.draws, chain_length=1), "corrected": trainer.sample(options.draws)}
    if trainer.is_world_process_zero():
        report(draws, Path(config.output_dir))
        print(effort_in_words(trainer.record.rungs[-1]))
        print(", ".join(f"{programs.counts[what]:,} {what}" for what in ("processes", "tried again", "timed out")))
        print(missing_mass_in_words(trainer.record.metrics))
    if config.push_to_hub:
        trainer.push_to_hub()  # again, now with the table


def report(draws: dict[str, Dataset], folder: Path) -> None:
    """Print and write the table, and print one of the programs."""
    costs = {name: np.array(sample["objective"]) for name, sample in draws.items()}
    right = {name: set(np.array(sample["completion"])[costs[name] == 0]) for name, sample in draws.items()}
    table = Comparison(f"{len(costs['model']):,} draws each", list(draws))
    table.add("print 42", {name: (cost == 0).mean() for name, cost in costs.items()}, ".3f")
    table.add("fail or do not end in time", {name: (cost == D).mean() for name, cost in costs.items()}, ".3f")
    table.add("mean cost", {name: cost.mean() for name, cost in costs.items()})
    table.add("distinct programs that print 42", {name: len(texts) for name, texts in right.items()}, ",d")
    table.print()
    table.write_markdown(folder / "external_objective.md")
    print(f"one of them:\n{min(right['corrected'], default='none')}")


if __name__ == "__main__":
    main()
