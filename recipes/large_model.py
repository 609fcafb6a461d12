"""Does a large model fit on this GPU, and how long does a rung take? Models with random weights.

    python recipes/large_model.py                        # 8 billion parameters, in bf16
    python recipes/large_model.py --load_in_4bit True    # its linear layers in NF4; 16 GB are written to --output_dir
    python recipes/large_model.py --shape tiny           # on a CPU, to see the command work

One rung of ALDRIFTTrainer, with LoRA of rank 16 on all linear layers, bf16 autocast and gradient checkpointing: the
largest memory of its stages, beside what the arithmetic of recipes/README.md ("how large a run is") says, and their
seconds. With random weights texts hardly ever end before --tokens, and computing them takes as long as with others.
CUDA's own libraries, about 0.5 GB, are not counted. On a CPU memory is that of the process.
"""

import contextlib
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from evaluation.measuring import peak_memory
from evaluation.random_models import SIZES, make_tokenizer
from evaluation.tables import Comparison
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
)
from trl import TrlParser

from aldrift_hf import ALDRIFTConfig, ALDRIFTTrainer
from aldrift_hf.models.footprint import Footprint
from aldrift_hf.models.head import LOGITS_BUDGET
from aldrift_hf.reporting.writers import ReportWriter

GB = 1e9
FP32, BF16 = 4, 2
"""Bytes of a number."""


@dataclass
class LargeModelArguments:
    """What is measured."""

    shape: str = field(
        default="8b", metadata={"choices": [*SIZES], "help": "1b and 8b are Llama's, with so many billion parameters."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Linear layers in NF4, as QLoRA has them."})
    proposals: int = field(default=256, metadata={"help": "Proposals of the rung."})
    tokens: int = field(default=512, metadata={"help": "Tokens of each completion."})
    batch_size: int = field(default=8, metadata={"help": "Completions per micro-batch; an update has eight."})
    updates: int = field(default=2, metadata={"help": "Updates."})
    output_dir: str = field(default="out/large_model", metadata={"help": "Folder of the table."})


class Stages(TrainerCallback):
    """Memory at most (MiB, beyond what was held when a stage began) until the first update, and from there on."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peaks, self.stage = device, dict[str, float](), contextlib.ExitStack()

    def begin(self, name: str) -> None:
        self.stage.close()
        self.stage.enter_context(peak_memory(self.device, self.peaks, name))

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.begin("drawing and scoring")

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 0:
            self.begin("learning")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.stage.close()


def random_model(options: LargeModelArguments, device: torch.device) -> PreTrainedModel:
    """The model; one in 4 bits is quantized while it is read from a file."""
    size = SIZES[options.shape]
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(size.config(size.vocabulary), dtype=torch.bfloat16)
    if not options.load_in_4bit:
        return model
    folder = Path(options.output_dir) / "weights"
    try:
        model.save_pretrained(folder)
        del model
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=nf4, dtype=torch.bfloat16, device_map={"": device}
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def cost(prompts, completions):
    return [float(len(text) % 7) for text in completions]


def rung(options: LargeModelArguments) -> dict[str, dict[str, float]]:
    """Bytes on paper and as measured, and seconds, of each stage."""
    args = ALDRIFTConfig(
        options.output_dir, tau_max=0.1, objective_range=7.0, tau_step=0.1, num_rungs=1, chain_length=1,
        num_generations=options.proposals, max_objective_calls=options.proposals, learning_rate=1e-4,
        max_completion_length=options.tokens, updates_per_rung=options.updates, gradient_accumulation_steps=8,
        per_device_train_batch_size=options.batch_size, gradient_checkpointing=True, bf16=True, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=not torch.accelerator.is_available(),
    )  # fmt: skip
    model = random_model(options, args.device)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    tokenizer = make_tokenizer(SIZES[options.shape])
    trainer = ALDRIFTTrainer(model, cost, args, processing_class=tokenizer, peft_config=lora)
    for callback in (PrinterCallback, ReportWriter):
        trainer.remove_callback(callback)
    shutil.rmtree(Path(options.output_dir) / "_costs", ignore_errors=True)  # else they would not be evaluated again
    stages = Stages(args.device)
    trainer.add_callback(stages)
    adapter = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    weights = model.get_memory_footprint()
    trainer.train()
    (figures,) = trainer.record.rungs
    beyond = {name: weights + peak * 2**20 for name, peak in stages.peaks.items()}
    paper = on_paper(model, adapter, options)
    return {
        "on paper, GB": {name: (weights + value) / GB for name, value in paper.items()},
        "measured, GB": {name: value / GB for name, value in {"weights and adapter": weights, **beyond}.items()},
        "seconds": {
            "drawing": figures["seconds_propose"],
            "scoring": figures["seconds_score"],
            "learning": figures["seconds_learn"],
        },
    }


def on_paper(model: PreTrainedModel, adapter: int, options: LargeModelArguments) -> dict[str, float]:
    """Bytes beside the weights: keys and values; the adapter's gradients and Adam's moments, and what a layer keeps of
    each token of a micro-batch, with the logits' chunk."""
    config, tokens = model.config, options.batch_size * options.tokens
    kept = config.num_hidden_layers * config.hidden_size * BF16
    return {
        "weights and adapter": 0.0,
        "drawing and scoring": Footprint.of(model).cached * options.proposals * options.tokens,
        "learning": 3 * FP32 * adapter + kept * tokens + 3 * FP32 * min(LOGITS_BUDGET, tokens * config.vocab_size),
    }


def main() -> None:
    (options,) = TrlParser(LargeModelArguments).parse_args_and_config()
    if options.shape != "tiny" and not torch.accelerator.is_available():
        sys.exit("there is no accelerator here: --shape tiny shows on a CPU what the command does")
    figures = rung(options)
    stages = list(dict.fromkeys(stage for column in figures.values() for stage in column))
    precision = "NF4" if options.load_in_4bit else "bf16"
    table = Comparison(
        f"{options.shape} in {precision}: {options.proposals} proposals of {options.tokens} tokens", [*figures]
    )
    for stage in stages:
        table.add(stage, {name: column.get(stage) for name, column in figures.items()}, ".3g")
    table.print()
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    table.write_markdown(Path(options.output_dir) / f"large_model_{options.shape}_{precision}.md")


if __name__ == "__main__":
    main()
