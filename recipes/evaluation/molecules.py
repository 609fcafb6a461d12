"""Molecules as an optimiser's problem, as the PMO benchmark counts, and as a sampler's: measures, tables, figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from problems.molecules import FINGERPRINTS, MoleculeProblem, canonical_smiles
from rdkit import Chem
from rdkit.Chem import Draw
from rdkit.DataStructs import BulkTanimotoSimilarity

from evaluation.figures import figure
from evaluation.kept_runs import Run
from evaluation.molecule_target import Target, scaffold
from evaluation.tables import Comparison, mean_of

EVERY = 100
"""Evaluations between two values of a curve."""
TOP = 10
"""The molecules whose mean score a curve shows."""
GOOD = 0.8
"""Score of a molecule whose scaffold counts."""
SHOWN = 12
"""Molecules in a picture of a report."""
DRAWS = 2048
"""Draws of a final model."""
Runs = Mapping[str, Mapping[str, list[Run]]]
"""By objective and method; those of one method differ in the seed."""


# ---- Measures --------------------------------------------------------------------------------------------------------


def search(values: Mapping[str, float], budget: int) -> dict[str, Any]:
    """The measures of what was found with the first `budget` evaluations.

    Args:
        values: the score of each distinct molecule, in the order of evaluation.
        budget: evaluations that were allowed.
    """
    found = dict([*values.items()][:budget])
    ranked = sorted(found, key=found.__getitem__, reverse=True)
    curve = top_curve([*found.values()], budget)
    return {
        "calls": len(found),
        "auc": area(curve, budget),
        "auc_1000": area(curve[: 1000 // EVERY], min(budget, 1000)),
        "top": curve[-1],
        "diversity": diversity(ranked[:100]),
        "scaffolds": len({scaffold(each) for each in ranked if found[each] >= GOOD}),
        "curve": [round(value, 4) for value in curve],
        "best": [[each, round(found[each], 4)] for each in ranked[:TOP]],
    }


def places(budget: int) -> list[int]:
    """The numbers of evaluations that a curve has values at."""
    return [*range(EVERY, budget, EVERY), budget]


def top_curve(scores: Sequence[float], budget: int) -> list[float]:
    """The mean of the 10 best scores after every 100 evaluations; what a run left of its budget changes nothing."""
    return [statistics.mean(sorted(scores[:place], reverse=True)[:TOP]) for place in places(budget)]


def area(curve: Sequence[float], budget: int) -> float:
    """The mean height of a curve that begins at 0, by trapezoids: PMO's AUC."""
    return float(np.trapezoid([0.0, *curve], [0, *places(budget)])) / budget


def diversity(smiles: Sequence[str]) -> float:
    """The mean distance between two of the molecules: 1 less the Tanimoto similarity of their ECFP4 bits."""
    prints = [FINGERPRINTS["ECFP4"].GetFingerprint(Chem.MolFromSmiles(each)) for each in smiles]
    pairs = [BulkTanimotoSimilarity(prints[place], prints[:place]) for place in range(1, len(prints))]
    return 1 - statistics.mean(value for row in pairs for value in row) if pairs else 0.0


def draws_measured(problem: MoleculeProblem, texts: Sequence[str], evaluate: bool = True) -> dict[str, float]:
    """Measures of a final model's draws: the share of molecules, of distinct ones among these, and their mean score.

    Args:
        problem: with the scores of the molecules that its run has evaluated.
        texts: the draws.
        evaluate: whether the others are scored for the mean; otherwise it is left out.
    """
    valid = [canonical for text in texts if (canonical := canonical_smiles(text)) is not None]
    shares = {"valid": len(valid) / len(texts), "unique": len({*valid}) / max(len(valid), 1)}
    if not evaluate:
        return shares
    known = {
        each: problem.values[each] if each in problem.values else problem.score(Chem.MolFromSmiles(each))
        for each in {*valid}
    }
    return shares | {"mean_score": sum(known[each] for each in valid) / len(texts)}


# ---- Tables and figures ----------------------------------------------------------------------------------------------


