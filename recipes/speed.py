"""How much does ALDRIFT cost beyond the work that cannot be avoided?

    accelerate launch recipes/speed.py

In one run, for models of several sizes: a rung of the trainer is compared, turn by turn, with the bare sum of its parts
(`model.generate` for the same number of tokens, one forward pass of the prior, one of the policy, plain AdamW updates);
and each measure that saves time or memory is compared with doing without it. Only the ratios matter. On a GPU the sizes
include one of 1.2 billion parameters, in bf16.

Weights are random, and an output bias makes completions end after --mean_length tokens on average: the outputs are
meaningless, but computing them takes as long as with trained weights.
"""

import contextlib
import statistics
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from evaluation.bare_rung import BareRung
from evaluation.measuring import peak_memory, timed
from evaluation.random_models import END, SIZES, make_model
from evaluation.tables import Comparison
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback
from trl import TrlParser

from aldrift_hf import ALDRIFTConfig, ALDRIFTTrainer
from aldrift_hf.models import generation, head
from aldrift_hf.models.head import projected_logprobs
from aldrift_hf.models.passes import Padded, join
from aldrift_hf.models.prior import base_model
from aldrift_hf.models.scoring import inference, learning_pass, sequence_logprobs
from aldrift_hf.models.shared_prompts import attention
from aldrift_hf.models.shared_prompts.attention import sharing
from aldrift_hf.streams import uniforms
from aldrift_hf.types import Completions

CHAIN_LENGTH = 8


@dataclass
class SpeedArguments:
    """What is measured."""

    sizes: list[str] = field(
        default_factory=lambda: ["tiny", "small", "wide", *(["1b"] if torch.cuda.is_available() else [])],
        metadata={"help": f"Models: {', '.join(SIZES)}."},
    )
    rungs: int = field(
        default=5, metadata={"help": "Number of turns of a rung and a bare rung; the first turn is not counted."}
    )
    chains: int = field(default=64, metadata={"help": f"m. A rung has {CHAIN_LENGTH} proposals per chain."})
    updates: int = field(default=16, metadata={"help": "Optimizer updates per rung, of 32 rows each."})
    length: int = field(default=64, metadata={"help": "Largest number of tokens per completion."})
    mean_length: int = field(default=16, metadata={"help": "Mean number of tokens per completion."})
    output_dir: str = field(default="out/speed", metadata={"help": "Folder that the table is written to."})

    def __post_init__(self) -> None:
        if unknown := set(self.sizes) - set(SIZES):
            raise ValueError(f"--sizes {' '.join(sorted(unknown))}: choose from {', '.join(SIZES)}")
        if self.rungs < 2 or not 1 < self.mean_length <= self.length:
            raise ValueError("--rungs must be at least 2, and --mean_length between 2 and --length")

    @property
    def proposals(self) -> int:
        """Proposals per rung."""
        return CHAIN_LENGTH * self.chains


class Turns(TrainerCallback):
    """After every rung of the trainer, one bare rung."""

    def __init__(self, bare: BareRung) -> None:
        self.bare, self.rungs, self.parts = bare, [], []
        self.began = 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.began = time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.rungs.append(time.perf_counter() - self.began)
        self.parts.append(self.bare.seconds())
        self.began = time.perf_counter()


def cost(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(text) % 7) for text in completions]


def lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")


def make_trainer(name: str, options: SpeedArguments, objective=cost, **settings) -> ALDRIFTTrainer:
    size = SIZES[name]
    settings = {"per_device_generation_batch_size": size.rows, **settings}
    args = ALDRIFTConfig(
        output_dir=str(Path(options.output_dir) / name), sampler="metropolis_hastings",
        num_generations=options.proposals, chain_length=CHAIN_LENGTH, objective_range=7.0,
        per_device_train_batch_size=32, updates_per_rung=options.updates, max_completion_length=options.length,
        num_rungs=options.rungs, bf16=size.dtype == torch.bfloat16, save_strategy="no", report_to="none",
        disable_tqdm=True, objective_cache_key=uuid.uuid4().hex, **settings,
    )  # fmt: skip
    # The cache key is new, so that no costs of an earlier run are found in the folder.
    model, tokenizer = make_model(size, options.mean_length, args.device)
    trainer = ALDRIFTTrainer(model, objective, args, processing_class=tokenizer, peft_config=lora())
    trainer.remove_callback(PrinterCallback)  # the metrics of the rungs are meaningless here
    return trainer


