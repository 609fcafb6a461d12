"""Temperature ladders by their names in the settings. A new one is one file here, and one line below."""

from .adaptive import AdaptiveLadder
from .base import Ladder, LadderState
from .linear import LinearLadder

LADDERS: dict[str, type[Ladder]] = {"linear": LinearLadder, "adaptive": AdaptiveLadder}

__all__ = ["LADDERS", "AdaptiveLadder", "Ladder", "LadderState", "LinearLadder"]
