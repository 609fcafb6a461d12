"""How well a maximum-likelihood fit `L` covers its target `p`: `log sup_x p(x) / L(x)`, computed exactly.

There are three settings on the real line, without a language model: one Gaussian fitted to a mixture of Gaussians (the
family does not contain p), a tilted uniform distribution fitted to another one (the family contains p), and a Gaussian
kernel density estimate of the mixture. In the first and the last, L and p are both mixtures of Gaussians of equal
width, so one function computes the supremum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

FIRST_POINTS = 64
"""Points at equal distances between which the search for a supremum starts."""
PRECISION = 1e-9
"""Nats that a supremum may lack before its last refinement; relative, where it is above 1."""
BLOCK = 1 << 17
"""Size of the largest array that a density computes: larger ones do not fit into the CPU's cache."""


@dataclass(frozen=True)
class GaussianMixture:
    """`(1/k) Σ_i N(c_i, w²)`: Gaussians of equal width and equal weights.

    Attributes:
        centres: `[k]`, the `c_i`.
        width: w, the standard deviation of every component.

    Raises:
        ValueError: if there are no centres, a centre is not finite, or the width is not positive and finite.
    """

    centres: np.ndarray
    width: float = 1.0

    def __post_init__(self) -> None:
        if self.centres.ndim != 1 or len(self.centres) == 0 or not np.isfinite(self.centres).all():
            raise ValueError("a mixture needs a vector of finite centres")
        if not 0 < self.width < math.inf:
            raise ValueError(f"a mixture's width must be positive and finite, got {self.width}")

    @property
    def mean(self) -> float:
        """The mean of the mixture, which is that of the `c_i`."""
        return float(self.centres.mean())

    @property
    def variance(self) -> float:
        """The variance of the mixture: `w²` plus the variance of the `c_i`."""
        return float(self.width**2 + self.centres.var())

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """The log-density at `x`, both `[n]`, nats."""
        total, _ = _log_sum(self, x, self.mean)
        exponent: np.ndarray = total - ((x - self.mean) / self.width) ** 2 / 2
        return exponent - math.log(len(self.centres) * self.width * math.sqrt(2 * math.pi))

    def quantile(self, level: float) -> float:
        """The point at which the distribution function is `level`, which is in (0, 1)."""
        around = self.width * special.ndtri(level)
        low, high = self.centres.min() + around, self.centres.max() + around  # the outermost components' quantiles
        if low == high:
            return float(low)
        return float(optimize.brentq(lambda x: special.ndtr((x - self.centres) / self.width).mean() - level, low, high))

    def central_region(self, share: float) -> tuple[float, float]:
        """The interval that leaves `(1 - share) / 2` of the mass on each side; `share` is in (0, 1)."""
        return self.quantile((1 - share) / 2), self.quantile((1 + share) / 2)

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Independent draws, `[count]`."""
        return rng.choice(self.centres, count) + self.width * rng.standard_normal(count)


def even_mixture(components: int, separation: float) -> GaussianMixture:
    """A mixture of unit-variance Gaussians around 0, whose neighbouring centres are `separation` apart."""
    return GaussianMixture((np.arange(components) - (components - 1) / 2) * separation)


def fit_gaussian(samples: np.ndarray) -> GaussianMixture:
    """The maximum-likelihood Gaussian: mean and standard deviation (divisor m) of samples `[m]`."""
    return GaussianMixture(np.array([samples.mean()]), float(samples.std()))


def infinite_sample_gaussian(p: GaussianMixture) -> GaussianMixture:
    """The limit of [`fit_gaussian`] as the number of samples grows: the mean and the variance of p."""
    return GaussianMixture(np.array([p.mean]), math.sqrt(p.variance))


def envelope(components: int, separation: float) -> float:
    """`Δ e^k`, the order of the upper bound on sup p/L for one Gaussian fitted to k components `Δ` apart."""
    return separation * math.exp(components)


def wide_separation_constant(components: int) -> float:
    """The limit of `(sup p/L) / Δ` as Δ grows, if p is an even mixture of k components and L its infinite-sample fit.

    The supremum moves to the outermost centres, at the distance `Δ (k-1) / 2` from the mean, where the density of p is
    that of one component, `1 / (k sqrt(2π))`. With the fit's variance `1 + Δ² (k²-1) / 12`, the limit is
    `sqrt((k²-1) / 12) / k · exp(3 (k-1) / (2 (k+1)))`. It is below 1.3 for every k, far below the envelope `Δ e^k`.
    """
    k = components
    return math.sqrt((k * k - 1) / 12) / k * math.exp(1.5 * (k - 1) / (k + 1))


def silverman(samples: np.ndarray) -> float:
    """Silverman's bandwidth `s (3m/4)^(-1/5)`, where s is the standard deviation of the m samples (divisor m - 1)."""
    return float(samples.std(ddof=1) * (0.75 * len(samples)) ** -0.2)


