"""Coverage of maximum-likelihood fits, compared with closed forms and SciPy; and the recipe."""

import math
import sys
from importlib import util
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import fuzz
from evaluation import suprema as theory
from hypothesis import example, given
from scipy import integrate, optimize, special, stats

RECIPE = Path(__file__).parents[1] / "recipes" / "coarse_learnability.py"
NORMAL = theory.even_mixture(1, 1.0)
THREE = theory.even_mixture(3, 4.0)

quick = fuzz(40)
few_centres = st.lists(st.floats(-10, 10), min_size=1, max_size=4)


def mixture(centres, width=1.0):
    return theory.GaussianMixture(np.array(centres, dtype=float), width)


def log_density(m, x):
    """The log-density by SciPy alone."""
    return special.logsumexp(stats.norm.logpdf(x, m.centres[:, None], m.width), axis=0) - math.log(len(m.centres))


def blind_log_supremum(p, q, reach):
    """The supremum by Nelder-Mead searches from every local maximum of a wide grid, with SciPy's densities."""

    def negative(x):
        return -(log_density(p, x) - log_density(q, x))

    grid = np.linspace(-reach, reach, 4_000)
    values = negative(grid)
    starts = 1 + np.flatnonzero((values[1:-1] <= values[:-2]) & (values[1:-1] <= values[2:]))
    simplex = {"xatol": 1e-7, "fatol": 1e-12}
    searches = [optimize.minimize(negative, grid[i], method="Nelder-Mead", options=simplex) for i in starts]
    return -min(search.fun for search in searches)


@quick
@given(st.floats(-5, 5), st.floats(1.01, 50))
def test_two_gaussians(mean, width):
    """`sup N(0, 1) / N(μ, s²) = s exp(μ² / (2 (s² - 1)))`: s where the means agree."""
    expected = math.log(width) + mean**2 / (2 * (width**2 - 1))
    assert theory.log_supremum(NORMAL, mixture([mean], width)) == pytest.approx(expected, rel=1e-9)
    assert theory.log_supremum(NORMAL, mixture([0], width)) == pytest.approx(math.log(width), rel=1e-9)


@quick
@given(few_centres, st.floats(0.1, 0.99))
def test_a_narrower_model_loses_the_tails(centres, width):
    assert theory.log_supremum(NORMAL, mixture(centres, width)) == math.inf
    assert theory.log_supremum(NORMAL, mixture([0], width), region=(-3, 3)) == pytest.approx(
        math.log(width) + 4.5 * (1 / width**2 - 1)
    )


def test_equal_widths_need_a_region():
    with pytest.raises(ValueError, match="equal width"):
        theory.log_supremum(NORMAL, mixture([0.5]))
    assert theory.log_supremum(NORMAL, mixture([0.5]), region=(-2, 2)) == pytest.approx(1 + 0.125)


@pytest.mark.slow
@quick
@given(few_centres, few_centres, st.floats(0.5, 2), st.floats(1.1, 5))
def test_supremum_meets_a_blind_search(centres, model_centres, width, wider):
    p, q = mixture(centres, width), mixture(model_centres, width * wider)
    expected = blind_log_supremum(p, q, reach=25 * wider**2 / (wider**2 - 1))
    assert theory.log_supremum(p, q) == pytest.approx(expected, abs=1e-6)


def test_the_highest_of_nearly_equal_peaks_is_found():
    p, q = mixture([5, -4]), mixture([0, 5, -4], 1.25)
    assert theory.log_supremum(p, q) == pytest.approx(blind_log_supremum(p, q, reach=60), abs=1e-6)


def test_supremum_of_a_very_wide_mixture():
    """There is a peak as narrow as a component at every centre, thousands of widths from the next."""
    p = mixture([-9_000, -1_234.5, 4_321.7, 8_000])
    q = mixture([-9_000, 8_000], 5_000)
    peaks = [blind_log_supremum(mixture(p.centres - c), mixture(q.centres - c, q.width), reach=20) for c in p.centres]
    assert theory.log_supremum(p, q) == pytest.approx(max(peaks), abs=1e-6)


def test_the_widest_gap_between_narrow_kernels_is_found():
    """The middle of the first gap is a point of an even grid. That of the last gap, slightly wider, is not."""
    q = mixture([0, 0.5, 0.50125, 1.00175], 0.01)
    first, last = (np.linspace(middle - 0.002, middle + 0.002, 10_001) for middle in (0.25, 0.7515))
    lower, higher = ((log_density(NORMAL, x) - log_density(q, x)).max() for x in (first, last))
    assert lower + 0.1 < higher
    assert theory.log_supremum(NORMAL, q, (0, 1.00175)) == pytest.approx(higher, abs=1e-4)


