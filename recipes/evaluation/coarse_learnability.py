"""How well a maximum-likelihood fit `L` covers what it was fitted to: `log sup_x p(x) / L(x)`, exactly.

Three settings on the real line, without a language model: one Gaussian fitted to a mixture of Gaussians (its family
does not hold p), a tilted uniform fitted to another (it does), and a Gaussian kernel density estimate of the mixture.
The first and the last are themselves mixtures of equally wide Gaussians, so that one supremum serves both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

STEPS_A_WIDTH = 4  # of the grid, among the centres
NEAR_BEST = 0.1  # nats
EVEN_POINTS = 64  # of the grid, over all of a region: it is vast where L is barely wider than p, but p/L smooth there
BLOCK = 1 << 17  # numbers in the largest array that a density makes: more do not stay in the cache


@dataclass(frozen=True)
class GaussianMixture:
    """`(1/k) Σ_i N(c_i, w²)`: Gaussians of one width and equal weights.

    Attributes:
        centres: `[k]`, the c_i.
        width: w, the components' standard deviation.

    Raises:
        ValueError: if there are no centres, one is not finite, or the width is not positive and finite.
    """

    centres: np.ndarray
    width: float = 1.0

    def __post_init__(self) -> None:
        if self.centres.ndim != 1 or len(self.centres) == 0 or not np.isfinite(self.centres).all():
            raise ValueError("a mixture needs a vector of finite centres")
        if not 0 < self.width < math.inf:
            raise ValueError(f"a mixture's width must be positive and finite, not {self.width}")

    @property
    def mean(self) -> float:
        """The mean of the c_i."""
        return float(self.centres.mean())

    @property
    def variance(self) -> float:
        """`w²` and the variance of the c_i."""
        return float(self.width**2 + self.centres.var())

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """`[n]` natural logarithms of the density at `x`, `[n]`."""
        rows = max(1, BLOCK // len(self.centres))
        blocks = [self._log_sum(x[start : start + rows]) for start in range(0, len(x), rows)]
        return np.concatenate(blocks) - math.log(len(self.centres) * self.width * math.sqrt(2 * math.pi))

    def _log_sum(self, x: np.ndarray) -> np.ndarray:
        """`log Σ_i exp(-(x - c_i)² / 2w²)`; by hand, as SciPy's logsumexp takes three times as long."""
        exponent = -0.5 * ((x[:, None] - self.centres) / self.width) ** 2
        largest = exponent.max(axis=1)
        result: np.ndarray = largest + np.log(np.exp(exponent - largest[:, None]).sum(axis=1))
        return result

    def quantile(self, level: float) -> float:
        """Where the distribution function reaches `level`, in (0, 1)."""
        around = self.width * special.ndtri(level)
        low, high = self.centres.min() + around, self.centres.max() + around  # the outermost components' quantiles
        if low == high:
            return float(low)
        return float(optimize.brentq(lambda x: special.ndtr((x - self.centres) / self.width).mean() - level, low, high))

    def central_region(self, share: float) -> tuple[float, float]:
        """The interval that leaves `(1 - share) / 2` of the mass on either side; `share` in (0, 1)."""
        return self.quantile((1 - share) / 2), self.quantile((1 + share) / 2)

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """`[count]` independent draws."""
        return rng.choice(self.centres, count) + self.width * rng.standard_normal(count)


def even_mixture(components: int, separation: float) -> GaussianMixture:
    """`components` unit-variance Gaussians around 0, neighbouring centres `separation` apart."""
    return GaussianMixture((np.arange(components) - (components - 1) / 2) * separation)


def fit_gaussian(samples: np.ndarray) -> GaussianMixture:
    """The Gaussian of largest likelihood: the mean and the standard deviation (divisor m) of samples `[m]`."""
    return GaussianMixture(np.array([samples.mean()]), float(samples.std()))


def infinite_sample_gaussian(p: GaussianMixture) -> GaussianMixture:
    """The limit of `fit_gaussian` on ever more samples of p: p's own mean and variance."""
    return GaussianMixture(np.array([p.mean]), math.sqrt(p.variance))


def envelope(components: int, separation: float) -> float:
    """`Δ e^k`: the order of the ratio's bound for one Gaussian fitted to k components."""
    return separation * math.exp(components)


def wide_separation_constant(components: int) -> float:
    """`lim (sup p/L) / Δ` as Δ grows, of the infinite-sample Gaussian and an even mixture of k components.

    The supremum moves to the outermost centres, `Δ (k-1) / 2` from the mean, where p is its component's
    `1 / (k sqrt(2π))`; with `s² = 1 + Δ² (k²-1) / 12`, the limit is `sqrt((k²-1) / 12) / k · exp(3 (k-1) / (2 (k+1)))`.
    It stays below 1.3 for every k: an even spacing is far from the envelope.
    """
    k = components
    return math.sqrt((k * k - 1) / 12) / k * math.exp(1.5 * (k - 1) / (k + 1))


def silverman(samples: np.ndarray) -> float:
    """Silverman's bandwidth, `s (3m/4)^(-1/5)`, s the samples' standard deviation (divisor m - 1)."""
    return float(samples.std(ddof=1) * (0.75 * len(samples)) ** -0.2)


def kernel_density(samples: np.ndarray, bandwidth: float) -> GaussianMixture:
    """The Gaussian kernel density estimate: a component on every sample."""
    return GaussianMixture(samples, bandwidth)