def overhead(name: str, options: SpeedArguments) -> dict[str, float]:
    """A rung and the bare sum of its parts: medians over the turns."""
    trainer = make_trainer(name, options)
    model, _ = make_model(SIZES[name], options.mean_length, trainer.args.device)
    bare = BareRung(
        model, lora(), proposals=options.proposals, rows=min(SIZES[name].rows, options.proposals),
        length=options.length, updates=options.updates, batch=32,
    )  # fmt: skip
    turns = Turns(bare)
    trainer.add_callback(turns)
    trainer.train()
    parts, sums = turns.parts[1:], [sum(parts.values()) for parts in turns.parts[1:]]
    return {
        **{f"bare: {part}, s": statistics.median(turn[part] for turn in parts) for part in parts[0]},
        "bare: sum, s": statistics.median(sums),
        "a rung, s": statistics.median(turns.rungs[1:]),
        "a rung / bare sum": statistics.median(rung / total for rung, total in zip(turns.rungs[1:], sums)),
    }


def removal_of_finished_rows(name: str, options: SpeedArguments) -> dict[str, float]:
    """Generation in which finished rows leave the batch, and generation in which all rows stay to the end."""
    trainer = make_trainer(name, options)
    model, rows = base_model(trainer.model), SIZES[name].rows
    config = generation.neutral_generation_config(
        max_completion_length=options.length, eos_token_ids=[END], pad_token_id=END
    )
    numbers = uniforms((0,), range(rows), options.length)
    prompts, ratios = [trainer.inputs.prompts.token_ids[0]] * rows, []
    with trainer.accelerator.autocast(), inference(model):
        for _ in range(options.rungs):
            taken: dict[str, float] = {}
            for how, min_rows in (("leave", generation.MIN_ROWS_TO_SPLIT), ("stay", 2**62)):
                with patch.object(generation, "MIN_ROWS_TO_SPLIT", min_rows), timed(trainer.args.device, taken, how):
                    generation.generate(model, prompts, config, numbers)
            ratios.append(taken["leave"] / taken["stay"])
    return {"finished rows leave the batch / stay: time": statistics.median(ratios[1:])}


def overlap_of_objective(name: str, options: SpeedArguments) -> dict[str, float]:
    """Proposals in eight blocks, with a cost that waits as long as drawing takes, during generation and after it."""
    taken: dict[str, float] = {}
    wait = 0.0

    def slow(prompts: list[str], completions: list[str]) -> list[float]:
        time.sleep(wait * len(completions))
        return cost(prompts, completions)

    for overlap in (True, False):
        trainer = make_trainer(
            name, options, objective=slow, overlap_objective=overlap, per_device_generation_batch_size=options.chains
        )
        if overlap:
            with timed(trainer.args.device, taken, "drawing"):
                trainer.sample(options.proposals, chain_length=1)
            wait = taken["drawing"] / options.proposals
        with timed(trainer.args.device, taken, str(overlap)):
            trainer.sample(options.proposals, chain_length=1)
    return {"costs beside generation / after it: time": taken["True"] / taken["False"]}


def logits_in_chunks(name: str, options: SpeedArguments) -> dict[str, float]:
    """Scoring with logits in chunks, and with the logits of a whole batch at once."""
    trainer = make_trainer(name, options)
    model, rows = base_model(trainer.model), SIZES[name].rows
    ids = torch.randint(2, SIZES[name].vocabulary, (rows, options.length))
    completions = Completions(ids, torch.full((rows,), options.length))
    taken: dict[str, float] = {}
    peaks: dict[str, float] = {}
    with trainer.accelerator.autocast(), inference(model):
        for _ in range(2):  # the second measurement is kept
            for how, budget in (("chunks", head.LOGITS_BUDGET), ("whole", 2**62)):
                held = peak_memory(trainer.args.device, peaks, how)
                with patch.object(head, "LOGITS_BUDGET", budget), held, timed(trainer.args.device, taken, how):
                    sequence_logprobs(model, [[END]] * rows, completions, pad_token_id=END, batch_size=rows)
    return {
        "logits in chunks: peak memory, MiB": peaks["chunks"],
        "logits in chunks / whole: peak memory": peaks["chunks"] / peaks["whole"],
        "logits in chunks / whole: time": taken["chunks"] / taken["whole"],
    }