@pytest.mark.parametrize("factor", [0.01, 0.125, 0.5, 1, 4])
def test_supremum_of_a_kernel_density_meets_a_blind_search(factor):
    """Over a region: with narrow kernels the peaks are in the gaps between samples."""
    samples = THREE.sample(60, np.random.default_rng(0))
    q, region = theory.kernel_density(samples, factor * theory.silverman(samples)), THREE.central_region(59 / 60)
    coarse = np.linspace(*region, 20_000)
    best = np.argsort(log_density(THREE, coarse) - log_density(q, coarse))[-50:]
    step = coarse[1] - coarse[0]
    fine = np.clip(np.linspace(coarse[best] - step, coarse[best] + step, 501).ravel(), *region)
    expected = (log_density(THREE, fine) - log_density(q, fine)).max()
    assert theory.log_supremum(THREE, q, region) == pytest.approx(expected, abs=0.01)


@quick
@given(few_centres, few_centres, st.floats(1.1, 5), st.floats(0.01, 100), st.floats(-100, 100))
@example([0], [6, -9], 1.25, 1, 0)  # a peak between q's centres, sharp and beside their middle: a grid is too coarse
@example([0], [6, -8], 1.25, 2, 0)
def test_supremum_does_not_depend_on_units(centres, model_centres, wider, scale, shift):
    p, q = mixture(centres), mixture(model_centres, wider)
    moved_p, moved_q = (mixture(shift + scale * m.centres, scale * m.width) for m in (p, q))
    everywhere = theory.log_supremum(p, q)
    assert everywhere >= 0, "the ratio of two densities is at least 1 somewhere"
    assert theory.log_supremum(moved_p, moved_q) == pytest.approx(everywhere, abs=1e-6)
    assert theory.log_supremum(p, q, p.central_region(0.9)) <= everywhere + 1e-9


def test_mixtures_far_from_zero_lose_no_digits():
    near, far = ((mixture([c, c + 2], 0.5), mixture([c + 0.5], 1.0)) for c in (0.0, 2.0**27))
    assert theory.log_supremum(*far) == pytest.approx(theory.log_supremum(*near), abs=1e-9)


def test_a_barely_wider_model_is_covered_far_outside():
    """The supremum is hundreds of thousands of widths away; the closed form and the result are both large."""
    width = math.sqrt(1 + 1e-5)
    assert theory.log_supremum(NORMAL, mixture([2.0], width)) == pytest.approx(2e5, rel=1e-4)


@pytest.mark.parametrize("m", [NORMAL, THREE, mixture([-3, 0, 0.5, 9], 0.3)])
def test_mixture_is_a_distribution(m):
    ends = m.centres.min() - 12 * m.width, m.centres.max() + 12 * m.width

    def integral(power):
        return integrate.quad(lambda x: x**power * math.exp(m.log_density(np.array([x]))[0]), *ends, limit=200)[0]

    assert integral(0) == pytest.approx(1)
    assert integral(1) == pytest.approx(m.mean, abs=1e-9)
    assert integral(2) - integral(1) ** 2 == pytest.approx(m.variance)
    grid = np.linspace(*ends, 50)
    np.testing.assert_allclose(m.log_density(grid), log_density(m, grid))

    def distribution(x):
        return stats.norm.cdf(x, m.centres[:, None], m.width).mean(axis=0)

    for level in (1e-5, 0.3, 0.5, 0.999):
        assert distribution(m.quantile(level)) == pytest.approx(level, rel=1e-6)
    assert distribution(np.array(m.central_region(0.9))) == pytest.approx([0.05, 0.95])
    assert stats.kstest(m.sample(4_000, np.random.default_rng(0)), distribution).pvalue > 1e-3


def test_long_vectors_are_worked_on_in_blocks(monkeypatch):
    x = np.linspace(-9, 9, 101)
    whole = THREE.log_density(x)
    monkeypatch.setattr(theory, "BLOCK", 7)
    np.testing.assert_array_equal(THREE.log_density(x), whole)


def test_even_mixture():
    np.testing.assert_allclose(theory.even_mixture(4, 2.0).centres, [-3, -1, 1, 3])
    assert [theory.even_mixture(1, separation).centres.tolist() for separation in (1, 64)] == [[0], [0]]


@quick
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=20).filter(lambda values: np.std(values) > 1e-3))
def test_one_gaussian_is_scipys_maximum_likelihood_fit(values):
    fitted = theory.fit_gaussian(np.array(values))
    mean, width = stats.norm.fit(values)
    assert (fitted.mean, fitted.width) == pytest.approx((mean, width))


