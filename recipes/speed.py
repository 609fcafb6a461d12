"""What does ALDRIFT cost beyond the work that it cannot do without?

    accelerate launch recipes/speed.py

In one run, for models of several sizes: a rung of the trainer beside the bare sum of its parts (`model.generate` for as
many tokens, one forward pass of the prior, one of the policy, plain AdamW steps), turn by turn; and what is done to
save time or memory beside doing without it. What counts are the ratios. On a GPU the sizes include one of 1.2 billion
parameters, in bf16.

Weights are random, and an output bias ends a completion after --mean_length tokens on average: what is computed is of
no interest here, only how long it takes.
"""

import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from evaluation.bare import SIZES, BareRung, make_model, peak_memory, timed
from evaluation.tables import Comparison
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback
from trl import TrlParser

from aldrift_hf import ALDRIFTConfig, ALDRIFTTrainer
from aldrift_hf.models import generation as proposals
from aldrift_hf.models import head as projection
from aldrift_hf.models.prior import base_model
from aldrift_hf.models.scoring import inference, sequence_logprobs
from aldrift_hf.types import Completions


@dataclass
class SpeedArguments:
    """What is measured."""

    sizes: list[str] = field(
        default_factory=lambda: ["tiny", "small", "wide", *(["1b"] if torch.cuda.is_available() else [])],
        metadata={"help": f"Models: {', '.join(SIZES)}."},
    )
    rungs: int = field(default=5, metadata={"help": "Turns of rung and bare rung; the first is not counted."})
    chains: int = field(default=64, metadata={"help": "m; a rung draws 8 proposals for each."})
    updates: int = field(default=16, metadata={"help": "Updates a rung, of 32 rows."})
    length: int = field(default=64, metadata={"help": "Most tokens of a completion."})
    mean_length: int = field(default=16, metadata={"help": "Tokens after which a completion ends on average."})
    output_dir: str = field(default="out/speed", metadata={"help": "Where the table is written."})

    def __post_init__(self) -> None:
        if unknown := set(self.sizes) - set(SIZES):
            raise ValueError(f"--sizes {' '.join(sorted(unknown))}: take of {', '.join(SIZES)}")
        if self.rungs < 2 or not 1 < self.mean_length <= self.length:
            raise ValueError("--rungs must be at least 2, and --mean_length between 2 and --length")


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
    args = ALDRIFTConfig(
        output_dir=str(Path(options.output_dir) / name), num_chains=options.chains, chain_length=8, objective_range=7.0,
        generation_batch_size=size.rows, per_device_train_batch_size=32, updates_per_rung=options.updates,
        max_completion_length=options.length, num_train_epochs=options.rungs, bf16=size.dtype == torch.bfloat16,
        save_strategy="no", report_to="none", disable_tqdm=True, **settings,
    )  # fmt: skip
    model, tokenizer = make_model(size, options.mean_length, args.device)
    trainer = ALDRIFTTrainer(model, objective, args, processing_class=tokenizer, peft_config=lora())
    trainer.remove_callback(PrinterCallback)  # the rungs' figures mean nothing here
    return trainer


def overhead(name: str, options: SpeedArguments) -> dict[str, float]:
    """A rung beside the bare sum of its parts: medians over the turns."""
    trainer, proposals_a_rung = make_trainer(name, options), 8 * options.chains
    model, _ = make_model(SIZES[name], options.mean_length, trainer.args.device)
    bare = BareRung(
        model, lora(), proposals=proposals_a_rung, rows=min(SIZES[name].rows, proposals_a_rung),
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


def leaving(name: str, options: SpeedArguments) -> dict[str, float]:
    """Generation with finished rows leaving the batch, beside generation with all rows to the end."""
    trainer = make_trainer(name, options)
    model, rows = base_model(trainer.model), SIZES[name].rows
    numbers = proposals.uniforms((0,), range(rows), options.length)
    prompts, ratios = [trainer.prompts.token_ids[0]] * rows, []
    with trainer.proposer.running(), inference(model):
        for _ in range(options.rungs):
            taken: dict[str, float] = {}
            for how, thin in (("leave", proposals.THIN), ("stay", 2**62)):
                with patch.object(proposals, "THIN", thin), timed(trainer.args.device, taken, how):
                    proposals.generate(model, prompts, trainer.proposer.generation_config, numbers)
            ratios.append(taken["leave"] / taken["stay"])
    return {"finished rows leave the batch / stay: time": statistics.median(ratios[1:])}


def beside(name: str, options: SpeedArguments) -> dict[str, float]:
    """Proposals in blocks of an eighth of them, with a cost that waits as long as it takes to draw them."""
    taken: dict[str, float] = {}
    wait = 0.0

    def slow(prompts: list[str], completions: list[str]) -> list[float]:
        time.sleep(wait * len(completions))
        return cost(prompts, completions)

    for overlap in (True, False):
        trainer = make_trainer(name, options, objective=slow, overlap_objective=overlap)
        trainer.args.generation_batch_size = options.chains
        if overlap:
            _, seconds = trainer.proposer.propose(trainer.prompts, 8 * options.chains, (7,))
            wait = (seconds["seconds_propose"] + seconds["seconds_score"]) / (8 * options.chains)
        with timed(trainer.args.device, taken, str(overlap)):
            trainer.proposer.propose(trainer.prompts, 8 * options.chains, (8,))
    return {"costs beside generation / after it: time": taken["True"] / taken["False"]}


def memory(name: str, options: SpeedArguments) -> dict[str, float]:
    """Scoring with logits in chunks, beside all of a batch's at once."""
    trainer = make_trainer(name, options)
    model, rows = base_model(trainer.model), SIZES[name].rows
    ids = torch.randint(2, SIZES[name].vocabulary, (rows, options.length))
    completions = Completions(ids, torch.full((rows,), options.length))
    taken: dict[str, float] = {}
    peaks: dict[str, float] = {}
    with trainer.proposer.running(), inference(model):
        for _ in range(2):  # the second is kept
            for how, budget in (("chunks", projection.LOGITS_BUDGET), ("whole", 2**62)):
                held = peak_memory(trainer.args.device, peaks, how)
                with patch.object(projection, "LOGITS_BUDGET", budget), held, timed(trainer.args.device, taken, how):
                    sequence_logprobs(model, [[0]] * rows, completions, pad_token_id=0, batch_size=rows)
    return {
        "logits in chunks: peak memory, MiB": peaks["chunks"],
        "logits in chunks / whole: peak memory": peaks["chunks"] / peaks["whole"],
        "logits in chunks / whole: time": taken["chunks"] / taken["whole"],
    }


def main() -> None:
    try:
        (options,) = TrlParser(SpeedArguments).parse_args_and_config()
    except ValueError as error:
        sys.exit(str(error))
    figures = {
        name: memory(name, options)
        if name == "wide"
        else overhead(name, options) | leaving(name, options) | beside(name, options)
        for name in options.sizes
    }
    table = Comparison(f"a rung of {8 * options.chains} proposals and {options.updates} updates", options.sizes)
    for row in dict.fromkeys(row for values in figures.values() for row in values):
        table.add(row, {name: values[row] for name, values in figures.items() if row in values})
    table.print()
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    table.write_markdown(Path(options.output_dir) / "speed.md")


if __name__ == "__main__":
    main()