def log_supremum(p: GaussianMixture, q: GaussianMixture, region: tuple[float, float] | None = None) -> float:
    """`log sup_x p(x) / q(x)` in nats, over an interval, or over all reals where `region` is None.

    With widths w of p and h of q, far out `log p/q` is `(1/h² - 1/w²) x² / 2` and lower orders. So over all reals the
    supremum is infinite where h < w, and finite where h > w. It is then taken inside `stationary_region`.

    A bounded search between a grid point's neighbours refines every local maximum of the grid within `NEAR_BEST` of its
    best. For a single Gaussian q, `(log p/q)'' >= 1/h² - 1/w²`, so that among the centres no peak is 0.01 nats above
    the grid point nearest to it, and none is missed.

    Raises:
        ValueError: if `region` is None and the widths are equal, when the centres would have to decide.
    """
    if region is None:
        if q.width == p.width:
            raise ValueError("over all reals, p and q of equal width are not covered: give a region")
        if q.width < p.width:
            return math.inf
        region = stationary_region(p, q)

    def log_ratio(x: np.ndarray) -> np.ndarray:
        difference: np.ndarray = p.log_density(x) - q.log_density(x)
        return difference

    grid = _grid(p, q, region)
    values = log_ratio(grid)
    walled = np.concatenate([[-math.inf], values, [-math.inf]])
    peaks = (values >= walled[:-2]) & (values >= walled[2:]) & (values >= values.max() - NEAR_BEST)
    before, after = np.concatenate([grid[:1], grid[:-1]]), np.concatenate([grid[1:], grid[-1:]])
    refined = [
        optimize.minimize_scalar(
            lambda x: -log_ratio(np.array([x]))[0], bounds=bounds, method="bounded", options={"xatol": 1e-9}
        ).fun
        for bounds in zip(before[peaks], after[peaks], strict=True)
    ]
    return float(max(values.max(), -min(refined)))


def stationary_region(p: GaussianMixture, q: GaussianMixture) -> tuple[float, float]:
    """An interval that holds every stationary point of p/q, where q's width h exceeds p's width w.

    `(log p/q)' = 0` reads `x = (h² c - w² d) / (h² - w²)`, with c and d the components' centres averaged by their
    shares in p(x) and q(x): each lies between the outermost centres of its mixture.
    """
    w2, h2 = p.width**2, q.width**2
    low = (h2 * p.centres.min() - w2 * q.centres.max()) / (h2 - w2)
    high = (h2 * p.centres.max() - w2 * q.centres.min()) / (h2 - w2)
    return float(low), float(high)


def _grid(p: GaussianMixture, q: GaussianMixture, region: tuple[float, float]) -> np.ndarray:
    """Sorted points of the region: evenly spaced, densely among the centres, and the middles of q's gaps.

    Between two kernels further apart than twice their width q has a minimum, and for narrow kernels p/q a sharp peak.
    """
    low, high = region
    centres = np.sort(q.centres)
    first, last = min(centres[0], p.centres.min()), max(centres[-1], p.centres.max())
    among = np.arange(max(low, first), min(high, last), min(p.width, q.width) / STEPS_A_WIDTH)
    middles = ((centres[1:] + centres[:-1]) / 2)[np.diff(centres) > 2 * q.width]
    inside = middles[(middles > low) & (middles < high)]
    return np.unique(np.concatenate([np.linspace(low, high, EVEN_POINTS), among, inside]))


@dataclass(frozen=True)
class TiltedUniform:
    """The exponential family `p_θ(x) = exp(θx - A(θ))` on [0, 1], with `A(θ) = log((e^θ - 1) / θ)`.

    Attributes:
        tilt: θ; 0 is the uniform distribution.

    Raises:
        ValueError: if θ is not a finite number.
    """

    tilt: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.tilt):
            raise ValueError(f"a tilt must be finite, not {self.tilt}")

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """`[n]` natural logarithms of the density at `x`, `[n]`, in [0, 1]."""
        size = abs(self.tilt)
        log_partition = max(self.tilt, 0.0) + (math.log(-math.expm1(-size) / size) if size else 0.0)
        return self.tilt * x - log_partition

    @property
    def mean(self) -> float:
        """`A'(θ) = 1 / (1 - e^-θ) - 1/θ`, increasing in θ."""
        if abs(self.tilt) < 1e-3:  # the two terms cancel; the next term of the series is θ^5 / 30,240
            return 0.5 + self.tilt / 12 - self.tilt**3 / 720
        size = abs(self.tilt)
        above = -1 / math.expm1(-size) - 1 / size
        return above if self.tilt > 0 else 1 - above

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """`[count]` independent draws, through the inverse of the distribution function."""
        u, size = rng.random(count), abs(self.tilt)
        from_zero = -np.log1p(u * math.expm1(-size)) / size if size else u  # of the tilt -|θ|
        return 1 - from_zero if self.tilt > 0 else from_zero


def fit_tilt(samples: np.ndarray) -> TiltedUniform:
    """The tilt of largest likelihood, whose mean is that of samples `[m]`.

    `A'(θ) >= 1 - 1/θ` for positive θ, and its mirror image for negative, bracket the root; by one wider, as it may lie
    within rounding of an end.

    Raises:
        ValueError: if the samples' mean is not inside (0, 1), where no tilt has it.
    """
    mean = float(samples.mean())
    if not 0 < mean < 1:
        raise ValueError(f"samples of a tilted uniform have their mean inside (0, 1), not {mean}")
    low, high = -1 / mean - 1, 1 / (1 - mean) + 1
    return TiltedUniform(float(optimize.brentq(lambda tilt: TiltedUniform(tilt).mean - mean, low, high, xtol=1e-12)))


def tilt_log_supremum(p: TiltedUniform, q: TiltedUniform) -> float:
    """`log sup_x p(x) / q(x)` over [0, 1], in nats: the log-ratio is linear in x, so an end has it."""
    ends = np.array([0.0, 1.0])
    return float((p.log_density(ends) - q.log_density(ends)).max())
