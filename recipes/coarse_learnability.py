"""Maximum likelihood covers: coarse learnability where everything can be computed, without a language model.

    accelerate launch recipes/coarse_learnability.py

ALDRIFT assumes of its learner that a model L fitted to samples of p covers p: sup_x p(x)/L(x) is at most polynomial.
This recipe fits L to m samples and computes the supremum exactly:

(a) one Gaussian is fitted to k unit-variance Gaussians, with neighbours Δ apart: the family does not contain p;
(b) a tilted uniform distribution is fitted to a tilted uniform distribution: the family contains p;
(c) the mixture is estimated by Gaussian kernel densities, with multiples of Silverman's bandwidth h_S.

If the tails of L are lighter than those of p, the supremum over all reals is infinite, and is printed as inf. For (c),
the supremum over the central 1 - 1/m of p is computed as well; of m draws of p, on average one lies outside.

Options: --separations 2 8 32 --sample_sizes 16 256 --components 5 --repeats 20 --seed 1 --output_dir DIR, here or in
YAML (--config FILE.yaml).
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accelerate import PartialState
from evaluation import suprema
from evaluation.coarse_learnability import Sweep, compare, draw_figure, verdicts
from rich.console import Console
from trl import TrlParser

TILT = 2.0  # θ in (b): p is proportional to exp(θx) on [0, 1]
KDE_SEPARATION = 4.0  # Δ of the mixture in (c)
BANDWIDTHS = (0.125, 0.5, 1.0, 4.0)  # h in (c), in multiples of Silverman's


@dataclass
class CoarseLearnabilityArguments:
    """The distributions, and the number of fits."""

    output_dir: str = field(
        default="out/coarse_learnability", metadata={"help": "Folder that the table and the figure are written to."}
    )
    components: int = field(default=3, metadata={"help": "k, the number of Gaussians in the mixtures; at least 2."})
    separations: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0],
        metadata={"help": "Δ in (a), in standard deviations of a component: two or more values, increasing."},
    )
    sample_sizes: list[int] = field(
        default_factory=lambda: [16, 64, 256, 1024, 4096, 16384],
        metadata={"help": "m, the number of samples per fit: two or more values above 1, increasing."},
    )
    repeats: int = field(default=20, metadata={"help": "Number of fits for each setting, each to new samples."})
    seed: int = field(default=42, metadata={"help": "Random seed of the samples."})

    def __post_init__(self) -> None:
        for name, values, bound in (("separations", self.separations, 0), ("sample_sizes", self.sample_sizes, 1)):
            if len(values) < 2 or values[0] <= bound or (np.diff(values) <= 0).any():
                raise ValueError(f"--{name}: give two or more increasing values above {bound}; got {values}")
        if self.components < 2 or self.repeats < 1:
            raise ValueError("--components must be at least 2 and --repeats at least 1")


def measure(options: CoarseLearnabilityArguments) -> Sweep:
    """Make all fits, each to new samples."""
    rng = np.random.default_rng(options.seed)
    tilted, mixture = suprema.TiltedUniform(TILT), suprema.even_mixture(options.components, KDE_SEPARATION)

    def gaussian(separation: float, m: int) -> float:
        p = suprema.even_mixture(options.components, separation)
        return suprema.log_supremum(p, suprema.fit_gaussian(p.sample(m, rng)))

    def realizable(_: float, m: int) -> float:
        return suprema.tilt_log_supremum(tilted, suprema.fit_tilt(tilted.sample(m, rng)))

    def kde(factor: float, m: int) -> tuple[float, float]:
        samples = mixture.sample(m, rng)
        fitted = suprema.kernel_density(samples, factor * suprema.silverman(samples))
        central = suprema.log_supremum(mixture, fitted, mixture.central_region(1 - 1 / m))
        return suprema.log_supremum(mixture, fitted), central

    def sweep(fit: Callable, settings: list[float]) -> np.ndarray:
        return np.array(
            [[[fit(setting, m) for _ in range(options.repeats)] for m in options.sample_sizes] for setting in settings]
        )

    everywhere, central = np.moveaxis(sweep(kde, list(BANDWIDTHS)), -1, 0)
    return Sweep(
        components=options.components,
        separations=options.separations,
        sample_sizes=options.sample_sizes,
        tilt=TILT,
        kde_separation=KDE_SEPARATION,
        bandwidths=BANDWIDTHS,
        gaussian=sweep(gaussian, options.separations),
        realizable=sweep(realizable, [TILT])[0],
        kde=everywhere,
        kde_central=central,
    )


def main() -> None:
    try:
        (options,) = TrlParser(CoarseLearnabilityArguments).parse_args_and_config()
    except ValueError as error:
        sys.exit(str(error))
    if not PartialState(cpu=True).is_main_process:  # no accelerator is needed
        return
    sweep, folder, console = measure(options), Path(options.output_dir), Console()
    folder.mkdir(parents=True, exist_ok=True)
    table = compare(sweep)
    table.print()
    table.write_markdown(folder / "coarse_learnability.md")
    for sentence in verdicts(sweep):
        console.print(sentence, highlight=False)
    draw_figure(sweep, folder / "coarse_learnability.png")
    console.print(f"figure and table: {folder}/coarse_learnability.*")


if __name__ == "__main__":
    main()
