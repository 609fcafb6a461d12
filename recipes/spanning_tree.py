"""Teach a small language model to draw spanning trees of a real social network.

    accelerate launch recipes/spanning_tree.py

The prior names n-1 edges of a graph in order: a local rule, learnt from uniform draws. That the edges connect all nodes
is the global rule, and only the cost knows it: d = components - 1. ALDRIFT turns the prior L into a sampler of
p_T(s) ~ L(s) exp(-T d(s)), whose draws are spanning trees; Kirchhoff's theorem says how close it came.

Other graphs: --graph davis|tutte|karate|random:N,P|FILE.edgelist. Other models: --model_name_or_path ID_OR_PATH.
Every option of ALDRIFTConfig and of TRL's ModelConfig works, here and in YAML (--config FILE.yaml).
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np
from peft import prepare_model_for_kbit_training
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from aldrift_hf import ALDRIFTConfig, ALDRIFTTrainer
from aldrift_hf.prior import base_model
from aldrift_hf.problems.enumeration import Enumeration
from aldrift_hf.problems.priors import SmallPriorConfig, completion_ids, small_prior, warm_up
from aldrift_hf.problems.spanning_tree import SEPARATOR, SpanningTreeProblem, load_problem
from aldrift_hf.problems.spanning_tree_report import compare, draw_figure, missing_mass_in_words


@dataclass
class SpanningTreeArguments:
    """The problem and its prior."""

    graph: str = field(
        default="florentine",
        metadata={"help": "florentine, davis, tutte, karate, random:N,P, or the path of an edge list."},
    )
    draws: int = field(default=4096, metadata={"help": "Draws of the prior, the model and the chains to compare."})
    prior_steps: int = field(default=800, metadata={"help": "Updates that make the prior (small model or warm-up)."})
    enumerate_up_to: int = field(
        default=50_000,
        metadata={"help": "Compare with every string where there are at most so many, and a small model."},
    )


@dataclass
class SpanningTreeConfig(ALDRIFTConfig):
    """ALDRIFT's settings, with this recipe's defaults."""

    output_dir: Optional[str] = field(default="out/spanning_tree", metadata={"help": "Where everything is written."})
    tau_max: float = field(default=6.0, metadata={"help": "T: with 6, p_T is 98 %% trees on the default graph."})
    tau_step: Optional[float] = field(
        default=0.3, metadata={"help": "Step of the ladder; finer than the paper's 1/D pays."}
    )
    num_chains: int = field(default=512, metadata={"help": "m, chains (and so samples) a rung."})
    chain_length: Optional[int] = field(default=6, metadata={"help": "M, proposals a chain. None: m squared."})
    updates_per_rung: Optional[int] = field(default=40, metadata={"help": "Optimizer updates a rung."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Samples an update, a process."})
    learning_rate: float = field(default=1e-3, metadata={"help": "High, for a small model with a small adapter."})
    max_completion_length: Optional[int] = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Tokens; None: the longest of 1,000 strings, and a tenth more."}
    )
    generation_batch_size: int = field(default=1024, metadata={"help": "Completions a process works on at once."})


@dataclass
class SpanningTreeModelConfig(ModelConfig):
    """TRL's model settings; without a model the prior is made on the spot."""

    use_peft: bool = field(default=True, metadata={"help": "LoRA; --no_use_peft fine-tunes the small prior in full."})
    lora_target_modules: Optional[list[str]] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "LoRA target modules."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})


