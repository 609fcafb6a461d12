"""How many completions at once fit into how much memory: a rung of a real chat model under limits.

    python recipes/memory.py

Nothing is said of the batch size (--per_device_generation_batch_size is unset): the trainer estimates what drawing and
scoring need, and finds out what is free. Every limit is tried in a process of its own, twice: in a control group, whose
memory the kernel enforces by killing it, and with `ulimit -v`, under which an allocation fails. Groups can be made by
root alone. Rows that are done are kept in --output_dir, so that the command can be run again.

The model is SmolLM2-135M-Instruct, made from a package on PyPI; --model_name_or_path takes any.
"""

import json
import math
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import psutil
import torch
from evaluation.kept_runs import check_same, settings_of
from evaluation.tables import Comparison
from peft import LoraConfig
from problems.real_model import real_model
from transformers import PrinterCallback, TrainerCallback
from trl import TrlParser

from aldrift_hf import ALDRIFTConfig, ALDRIFTTrainer
from aldrift_hf.models.memory import free_memory
from aldrift_hf.reporting.writers import ReportWriter

GIB = 2**30
CHAT = [{"role": "user", "content": "Write a one-sentence review of a restaurant."}]


@dataclass
class MemoryArguments:
    """What is run under which limits."""

    limits_gib: list[float] = field(default_factory=lambda: [2.0, 8.0, 24.0], metadata={"help": "Limits, GiB."})
    ways: list[str] = field(
        default_factory=lambda: ["group", "ulimit"], metadata={"help": "How a limit is set: group, ulimit, or none."}
    )
    model_name_or_path: Optional[str] = field(default=None, metadata={"help": "None: SmolLM2-135M-Instruct."})
    dtype: str = field(default="float32", metadata={"help": "Precision of its weights."})
    proposals: int = field(default=256, metadata={"help": "Proposals of the rung."})
    prompt_tokens: int = field(default=40, metadata={"help": "Least number of tokens of the prompt."})
    max_completion_length: int = field(default=32, metadata={"help": "Tokens per completion."})
    output_dir: str = field(default="out/memory", metadata={"help": "Folder of the table, and of rows that are done."})
    one: Optional[str] = field(default=None, metadata={"help": "Only for the command itself: run this row, now."})

    def __post_init__(self) -> None:
        if unknown := {*self.ways} - {"group", "ulimit", "none"}:
            raise ValueError(f"--ways {' '.join(sorted(unknown))}: choose from group, ulimit and none")


def cost(prompts, completions):
    return [min(len(text) / 200, 1.0) for text in completions]


class Peak(TrainerCallback):
    """The largest resident memory of this process, GiB, when the first update begins."""

    drawing = math.inf

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.drawing = min(self.drawing, resident_at_most())


def resident_at_most() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def rung(options: MemoryArguments) -> dict[str, float]:
    """A rung, from the model's first draw to its last update."""
    args = ALDRIFTConfig(
        str(Path(options.output_dir) / f"run_{options.one}"), tau_max=1.0, objective_range=1.0, tau_step=1.0,
        num_generations=options.proposals, max_objective_calls=options.proposals, updates_per_rung=1,
        max_completion_length=options.max_completion_length, per_device_train_batch_size=1,
        gradient_accumulation_steps=32, learning_rate=1e-4, model_init_kwargs={"dtype": options.dtype},
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, log_level="error",
    )  # fmt: skip
    trainer = ALDRIFTTrainer(
        options.model_name_or_path or str(real_model()), cost, args, train_dataset=[lengthened(options)],
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"),
    )  # fmt: skip
    for callback in (PrinterCallback, ReportWriter):
        trainer.remove_callback(callback)
    peak = Peak()
    trainer.add_callback(peak)
    before, free = psutil.Process().memory_info().rss / GIB, free_memory(torch.device("cpu")) / GIB
    trainer.train()
    (figures,) = trainer.record.rungs
    return {
        "free before, GiB": free,
        "completions at once": trainer.rollout.batches.size,
        "resident before, GiB": before,
        "resident at most, drawing and scoring, GiB": peak.drawing,
        "resident at most, learning too, GiB": resident_at_most(),
        "drawing and scoring, s": figures["seconds_propose"] + figures["seconds_score"],
    }


def lengthened(options: MemoryArguments):
    """The prompt, a chat message of about 40 tokens with its template, made longer by words."""
    words = " ".join(["It was a Tuesday in May."] * ((options.prompt_tokens - 40) // 7))
    return [{"role": "user", "content": f"{words} {CHAT[0]['content']}".strip()}]


@contextmanager
def limited(way: str, gib: float):
    """A context with the memory group that a child joins, if `way` asks for one; `None` otherwise.

    Raises:
        OSError: where no group can be made.
    """
    if way != "group":
        yield None
        return
    root, file = next(
        ((root, file) for root, file in (("/sys/fs/cgroup", "memory.max"),
                                         ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"))
         if (Path(root) / "cgroup.procs").exists()),
        (None, None),
    )  # fmt: skip
    if root is None:
        raise OSError("there are no control groups here")
    group = Path(root) / f"aldrift_memory_{os.getpid()}"
    group.mkdir()
    try:
        (group / file).write_text(str(int(gib * GIB)))
        yield group
    finally:
        group.rmdir()


def in_a_child(way: str, gib: float, options: MemoryArguments) -> dict:
    """The figures of a row, or the last line that its process printed."""
    with limited(way, gib) as group:

        def confine() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))
            if way == "ulimit":
                resource.setrlimit(resource.RLIMIT_AS, (int(gib * GIB),) * 2)

        given = [part for name, value in vars(options).items() if name not in ("one", "limits_gib", "ways") and value
                 for part in (f"--{name}", str(value))]  # fmt: skip
        command = [sys.executable, __file__, *given, "--one", f"{way}_{gib:g}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=confine, env=environment)
    lines = done.stdout.strip().splitlines() if done.returncode == 0 else done.stderr.strip().splitlines()
    if done.returncode == 0:
        return json.loads(lines[-1])
    return {"error": f"ended with {done.returncode}: {lines[-1] if lines else 'killed'}"}


def main() -> None:
    try:
        (options,) = TrlParser(MemoryArguments).parse_args_and_config()
    except ValueError as error:
        sys.exit(str(error))
    if options.one is not None:
        print(json.dumps(rung(options)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the group is removed
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    for way in options.ways:
        for gib in options.limits_gib:
            kept, settings = folder / f"{way}_{gib:g}.json", settings_of(options)
            if not kept.exists():
                try:
                    kept.write_text(json.dumps(in_a_child(way, gib, options) | {"settings": settings}))
                except OSError as error:
                    print(f"{way}, {gib:g} GiB: {error}")
                    continue
            row = rows[f"{gib:g} GiB, {way}"] = json.loads(kept.read_text())
            check_same(kept, row.pop("settings", {}), settings)
            print(f"{way}, {gib:g} GiB:", row.get("error") or {name: round(value, 2) for name, value in row.items()})
    names = list(dict.fromkeys(name for row in rows.values() for name in row if name != "error"))
    table = Comparison(f"a rung of {options.proposals} proposals under limits of memory", list(rows))
    for name in names:
        table.add(name, {label: row[name] for label, row in rows.items() if name in row}, ".3g")
    table.print()
    table.write_markdown(folder / "memory.md")


if __name__ == "__main__":
    main()