def table(made: Runs, budget: int) -> Comparison:
    """A row per method: AUC by objective, their sum, and what else was asked of the runs."""
    comparison = Comparison(
        f"AUC of the {TOP} best, {budget:,} molecules",
        [*made, "sum", "sum at 1,000", "diversity", "scaffolds", "CPU s"],
    )
    for method in next(iter(made.values())):
        runs = [each[method] for each in made.values()]
        cells = [mean_of([run["auc"] for run in each], ".3f", ".3f") for each in runs]
        for measure in ("auc", "auc_1000"):
            sums = [sum(run[measure] for run in of_seed) for of_seed in zip(*runs)]
            cells.append(mean_of(sums, ".3f", ".3f"))
        everything = [run for each in runs for run in each]
        for measure, spec in (("diversity", ".2f"), ("scaffolds", ",.0f"), ("cpu_seconds", ",.0f")):
            cells.append(mean_of([run[measure] for run in everything], spec))
        comparison.rows.append((f"{method} {runs[0][0]['setting']}".strip(), cells))
    return comparison


def distances(name: str, target: Target, runs: Sequence[Run]) -> Comparison:
    """The sampler's question, on one objective: a row per method.

    Args:
        name: the objective.
        target: the draws of p_T.
        runs: one of each method.
    """
    known = f"{target.effective:.0f} effective draws of it, log Z {target.log_z:.1f}"
    columns = ["KL(p_T‖q), nats", "± error", "p_T with a scaffold among 2,048 draws", "mean score", "valid", "distinct"]
    comparison = Comparison(f"{name}: distance from p_T ({known})", columns)
    comparison.rows.append(("prior", [f"{target.kl_of_prior:.2f}", *[""] * (len(columns) - 1)]))
    for run in runs:
        cells = [f"{run['kl']:.2f}", f"{run['kl_error']:.2f}", f"{run['scaffolds_known']:.2f}"]
        mean = f"{run['mean_score']:.3f}" if "mean_score" in run else ""
        cells += [mean, f"{run['valid']:.3f}", f"{run['unique']:.3f}"]
        comparison.rows.append((f"{run['method']} {run['setting']}", cells))
    return comparison


def draw(made: Runs, budget: int, path: Path) -> None:
    """The mean score of the 10 best so far against the evaluations, the mean over seeds, a panel per objective."""
    names = [*made]
    rows = [names[place : place + 3] for place in range(0, len(names), 3)]
    rows[-1] += ["."] * (len(rows[0]) - len(rows[-1]))
    with figure(path, rows, (4.0 * len(rows[0]), 3.0 * len(rows))) as axes:
        for name, by_method in made.items():
            for method, runs in by_method.items():
                curve = [*map(statistics.mean, zip(*(run["curve"] for run in runs)))]
                axes[name].plot(places(budget), curve, label=method)
            axes[name].set_title(name, fontsize=8)
            axes[name].set_xlabel("molecules evaluated")
            axes[name].set_ylabel(f"mean score of the {TOP} best")
        axes[names[0]].legend(fontsize=6)


def molecules_svg(completions: Sequence[str], weights: Sequence[float]) -> str:
    """The molecules of the largest weight, for a run's report: see [`aldrift_hf.reporting.report.Picture`]."""
    total: dict[str, float] = {}
    for text, weight in zip(completions, weights):
        if (smiles := canonical_smiles(text)) is not None:
            total[smiles] = total.get(smiles, 0.0) + weight
    shown = sorted(total, key=total.__getitem__, reverse=True)[:SHOWN]
    if not shown:
        return "no molecule"
    grid = Draw.MolsToGridImage(
        [Chem.MolFromSmiles(smiles) for smiles in shown],
        molsPerRow=min(4, len(shown)),
        subImgSize=(200, 150),
        legends=[f"{total[smiles]:.1%}" if len(total) > 1 else "" for smiles in shown],
        useSVG=True,
    )
    return str(grid).partition("?>")[2]  # without the declaration, which HTML does not have


def picture(made: Runs, path: Path) -> None:
    """The best molecule that each method found, a row per objective."""
    best = [runs[0]["best"][0] for by_method in made.values() for runs in by_method.values()]
    labels = [f"{name}, {method}" for name, by_method in made.items() for method in by_method]
    image = Draw.MolsToGridImage(
        [Chem.MolFromSmiles(smiles) for smiles, _ in best],
        molsPerRow=len(next(iter(made.values()))),
        legends=[f"{label}: {score:.2f}" for label, (_, score) in zip(labels, best)],
    )
    image.save(path)