def kernel_density(samples: np.ndarray, bandwidth: float) -> GaussianMixture:
    """The Gaussian kernel density estimate, which has one component at every sample."""
    return GaussianMixture(samples, bandwidth)


def log_supremum(p: GaussianMixture, q: GaussianMixture, region: tuple[float, float] | None = None) -> float:
    """`log sup_x p(x) / q(x)` in nats.

    Let w be the width of p and h that of q. For large x, `log p/q` is `(1/h² - 1/w²) x² / 2` plus lower orders. So over
    all reals the supremum is infinite if h < w, and finite if h > w. It is then attained in [`stationary_region`].

    Intervals are halved for as long as their bounds ([`_LogRatio.bounds`]) exceed the best value that was met: no peak
    is missed, however sharp. At last, the best point's neighbourhood is searched.

    Args:
        p, q: the mixtures.
        region: the interval over which the supremum is taken; `None` is all reals.

    Raises:
        ValueError: if `region` is None and the widths are equal, so that the centres would decide.
    """
    if region is None:
        if q.width == p.width:
            raise ValueError(
                "p and q have equal width, for which the supremum over all reals is not implemented: give a region"
            )
        if q.width < p.width:
            return math.inf
        region = stationary_region(p, q)

    ratio = _LogRatio(p, q)
    ends = ratio.at(np.linspace(*region, FIRST_POINTS))
    left, right = ends[:, :-1], ends[:, 1:]
    best, around = ends[1].max(), region
    while left.size:
        middle = ratio.at((left[0] + right[0]) / 2)
        highest = middle[1].argmax()
        if middle[1, highest] > best:
            best, around = middle[1, highest], (left[0, highest], right[0, highest])
        left, right = np.hstack([left, middle]), np.hstack([middle, right])
        promising = ratio.bounds(left, right) > best + PRECISION * max(1.0, abs(best))
        left, right = left[:, promising], right[:, promising]
    return float(max(best, ratio.highest(around)))


def stationary_region(p: GaussianMixture, q: GaussianMixture) -> tuple[float, float]:
    """An interval that contains every stationary point of p/q, if the width h of q exceeds the width w of p.

    `(log p/q)' = 0` means `x = (h² c - w² d) / (h² - w²)`, where c and d are the means of the components' centres,
    weighted by their shares in p(x) and q(x). Each lies between the outermost centres of its mixture.
    """
    w2, h2 = p.width**2, q.width**2
    low = (h2 * p.centres.min() - w2 * q.centres.max()) / (h2 - w2)
    high = (h2 * p.centres.max() - w2 * q.centres.min()) / (h2 - w2)
    return float(low), float(high)


