"""Binding sites of a transcription factor: the exact p_T, what a method has measured, and the tables and the figure."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import logomaker
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from problems.binding_sites import BASES, LENGTH, BindingSiteProblem, reverse_complement
from problems.prior import RecipeModelConfig, make_prior
from transformers import PreTrainedModel

from aldrift_hf.models.prior import base_model
from aldrift_hf.reporting.figure_style import styled
from evaluation.enumeration import Enumeration, kl_divergence, total_variation
from evaluation.figures import figure
from evaluation.kept_runs import Run
from evaluation.tables import Comparison, mean_of

TAU_MAX = 40.0
STRANDS = "+strands"
"""Ends the name of a method that knows that both strands of a site have one score."""
STRONG = 0.9
"""Score of a strong binder."""
OURS = ("defaults", "aldrift", f"aldrift{STRANDS}")
"""ALDRIFT's rows."""
COLUMNS = {
    "KL(p_T‖q)": ("kl", ".3g", ".2g"),
    "TV": ("tv", ".2f", ""),
    "strong ones known": ("found", ",.0f", ".0f"),
    "P(strong)": ("strong", ".3f", ".3f"),
    "distinct strong in 4,096 draws": ("distinct", ",.0f", ".0f"),
    "log Z: exact - estimated": ("log_z_gap", ".2f", ".2f"),
    "missing mass": ("missing_mass", ".2f", ".2f"),
    "measurements": ("calls", ",.0f", ""),
    "CPU seconds": ("cpu_seconds", ",.0f", ""),
}
"""The first factor's table: for each column the measure, its format and that of its standard deviation."""
Runs = Mapping[str, Mapping[str, list[Run]]]
"""By factor and method; those of one method differ in the seed alone."""


def is_strong(cost: Any) -> Any:
    """Whether a sequence, or each of an array, is a strong binder."""
    return cost <= 1 - STRONG + 1e-9


@dataclass(frozen=True)
class MeasuredSites(BindingSiteProblem):
    """Binding sites, of which a method has measured some.

    Attributes:
        both_strands: whether a measurement is of both strands, and counts once.
        evaluated: the sequences that were measured, in their order; of both strands the first one in the alphabet.
    """

    both_strands: bool = False
    evaluated: dict[str, None] = field(default_factory=dict, compare=False)

    def cost_of(self, text: str) -> float:
        """The cost, which counts as a measurement if the text is a sequence."""
        cost = super().cost_of(text)
        if len(text.split(self.separator)) == LENGTH:
            self.evaluated[min(text, reverse_complement(text)) if self.both_strands else text] = None
        return cost

    def known(self, budget: int) -> set[str]:
        """The sequences whose scores are known after the first `budget` measurements."""
        measured = [*self.evaluated][:budget]
        return {*measured, *(map(reverse_complement, measured) if self.both_strands else ())}


class Truth:
    """A factor's p_T over all sequences.

    Args:
        factor: its name.
        model_config: the prior.
    """

    def __init__(self, factor: str, model_config: RecipeModelConfig) -> None:
        self.problem = BindingSiteProblem(factor)
        prior, tokenizer, _ = make_prior(self.problem, model_config)
        texts, problem = self.problem.all_texts(), self.problem
        self.strings = Enumeration.of(texts, problem.cost_of, problem.worst_cost, tokenizer)
        self.log_prior = self.strings.log_probs(base_model(prior))
        self.log_target = self.strings.target(self.log_prior, TAU_MAX)
        self.strong = np.append(is_strong(self.strings.cost), False)
        self.log_z = float(self.log_prior[0] - TAU_MAX * self.strings.cost[0] - self.log_target[0])

    def measures(self, model: PreTrainedModel, seed: int) -> dict[str, Any]:
        """How far a model is from p_T, exactly, and its draws."""
        log_q = self.strings.log_probs(model)
        q = np.exp(log_q)
        drawn = np.random.default_rng(seed).multinomial(4096, q / q.sum())
        return {
            "kl": kl_divergence(self.log_target, log_q),
            "tv": total_variation(np.exp(self.log_target), q),
            "strong": float(q[self.strong].sum()),
            "distinct": int((drawn[self.strong] > 0).sum()),
            "bases": self.bases(log_q),
        }

    def bases(self, log_p: np.ndarray) -> list[list[float]]:
        """The probability of each base at each place, `[LENGTH, 4]`."""
        codes = np.array([[BASES.index(base) for base in text.split(" ")] for text in self.strings.texts])
        return [np.bincount(column, np.exp(log_p[:-1]), len(BASES)).tolist() for column in codes.T]