def test_one_gaussian_tends_to_the_infinite_sample_fit():
    fitted = theory.fit_gaussian(THREE.sample(200_000, np.random.default_rng(0)))
    limit = theory.infinite_sample_gaussian(THREE)
    assert (fitted.mean, fitted.width) == pytest.approx((limit.mean, limit.width), abs=0.03)
    assert limit.width == pytest.approx(math.sqrt(1 + 2 / 3 * 4**2))
    assert theory.log_supremum(THREE, fitted) == pytest.approx(theory.log_supremum(THREE, limit), abs=0.02)


@pytest.mark.parametrize("components", [2, 3, 6])
def test_linear_growth_with_separation(components):
    p = theory.even_mixture(components, 300.0)
    ratio = math.exp(theory.log_supremum(p, theory.infinite_sample_gaussian(p)))
    assert ratio / 300 == pytest.approx(theory.wide_separation_constant(components), rel=1e-3)


@quick
@given(st.integers(2, 12), st.floats(1, 100))
def test_infinite_sample_fit_stays_below_the_envelope(components, separation):
    p = theory.even_mixture(components, separation)
    supremum = theory.log_supremum(p, theory.infinite_sample_gaussian(p))
    assert supremum < math.log(theory.envelope(components, separation))
    assert theory.envelope(components, separation) == pytest.approx(separation * math.e**components)


@pytest.mark.parametrize("tilt", [-800.0, -40.0, -2.0, -5e-4, 0.0, 1e-9, 5e-4, 2.0, 40.0, 800.0])
def test_tilted_uniform_is_a_distribution(tilt):
    p = theory.TiltedUniform(tilt)
    peak = 1.0 if tilt > 0 else 0.0
    inner = [abs(peak - 20 / max(abs(tilt), 40))]

    def integral(power):
        return integrate.quad(
            lambda x: x**power * math.exp(p.log_density(np.array([x]))[0]), 0, 1, points=inner, epsabs=1e-13
        )[0]

    assert integral(0) == pytest.approx(1)
    assert integral(1) == pytest.approx(p.mean, rel=1e-9)
    draws = p.sample(4_000, np.random.default_rng(0))
    assert 0 <= draws.min() <= draws.max() <= 1
    if abs(tilt) >= 2:
        reference = stats.truncexpon(b=abs(tilt), scale=1 / abs(tilt))
        assert stats.kstest(1 - draws if tilt > 0 else draws, reference.cdf).pvalue > 1e-3


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20).filter(lambda values: 1e-3 < np.mean(values) < 0.999))
def test_tilt_solves_the_moment_equation_and_is_most_likely(values):
    samples = np.array(values)
    fitted = theory.fit_tilt(samples)
    assert fitted.mean == pytest.approx(samples.mean(), abs=1e-9)
    likelihood = fitted.log_density(samples).mean()
    for step in (-0.1, 0.1):
        assert theory.TiltedUniform(fitted.tilt + step).log_density(samples).mean() < likelihood


@pytest.mark.parametrize("mean", [1e-9, 0.005, 0.995, 1 - 1e-9])
def test_tilt_of_an_extreme_mean(mean):
    """Here `A'(θ) = 1 - 1/θ`, or its mirror image, up to rounding."""
    assert theory.fit_tilt(np.array([mean])).mean == pytest.approx(mean, rel=1e-9)


@quick
@given(st.floats(-50, 50), st.floats(-50, 50))
def test_supremum_of_two_tilts(a, b):
    p, q = theory.TiltedUniform(a), theory.TiltedUniform(b)
    grid = np.linspace(0, 1, 101)
    expected = (p.log_density(grid) - q.log_density(grid)).max()
    assert theory.tilt_log_supremum(p, q) == pytest.approx(expected, abs=1e-9)
    assert theory.tilt_log_supremum(p, p) == 0


def test_realizable_fit_converges_at_the_parametric_rate():
    """To first order `log sup p/L` is |θ - θ'| times p's mean or its complement; θ' has variance `1 / (m A''(θ))`."""
    p, rng = theory.TiltedUniform(2.0), np.random.default_rng(0)
    curvature = (theory.TiltedUniform(2.001).mean - theory.TiltedUniform(1.999).mean) / 0.002
    for m in (1_000, 16_000):
        fits = [theory.tilt_log_supremum(p, theory.fit_tilt(p.sample(m, rng))) for _ in range(400)]
        expected = math.sqrt(2 / math.pi / (m * curvature)) / 2  # the factor's mean is 1/2 for either sign
        assert np.mean(fits) == pytest.approx(expected, rel=0.15)