@dataclass(frozen=True)
class _LogRatio:
    """`f = log p/q` with what bounds it between two points.

    Let w and h be the widths of p and q. Up to a constant, `f(x) = A(x) + G(x) - κ x²/2` with `κ = 1/w² - 1/h²`,
    `A(x) = log Σ_i exp((x c_i - c_i²/2) / w²)`, which is convex, and `G(x) = -log Σ_j exp((x d_j - d_j²/2) / h²)`,
    which is concave. Between two points, A is below its chord, G below its tangents at either, and `-κ x²/2` is above
    its own chord by at most `κ/8` times the squared distance.

    Points are the columns of arrays `[4, n]`, whose rows are x, f, G, and G'.
    """

    p: GaussianMixture
    q: GaussianMixture

    @property
    def kappa(self) -> float:
        """κ, the part of -f'' that is the same everywhere."""
        return self.p.width**-2 - self.q.width**-2

    def at(self, x: np.ndarray) -> np.ndarray:
        """The points at `x`, `[n]`."""
        origin = self.q.mean  # centres far from 0 would lose digits
        (convex, _), (total, slope) = (_log_sum(m, x, origin) for m in (self.p, self.q))
        constant = math.log(self.q.width * len(self.q.centres) / (self.p.width * len(self.p.centres)))
        return np.stack([x, convex - total - self.kappa * (x - origin) ** 2 / 2 + constant, -total, -slope])

    def bounds(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Upper bounds on f between the points of `left` and those of `right`, `[n]`."""
        (start, below, total, slope), (end, above, next_total, next_slope) = left, right
        length, bend = end - start, slope - next_slope
        with np.errstate(divide="ignore", invalid="ignore"):
            meeting = (next_total - total - next_slope * length) / bend  # of the tangents, from `start`
            meeting = np.clip(np.where(bend > 0, meeting, 0), 0, length)
            share = np.where(length > 0, meeting / length, 0)
        chord = (1 - share) * (below - total) + share * (above - next_total)
        kink = chord + np.minimum(total + slope * meeting, next_total - next_slope * (length - meeting))
        highest: np.ndarray = np.maximum(np.maximum(below, above), kink) + max(self.kappa, 0) * length**2 / 8
        return highest

    def highest(self, around: tuple[float, float]) -> float:
        """The largest f in an interval in which it has one peak."""
        negative = optimize.minimize_scalar(
            lambda x: -self.at(np.array([x]))[1, 0], bounds=around, method="bounded", options={"xatol": 1e-9}
        )
        return -float(negative.fun)


def _log_sum(mixture: GaussianMixture, x: np.ndarray, origin: float) -> tuple[np.ndarray, np.ndarray]:
    """`log Σ_i exp((x c_i - c_i²/2) / w²)` and its derivative, both `[n]`; x and c_i are distances from `origin`.

    SciPy's logsumexp would take three times as long.
    """
    centres, scale = mixture.centres - origin, mixture.width**-2

    def of(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        exponent = (block[:, None] - centres / 2) * (scale * centres)
        largest = exponent.max(axis=1)
        weights = np.exp(exponent - largest[:, None])
        total = weights.sum(axis=1)
        return largest + np.log(total), scale * (weights @ centres) / total

    rows = max(1, BLOCK // len(centres))
    blocks = [of(x[start : start + rows] - origin) for start in range(0, len(x), rows)]
    return np.concatenate([values for values, _ in blocks]), np.concatenate([slopes for _, slopes in blocks])


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
            raise ValueError(f"a tilt must be finite, got {self.tilt}")

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """The log-density at `x`, both `[n]`, nats; `x` is in [0, 1]."""
        size = abs(self.tilt)
        log_partition = max(self.tilt, 0.0) + (math.log(-math.expm1(-size) / size) if size else 0.0)
        return self.tilt * x - log_partition

    @property
    def mean(self) -> float:
        """The mean, `A'(θ) = 1 / (1 - e^-θ) - 1/θ`, which increases with θ."""
        if abs(self.tilt) < 1e-3:  # the two terms cancel; the series' next term is θ^5 / 30,240
            return 0.5 + self.tilt / 12 - self.tilt**3 / 720
        size = abs(self.tilt)
        above = -1 / math.expm1(-size) - 1 / size
        return above if self.tilt > 0 else 1 - above

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Independent draws, `[count]`, through the inverse of the distribution function."""
        u, size = rng.random(count), abs(self.tilt)
        from_zero = -np.log1p(u * math.expm1(-size)) / size if size else u  # draws for the tilt -|θ|
        return 1 - from_zero if self.tilt > 0 else from_zero


def fit_tilt(samples: np.ndarray) -> TiltedUniform:
    """The maximum-likelihood tilt, for which the mean of the distribution is that of the samples `[m]`.

    The root is bracketed by `A'(θ) >= 1 - 1/θ` for positive θ and its mirror image for negative θ. The bracket is
    wider by 1 at both ends, because rounding may put the root at an end.

    Raises:
        ValueError: if the mean of the samples is not in (0, 1), so that no tilt has it.
    """
    mean = float(samples.mean())
    if not 0 < mean < 1:
        raise ValueError(f"the mean of samples of a tilted uniform must be inside (0, 1), got {mean}")
    low, high = -1 / mean - 1, 1 / (1 - mean) + 1
    return TiltedUniform(float(optimize.brentq(lambda tilt: TiltedUniform(tilt).mean - mean, low, high, xtol=1e-12)))


def tilt_log_supremum(p: TiltedUniform, q: TiltedUniform) -> float:
    """`log sup_x p(x) / q(x)` over [0, 1], in nats. The log-ratio is linear in x, so the supremum is at an end."""
    ends = np.array([0.0, 1.0])
    return float((p.log_density(ends) - q.log_density(ends)).max())
