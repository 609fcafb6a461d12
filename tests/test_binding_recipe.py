"""The recipe of binding sites, on sequences of four bases with made-up scores."""

import itertools
import json

import numpy as np
import pytest
from evaluation import binding
from evaluation.binding import logo_image
from problems import binding_sites
from problems.binding_sites import scores

from aldrift_hf.trainer import cycles

FACTORS = ("ONE", "TWO")


def table(seed):
    """Scores of all pairs of a sequence and its reverse complement, as the package has them."""
    rng, lines, seen = np.random.default_rng(seed), ["header"], set()
    for letters in itertools.product("ACGT", repeat=4):
        site = "".join(letters)
        other = site[::-1].translate(str.maketrans("ACGT", "TGCA"))
        if site not in seen:
            lines.append(f"{site}\t{other}\t{rng.random():.3f}")
            seen |= {site, other}
    return "\n".join(lines)


@pytest.fixture
def run(run_recipe, recipe_module, tmp_path, monkeypatch):
    recipe = recipe_module("binding_sites")
    for module in (binding_sites, binding, recipe):
        monkeypatch.setattr(module, "LENGTH", 4)
    monkeypatch.setattr(binding_sites, "FACTORS", ())
    monkeypatch.setattr(cycles, "FEWEST_UPDATES", 2)
    monkeypatch.setattr(cycles, "ROWS_PER_DRAW", 1)
    scores.cache_clear()
    (tmp_path / "cache").mkdir()
    for seed, factor in enumerate(FACTORS):
        (tmp_path / "cache" / f"{factor}_8mers.txt").write_text(table(seed))
    quick = {
        "factors": "ONE TWO",
        "seeds": 0,
        "budget": 60,
        "learning_rates": 3e-3,
        "populations": "4 8",
        "batches": "4 8",
    }
    quick |= {
        "thresholds": 0.1,
        "mutations": 1,
        "prior_steps": 60,
        "round_updates": 2,
        "rung_updates": 2,
        "last_updates": 2,
    }
    yield lambda *flags, **changes: run_recipe("binding_sites", *flags, **quick | changes)
    scores.cache_clear()


@pytest.mark.slow
def test_the_comparison(run, capsys):
    alone = ["aldrift", "genetic_algorithm", "adalead", "cbas", "rloo"]
    methods = [*alone, *(f"{name}+strands" for name in alone if name != "cbas")]
    folder = run("--methods", *methods)
    made = (folder / "runs.jsonl").read_text()
    runs = [json.loads(line) for line in made.splitlines()]
    for method in methods:
        ours = [each for each in runs if each["method"] == method]
        name = method.removesuffix("+strands")
        # The genetic algorithm and AdaLead: two settings on the first factor, and the best one on the other.
        assert len(ours) == (2 if "kl" in ours[0] else 2 + 1)
        # A batch is drawn whole: TRL's are of 64, and those of CbAS of a sixteenth of the budget.
        assert all(0 < each["calls"] < 60 + {"rloo": 64, "cbas": 3}.get(name, 1) for each in ours), method
        assert ("kl" in ours[0]) == (name not in ("genetic_algorithm", "adalead"))
    for each in runs:
        strong = {site for site, score in scores(each["factor"]).items() if score >= 0.9}
        assert 0 <= each["found"] <= min(len(strong), (2 if each["method"].endswith("+strands") else 1) * each["calls"])
        if "kl" in each:
            assert each["kl"] > 0
            well_formed = np.sum(each["bases"], axis=1)
            assert well_formed == pytest.approx(well_formed[0])
            assert 0 < well_formed[0] < 1.001
            assert 0 <= each["strong"] < 1.001
    evolved = [each for each in runs if each["method"] == "genetic_algorithm"]
    assert all(each["calls"] == 60 for each in evolved)
    assert sum(each["found"] for each in evolved) > 3 * 60 * 0.1, "more than by chance"
    written = (folder / "binding_sites.md").read_text()
    assert "| rloo " in written
    assert "| TWO |" in written
    assert (folder / "binding_sites.png").stat().st_size > 10_000
    run("--methods", *methods)
    assert (folder / "runs.jsonl").read_text() == made


def test_an_unknown_method_is_refused(run):
    with pytest.raises(SystemExit, match="--methods ppo: choose from defaults, aldrift, genetic_algorithm"):
        run(methods="ppo")


@pytest.mark.parametrize("budget", [15, 129])
def test_a_budget_that_no_method_can_spend_is_refused(run, budget):
    with pytest.raises(SystemExit, match=f"--budget {budget}: choose 16 to 128, half of all sites"):
        run(budget=budget)


def test_what_a_batch_measures_beyond_the_budget_is_not_known():
    """Of both strands, one is measured."""
    problem = binding.MeasuredSites("SIX6_REF_R1", both_strands=True)
    problem.evaluated.update({"A A A A A A A C": None, "A A A A A A A A": None, "A C A C A C A C": None})
    assert problem.known(2) == {"A A A A A A A C", "G T T T T T T T", "A A A A A A A A", "T T T T T T T T"}
    assert len(problem.known(9)) == 6


@pytest.mark.slow
def test_an_unknown_factor_is_refused(run, monkeypatch):
    def nothing(wheel, wanted):
        raise OSError(f"{wheel} holds 0 files for {next(iter(wanted)).name} instead of one")

    monkeypatch.setattr(binding_sites, "files_of_wheel", nothing)
    with pytest.raises(SystemExit, match=r"holds 0 files for OTHER_8mers\.txt .* names, such as SIX6_REF_R1"):
        run(factors="OTHER")


def test_a_logo_for_the_report():
    """By weight, of whole sequences; in an image, so that its names are its own."""
    whole = ["A C G T A C G T", "A A A A A A A A"]
    image = logo_image([*whole, "A C"], [0.5, 0.25, 0.25])
    assert image.startswith('<img alt="sequence logo" src="data:image/svg+xml;base64,')
    assert image != logo_image([*whole, "A C"], [0.25, 0.5, 0.25])
    assert logo_image(["A C", "X"], [0.5, 0.5]) == "no sequence"