@quick
@given(st.lists(st.floats(-20, 20), min_size=3, max_size=30).filter(lambda values: np.std(values) > 0.1))
def test_kernel_density_is_scipys(values):
    samples = np.array(values)
    reference = stats.gaussian_kde(samples, bw_method="silverman")
    bandwidth = theory.silverman(samples)
    assert bandwidth == pytest.approx(math.sqrt(reference.covariance.item()))
    x = np.linspace(-25, 25, 20)
    np.testing.assert_allclose(theory.kernel_density(samples, bandwidth).log_density(x), reference.logpdf(x), rtol=1e-6)


def test_coverage_by_bandwidth():
    """Over all reals the kernels must be wider than the components; over the bulk, very narrow kernels fail by far."""
    samples = THREE.sample(2_000, np.random.default_rng(0))
    region = THREE.central_region(1 - 1 / 2_000)
    everywhere, central = (
        {h: theory.log_supremum(THREE, theory.kernel_density(samples, h), within) for h in (0.05, 0.9, 1.1, 3)}
        for within in (None, region)
    )
    assert [math.isinf(everywhere[h]) for h in (0.05, 0.9, 1.1, 3)] == [True, True, False, False]
    assert everywhere[3] < math.log(5)
    assert central[0.05] > math.log(100) > math.log(5) > max(central[h] for h in (0.9, 1.1, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mixture([]), "finite centres"),
        (lambda: mixture([0, math.nan]), "finite centres"),
        (lambda: mixture([[0, 1]]), "vector"),
        (lambda: mixture([0], 0), "width must be positive"),
        (lambda: mixture([0], math.inf), "width must be positive"),
        (lambda: theory.fit_gaussian(np.ones(3)), "width must be positive"),
        (lambda: theory.TiltedUniform(math.inf), "tilt must be finite"),
        (lambda: theory.fit_tilt(np.zeros(3)), r"inside \(0, 1\), got 0.0"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Runs the recipe in this process and returns its output directory. `recipe.module` is its module."""
    spec = util.spec_from_file_location("coarse_learnability_recipe", RECIPE)
    module = util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    def run(*flags):
        small = ["--separations", "1", "8", "32", "--sample_sizes", "8", "64", "512", "--repeats", "3"]
        monkeypatch.setattr(sys, "argv", [str(RECIPE), "--output_dir", str(tmp_path / "out"), *small, *flags])
        module.main()
        return tmp_path / "out"

    run.module = module
    return run


@pytest.mark.slow
def test_recipe(recipe, capsys):
    folder = recipe()
    out = " ".join(capsys.readouterr().out.split())
    for words in ("m = 512", "(a) Δ = 32", "(b) θ = 2", "(c) 0.125 h_S", "limit: 0.576 Δ", "20.1 Δ", "theory: m^-0.5"):
        assert words in out, words
    assert (folder / "coarse_learnability.png").stat().st_size > 30_000


def test_recipe_repeats_itself(recipe):
    def fits(seed):
        options = recipe.module.CoarseLearnabilityArguments(sample_sizes=[8, 32], repeats=2, seed=seed)
        return recipe.module.measure(options).gaussian.tolist()

    assert fits(1) == fits(1) != fits(2)


@pytest.mark.slow
def test_recipe_survives_infinite_fits(recipe, capsys):
    """With two samples a fit is often narrower than a component."""
    folder = recipe("--sample_sizes", "2", "512", "--separations", "0.5", "1", "--components", "2")
    out = capsys.readouterr().out
    assert "inf (inf-inf)" in out
    assert "nan" not in out
    assert (folder / "coarse_learnability.png").is_file()


def test_other_processes_are_silent(recipe, capsys, monkeypatch):
    monkeypatch.setattr(recipe.module, "PartialState", lambda cpu: type("State", (), {"is_main_process": False}))
    assert not recipe().exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sample_sizes", "1", "8"], "--sample_sizes: give two or more increasing values above 1"),
        (["--separations", "4"], "--separations: give two or more"),
        (["--separations", "4", "2"], "--separations: give two or more increasing"),
        (["--components", "1"], "--components must be at least 2"),
        (["--repeats", "0"], "--repeats at least 1"),
    ],
)
def test_recipe_refuses_bad_settings_in_one_line(recipe, flags, message):
    with pytest.raises(SystemExit, match=message):
        recipe(*flags)


def test_recipe_help_explains(recipe, capsys):
    with pytest.raises(SystemExit):
        recipe("--help")
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "k, the number of Gaussians in the mixtures",
        "the figure are written to",
        "m, the number of samples per fit",
    ):
        assert words in text
