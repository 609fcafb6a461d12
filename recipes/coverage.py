"""Does a fine-tuned transformer cover its target? Exact sup p/L against the numbers of samples and updates.

    accelerate launch recipes/coverage.py

The paper assumes coarse learnability: if a model L is fitted to samples of p, then sup p/L is at most polynomial. The
paper proves this for simple estimators and leaves it open for language models. Here p has two modes on the spanning
trees of a graph, star-like and path-like trees. A small transformer, the prior of recipes/spanning_tree.py, is
fine-tuned on m samples of p. After 5, 10, 20, … updates sup p/L is computed exactly, over the enumerated support of p.

There is no objective and no ladder, so only those options of ALDRIFTConfig matter that concern supervised training
(learning_rate, per_device_train_batch_size, weight_decay, …). All options of TRL's ModelConfig work. Both can be given
here or in YAML (--config FILE.yaml).
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from evaluation.enumeration import enumerable_graph, text_log_probs
from evaluation.figures import figure, plot_lines
from evaluation.tables import Comparison
from peft import get_peft_model
from problems.prior import RecipeModelConfig, make_prior
from problems.training import RecipeConfig, one_of_several
from problems.tree_modes import two_modes
from rich.console import Console
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from trl import TrlParser

from aldrift_hf.models.prompts import encode_prompt
from aldrift_hf.toy import completion_ids
from aldrift_hf.trainer.samples import SampleCollator


@dataclass
class CoverageArguments:
    """The distribution p, and what is varied."""

    graph: str = field(
        default="florentine",
        metadata={"help": "The graph, as in recipes/spanning_tree.py; its strings are enumerated."},
    )
    samples: list[int] = field(
        default_factory=lambda: [32, 128, 512, 2048], metadata={"help": "Values of m, the number of samples of p."}
    )
    doublings: int = field(default=8, metadata={"help": "Measure after 5, 10, 20, … 5·2^doublings updates."})
    enumerate_up_to: int = field(default=50_000, metadata={"help": "Largest number of strings that may be enumerated."})


@dataclass
class CoverageConfig(RecipeConfig):
    """The settings of supervised training, with this recipe's defaults."""

    output_dir: Optional[str] = field(
        default="out/coverage", metadata={"help": "Folder that all files are written to, with a subfolder per m."}
    )
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Samples per update and process."})


