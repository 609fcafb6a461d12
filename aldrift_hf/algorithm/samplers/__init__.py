"""Samplers by their names in the settings. A new one is one file here, and one line below."""

from .archive import ArchiveSampler
from .base import Policy, Sampler, Selection
from .chains import MetropolisHastings
from .uncorrected import Reweight, Top

SAMPLERS: dict[str, type[Sampler]] = {
    "archive": ArchiveSampler,
    "metropolis_hastings": MetropolisHastings,
    "top": Top,
    "reweight": Reweight,
}

__all__ = ["SAMPLERS", "ArchiveSampler", "MetropolisHastings", "Policy", "Reweight", "Sampler", "Selection", "Top"]