def attention_in_learning(name: str, options: SpeedArguments) -> dict[str, float]:
    """Forward and backward pass of 32 rows in bf16 on a CPU, with the attention in fp32 and in bf16."""
    trainer = make_trainer(name, options)
    model, prompt = base_model(trainer.model), trainer.inputs.prompts.token_ids[0]
    ids = torch.randint(2, SIZES[name].vocabulary, (32, options.mean_length)).tolist()
    padded, ratios = join([prompt] * len(ids), ids, END), []
    for _ in range(options.rungs):
        taken: dict[str, float] = {}
        for how in ("fp32", "bf16"):
            plain = how == "bf16" and patch.object(attention, "_computed_in_bf16", lambda states: False)
            with plain or contextlib.nullcontext(), timed(trainer.args.device, taken, how), sharing(model):
                with trainer.accelerator.autocast():
                    forward = learning_pass(model, padded)
                    loss = projected_logprobs(model, forward.select, forward.targets, **forward.inputs).sum()
                loss.backward()
        ratios.append(taken["fp32"] / taken["bf16"])
    return {"updates' attention in fp32 / in bf16: time of both passes": statistics.median(ratios[1:])}


def equal_rows_in_learning(name: str, options: SpeedArguments) -> dict[str, float]:
    """Forward and backward pass of 32 rows, drawn from 100 with chances 1/(1 + rank): each row, and equal ones once."""
    trainer = make_trainer(name, options)
    model, prompt = base_model(trainer.model), trainer.inputs.prompts.token_ids[0]
    texts = torch.randint(2, SIZES[name].vocabulary, (100, options.mean_length)).tolist()
    drawn = torch.multinomial(1 / torch.arange(2.0, 102), 32 * options.rungs, replacement=True).view(options.rungs, 32)
    ratios = []
    for rows in drawn.tolist():
        joined = join([prompt] * len(rows), [texts[row] for row in rows], END)
        padded = Padded(*(column.to(trainer.args.device) for column in joined))
        taken: dict[str, float] = {}
        for how in ("once", "each"):
            with timed(trainer.args.device, taken, how), sharing(model):
                with trainer.accelerator.autocast():
                    forward = learning_pass(model, padded, drops_out=how == "each")
                    found = projected_logprobs(model, forward.select, forward.targets, **forward.inputs)
                forward.table(found).sum().backward()
        ratios.append(taken["once"] / taken["each"])
    return {"updates' equal rows once / each: time of both passes": statistics.median(ratios[1:])}


def main() -> None:
    try:
        (options,) = TrlParser(SpeedArguments).parse_args_and_config()
    except ValueError as error:
        sys.exit(str(error))
    on_cpu = not torch.accelerator.is_available()
    figures = {
        name: logits_in_chunks(name, options)
        if name == "wide"
        else overhead(name, options)
        | removal_of_finished_rows(name, options)
        | overlap_of_objective(name, options)
        | equal_rows_in_learning(name, options)
        | (attention_in_learning(name, options) if on_cpu and SIZES[name].dtype == torch.bfloat16 else {})
        for name in options.sizes
    }
    table = Comparison(f"a rung of {options.proposals} proposals and {options.updates} updates", options.sizes)
    for row in dict.fromkeys(row for values in figures.values() for row in values):
        table.add(row, {name: values[row] for name, values in figures.items() if row in values})
    table.print()
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    table.write_markdown(Path(options.output_dir) / "speed.md")


if __name__ == "__main__":
    main()