def first_factor(truths: Mapping[str, Truth], runs: Runs) -> Comparison:
    """All measures of all methods."""
    (factor, truth), *_ = truths.items()
    p = np.exp(truth.log_target)
    table = Comparison(f"{factor}: {_seeds(runs)}", [*COLUMNS])
    drawn = np.random.default_rng(0).multinomial(4096, p / p.sum())
    table.add(
        f"p_T (of {truth.strong.sum():,} strong)",
        {"P(strong)": p[truth.strong].sum(), "distinct strong in 4,096 draws": (drawn[truth.strong] > 0).sum()},
        ".3g",
    )
    prior_kl = kl_divergence(truth.log_target, truth.log_prior)
    table.add("prior", {"KL(p_T‖q)": prior_kl, "P(strong)": np.exp(truth.log_prior[truth.strong]).sum()}, ".3g")
    for method, made in runs[factor].items():
        cells = [
            mean_of([run[name] for run in made], *specs) if all(name in run for run in made) else ""
            for name, *specs in COLUMNS.values()
        ]
        table.rows.append((f"{method} {made[0]['setting']}".strip(), cells))
    return table


def every_factor(truths: Mapping[str, Truth], runs: Runs) -> Comparison:
    """Of each factor: how many strong binders each method knows of, and KL(p_T‖q) of ours."""
    (first, *_) = runs.values()
    ours = [method for method in first if method in OURS]
    columns = ["strong", *first, "KL of the prior", *(f"KL of {method}" for method in ours)]
    table = Comparison(f"strong binders whose scores are known: {_seeds(runs)}", columns)
    for factor, truth in truths.items():
        found = [mean_of([run["found"] for run in made], ",.0f") for made in runs[factor].values()]
        prior = f"{kl_divergence(truth.log_target, truth.log_prior):.2f}"
        kl = [mean_of([run["kl"] for run in runs[factor][method]], ".2f", ".2f") for method in ours]
        table.rows.append((factor, [f"{truth.strong.sum():,}", *found, prior, *kl]))
    return table


def _seeds(runs: Runs) -> str:
    (made, *_) = next(iter(runs.values())).values()
    return f"means over seeds {[run['seed'] for run in made]}"


def draw(truths: Mapping[str, Truth], runs: Runs, path: Path) -> None:
    """Sequence logos: the height of a base is its share of the place's information, bits; p_T above, ours below."""
    ours = {factor: next((made for made in runs[factor].values() if "bases" in made[0]), None) for factor in truths}
    names = [[f"{factor}, {what}" for factor in truths] for what in ("p_T", "model")]
    with figure(path, names, (2.2 * len(truths) + 1, 4)) as axes:
        for factor, truth in truths.items():
            made = ours[factor]
            logo(axes[f"{factor}, p_T"], np.array(truth.bases(truth.log_target)))
            if made is not None:
                logo(axes[f"{factor}, model"], np.array(made[0]["bases"]))
        highest = max(each.get_ylim()[1] for each in axes.values())
        for name, each in axes.items():
            each.set_title(name, fontsize=7)
            each.set_ylim(0, highest)


def logo_image(completions: Sequence[str], weights: Sequence[float]) -> str:
    """A logo of weighted sequences, for a run's report: see [`aldrift_hf.reporting.report.Picture`]."""
    bases = np.zeros((LENGTH, len(BASES)))
    for text, weight in zip(completions, weights):
        sequence = text.split(" ")
        if len(sequence) == LENGTH and {*sequence} <= {*BASES}:
            bases[range(LENGTH), [BASES.index(base) for base in sequence]] += weight
    if not bases.any():
        return "no sequence"
    file = io.StringIO()
    with styled():
        sheet = Figure((3.0, 1.5), layout="constrained")
        logo(sheet.subplots(), bases)
        sheet.savefig(file, format="svg")
    return f'<img alt="sequence logo" src="data:image/svg+xml;base64,{b64encode(file.getvalue().encode()).decode()}">'


def logo(axes: Any, bases: np.ndarray) -> None:
    """Draw one logo."""
    shares = bases / bases.sum(1, keepdims=True)
    information = np.log2(len(BASES)) + (shares * np.log2(np.maximum(shares, 1e-12))).sum(1, keepdims=True)
    places = np.arange(1, len(bases) + 1)
    logomaker.Logo(pd.DataFrame(shares * information, index=places, columns=[*BASES]), ax=axes)
    axes.set_ylabel("bits")
    axes.set_xlabel("place")
