"""Samplers by their names in the settings. A new one is one file here, and one line below."""

from .archive import ArchiveSampler
from .base import Moved, Policy, Redraw, Sampler, Selection
from .chains import MetropolisHastings
from .edited import EditedTop
from .span import SpanChains
from .suffix import SuffixChains
from .twins import TwinArchive
from .uncorrected import Reweight, Top

SAMPLERS: dict[str, type[Sampler]] = {
    "archive": ArchiveSampler,
    "metropolis_hastings": MetropolisHastings,
    "suffix": SuffixChains,
    "span": SpanChains,
    "top": Top,
    "reweight": Reweight,
}

__all__ = [
    "SAMPLERS",
    "ArchiveSampler",
    "EditedTop",
    "MetropolisHastings",
    "Moved",
    "Policy",
    "Redraw",
    "Reweight",
    "Sampler",
    "Selection",
    "SpanChains",
    "SuffixChains",
    "Top",
    "TwinArchive",
]
