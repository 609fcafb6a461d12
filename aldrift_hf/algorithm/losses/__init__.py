"""Losses by their names in the settings (`loss_type`). A new one is one file here, and one line below."""

from .base import Loss
from .generalized_kl import GeneralizedKL
from .maximum_likelihood import MaximumLikelihood

LOSSES: dict[str, type[Loss]] = {"nll": MaximumLikelihood, "generalized_kl": GeneralizedKL}

__all__ = ["LOSSES", "GeneralizedKL", "Loss", "MaximumLikelihood"]