class Coverage(TrainerCallback):
    """Logs how well the model covers `p` after 5, 10, 20, … updates. The Trainer keeps the log in its state."""

    def __init__(self, texts: list[str], p: np.ndarray, star: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> None:
        self.texts, self.log_p, self.star, self.tokenizer = texts, np.log(p), star, tokenizer
        self.trainer: Optional[Trainer] = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        doublings = np.log2(state.global_step / 5)
        if self.trainer is not None and doublings >= 0 and doublings % 1 == 0:
            self.trainer.log(self.measure(self.trainer.accelerator.unwrap_model(self.trainer.model)))

    def measure(self, model: torch.nn.Module) -> dict[str, float]:
        """log sup p/L and KL(p‖L) in nats, and the probability of both modes under L."""
        log_q = text_log_probs(self.texts, model, self.tokenizer)
        ratio = self.log_p - log_q
        return {
            "coverage": float(ratio.max()),
            "coverage_kl": float(np.exp(self.log_p) @ ratio),
            "coverage_star": float(np.exp(log_q[self.star]).sum()),
            "coverage_path": float(np.exp(log_q[~self.star]).sum()),
        }


def main() -> None:
    parser = TrlParser((CoverageArguments, CoverageConfig, RecipeModelConfig))
    options, config, model_config = parser.parse_args_and_config()
    problem = enumerable_graph(options.graph, model_config, options.enumerate_up_to)
    try:
        texts, p, star = two_modes(problem)
    except ValueError as error:
        sys.exit(f"--graph: {error}")
    if not options.samples or min(options.samples) < 1 or options.doublings < 0:
        sys.exit(f"--samples must be at least 1 and --doublings not negative: {options.samples}, {options.doublings}")
    config.settle()  # for a plain Trainer, which leaves nothing open
    config.max_steps, config.save_strategy = 5 * 2**options.doublings, "steps"
    config.train_sampling_strategy = "sequential"  # the rows are in random order already
    config.save_steps = max(1, config.max_steps // 4)
    rows_per_update = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    runs: dict[int, list[dict[str, Any]]] = {}
    for m in sorted(set(options.samples)):
        run = one_of_several(config, f"samples-{m}")
        set_seed(run.seed)
        model, tokenizer, peft_config = make_prior(problem, model_config)
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        start, samples = encode_prompt("", 0, tokenizer), draw_samples(texts, p, m, run.seed)
        rows = [{"prompt": start, "completion": tokens} for tokens in completion_ids(samples, tokenizer)]
        order = random_passes(m, run.max_steps * rows_per_update, run.seed)
        callback = Coverage(texts, p, star, tokenizer)
        trainer = Trainer(model, run, SampleCollator(0), [rows[i] for i in order], callbacks=[callback])
        callback.trainer = trainer
        trainer.train(resume_from_checkpoint=run.resume_from_checkpoint)
        runs[m] = [entry for entry in trainer.state.log_history if "coverage" in entry]
    if trainer.is_world_process_zero():
        report(runs, len(texts), int(star.sum()), rows_per_update, Path(config.output_dir))


def draw_samples(texts: list[str], p: np.ndarray, m: int, seed: int) -> list[str]:
    """`m` samples of `p`."""
    return [texts[index] for index in np.random.default_rng(seed).choice(len(texts), m, p=p)]


def random_passes(m: int, length: int, seed: int) -> list[int]:
    """Indices of whole passes over `m` samples, each in random order; the last pass is cut to `length` in all."""
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(m, generator=generator) for _ in range(-(-length // m))]
    return torch.cat(passes)[:length].tolist()


def report(runs: dict[int, list[dict[str, Any]]], support: int, stars: int, rows_per_update: int, folder: Path) -> None:
    """Print and write the table, the main result for each m in a sentence, and the figure."""
    updates = [entry["step"] for entry in next(iter(runs.values()))]
    title = f"log sup p/L in nats by number of updates; p: {stars} star-like and {support - stars} path-like trees"
    table = Comparison(title, [f"{step:,}" for step in updates])
    for m, entries in runs.items():
        table.add(f"m = {m:,}", {f"{entry['step']:,}": entry["coverage"] for entry in entries})
    table.print()
    table.write_markdown(folder / "coverage.md")
    for m, entries in runs.items():
        Console().print(verdict(m, entries, rows_per_update))
    if len(runs) > 1:
        best = [min(entry["coverage"] for entry in entries) for entries in runs.values()]
        Console().print(
            f"the smallest sup p/L changes with the samples like m^{np.polyfit(np.log(list(runs)), best, 1)[0]:.2f}"
        )
    with figure(folder / "coverage.png", [["updates", "samples", "kl"]], (13, 4)) as axes:
        for name, key, label in (
            ("updates", "coverage", "log sup p/L (nats)"),
            ("kl", "coverage_kl", "KL(p || L) (nats)"),
        ):
            lines = {f"m = {m:,}": (updates, [entry[key] for entry in entries]) for m, entries in runs.items()}
            plot_lines(axes[name], lines, "optimizer updates", label, log="xy")
        ends = {
            "smallest": [min(entry["coverage"] for entry in entries) for entries in runs.values()],
            f"after {updates[-1]:,} updates": [entries[-1]["coverage"] for entries in runs.values()],
        }
        lines = {label: (list(runs), values) for label, values in ends.items()}
        plot_lines(axes["samples"], lines, "samples m", "log sup p/L (nats)", log="xy")
    Console().print(f"figure and table: {folder}/coverage.*")


def verdict(m: int, entries: list[dict[str, Any]], rows_per_update: int) -> str:
    """When coverage is best, and how fast it is lost afterwards, as a power of the number of updates."""
    best, last = min(entries, key=lambda entry: entry["coverage"]), entries[-1]
    passes = best["step"] * rows_per_update / m
    sentence = (
        f"m = {m:,}: sup p/L is smallest, exp({best['coverage']:.1f}), after {best['step']:,} updates ({passes:g} "
        "passes)"
    )
    if best is last:
        return f"{sentence}, the last measurement: overfitting has not begun"
    exponent = (last["coverage"] - best["coverage"]) / np.log(last["step"] / best["step"])
    return f"{sentence}; then it grows to exp({last['coverage']:.1f}), on average like updates^{exponent:.1f}"


if __name__ == "__main__":
    main()
