"""Does a large model fit on this GPU, and how long does a rung take? A random model of Llama's shapes.

    python recipes/large_model.py                        # 8 billion parameters, in bf16
    python recipes/large_model.py --load_in_4bit True    # its linear layers in NF4; 16 GB are written to --output_dir
    python recipes/large_model.py --shape tiny           # on a CPU, to see the command work

One rung of ALDRIFTTrainer, with LoRA of rank 16 on all linear layers, bf16 autocast and gradient checkpointing: the
largest memory of its stages, beside what the arithmetic of recipes/README.md ("how large a run is") says, and their
seconds. Weights are random: texts hardly ever end before --tokens, and computing them takes as long as with trained
weights.
Not counted is the loading of CUDA's own libraries, about 0.5 GB. On a CPU memory is that of the process.
"""

import contextlib
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from evaluation.measuring import peak_memory
from evaluation.tables import Comparison
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
)
from trl import TrlParser

from aldrift_hf import ALDRIFTConfig, ALDRIFTTrainer
from aldrift_hf.models.head import LOGITS_BUDGET
from aldrift_hf.reporting.writers import ReportWriter
from aldrift_hf.toy import word_tokenizer

GB = 1e9
FP32, BF16 = 4, 2
"""Bytes of a number."""
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256}
SHAPES = {
    "8b": {**HEADS, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32},
    "1b": {**HEADS, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "tiny": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
    },
}


@dataclass
class LargeModelArguments:
    """What is measured."""

    shape: str = field(default="8b", metadata={"choices": [*SHAPES], "help": "Llama's at 8 and 1 billion parameters."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Linear layers in NF4, as QLoRA has them."})
    proposals: int = field(default=256, metadata={"help": "Proposals of the rung."})
    tokens: int = field(default=512, metadata={"help": "Tokens of each completion."})
    batch_size: int = field(default=8, metadata={"help": "Completions per micro-batch of an update, eight of which."})
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
    config = LlamaConfig(**SHAPES[options.shape], bos_token_id=0, eos_token_id=0, max_position_embeddings=8192)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if not options.load_in_4bit:
        return model
    folder = Path(options.output_dir) / "weights"
    try:
        model.save_pretrained(folder)
        del model
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )  # fmt: skip
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
    tokenizer = word_tokenizer([f"w{number}" for number in range(model.config.vocab_size - 2)], " ")
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
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
    paper = on_paper(model.config, adapter, options)
    return {
        "on paper, GB": {name: (weights + value) / GB for name, value in paper.items()},
        "measured, GB": {name: value / GB for name, value in {"weights and adapter": weights, **beyond}.items()},
        "seconds": {
            "drawing": figures["seconds_propose"],
            "scoring": figures["seconds_score"],
            "learning": figures["seconds_learn"],
        },
    }


def on_paper(config: LlamaConfig, adapter: int, options: LargeModelArguments) -> dict[str, float]:
    """Bytes beside the weights: keys and values; the adapter's gradients and Adam's moments, and what a layer keeps of
    each token of a micro-batch, with the logits' chunk."""
    head = config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * head * BF16
    kept, tokens = config.num_hidden_layers * config.hidden_size * BF16, options.batch_size * options.tokens
    return {
        "weights and adapter": 0.0,
        "drawing and scoring": cached * options.proposals * options.tokens,
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