def make_prior(problem: SpanningTreeProblem, options: SpanningTreeArguments, model_config: ModelConfig):
    """The prior, its tokenizer, and the adapter that is to be trained (None where the prior brings its own)."""
    peft_config = get_peft_config(model_config)
    if model_config.model_name_or_path is None:
        size = SmallPriorConfig(steps=options.prior_steps)
        model, tokenizer = small_prior(problem.names, SEPARATOR, problem.random_texts, size)
        if peft_config is not None:
            peft_config.fan_in_fan_out = True  # GPT-2 keeps its weights transposed
        return model, tokenizer, peft_config
    name, revision = model_config.model_name_or_path, model_config.model_revision
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    quantization = get_quantization_config(model_config)
    model = AutoModelForCausalLM.from_pretrained(
        name,
        revision=revision,
        dtype=model_config.dtype,
        attn_implementation=model_config.attn_implementation,
        quantization_config=quantization,
    )
    if quantization is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if peft_config is None:
        raise SystemExit("a model given by name is warmed up with LoRA; leave --no_use_peft out")
    peft_config.fan_in_fan_out = model.config.model_type == "gpt2"
    draw = problem.random_texts
    settings = {"steps": options.prior_steps, "batch_size": 16, "learning_rate": 2e-4}
    return warm_up(model, tokenizer, draw, peft_config, **settings), tokenizer, None


def main() -> None:
    parser = TrlParser((SpanningTreeArguments, SpanningTreeConfig, SpanningTreeModelConfig))
    options, config, model_config = parser.parse_args_and_config()
    try:
        problem = load_problem(options.graph)
    except ValueError as error:
        sys.exit(f"--graph: {error}")
    model, tokenizer, peft_config = make_prior(problem, options, model_config)
    if config.objective_range is None:
        config.objective_range = float(problem.worst_cost)
    if config.max_completion_length is None:
        rows = completion_ids(problem.random_texts(1000, np.random.default_rng(0)), tokenizer)
        longest = max(map(len, rows))
        config.max_completion_length = longest if model_config.model_name_or_path is None else longest + longest // 10

    trainer = ALDRIFTTrainer(
        model=model, objective=problem.cost, args=config, processing_class=tokenizer, peft_config=peft_config
    )
    strings, log_probs = None, {}
    if model_config.model_name_or_path is None and problem.number_of_strings() <= options.enumerate_up_to:
        strings = Enumeration.of(problem.all_texts(), problem.cost_of, problem.worst_cost, tokenizer)
        log_probs["prior"] = strings.log_probs(base_model(trainer.model))
    # Chains of one step are plain draws of the model, which before training is the prior.
    draws = {"prior": list(trainer.sample(options.draws, chain_length=1)["completion"])}

    result = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()

    draws["model"] = list(trainer.sample(options.draws, chain_length=1)["completion"])
    draws["corrected"] = list(trainer.sample(options.draws)["completion"])
    if strings is not None:
        log_probs["model"] = strings.log_probs(base_model(trainer.model))
        log_probs["exact p_T"] = strings.target(log_probs["prior"], config.tau_max)
        draws["exact p_T"] = strings.draw(log_probs["exact p_T"], options.draws, np.random.default_rng(config.seed))
    if trainer.is_world_process_zero():
        report(problem, draws, strings, log_probs, trainer, result.metrics)


def report(
    problem: SpanningTreeProblem,
    draws: dict[str, list[str]],
    strings: Optional[Enumeration],
    log_probs: dict[str, np.ndarray],
    trainer: ALDRIFTTrainer,
    metrics: dict[str, float],
) -> None:
    """The table, the missing mass, a few trees and the figure."""
    console = Console()
    console.print(compare(problem, draws, strings, log_probs))
    record = trainer.progress.records[-1]
    console.print(f"{record['proposals']:,} proposals, {record['objective_calls']:,} distinct objective calls")
    console.print(missing_mass_in_words(metrics.get("final_missing_mass")))
    for text in sorted({text for text in draws["corrected"] if problem.cost_of(text) == 0})[:3]:
        console.print(f"a tree: {text}", highlight=False)
    picture = Path(trainer.args.output_dir) / "spanning_tree.png"
    draw_figure(problem, draws, trainer.progress.records, picture)
    console.print(f"figure: {picture}   rungs: {picture.parent / 'rungs.jsonl'}   adapter: {picture.parent}")


if __name__ == "__main__":
    main()
