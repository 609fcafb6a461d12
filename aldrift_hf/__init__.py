"""Fine-tune a causal language model into a sampler of `p_T(s) ∝ L(s)·exp(-T·d(s))`, with a black-box cost `d`.

Names are imported when they are first used: `import aldrift_hf` alone loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .models.quiet import leave_out_kernel_advice

if TYPE_CHECKING:
    from .algorithm.ladders import AdaptiveLadder, Ladder, LinearLadder
    from .algorithm.losses import GeneralizedKL, Loss, MaximumLikelihood
    from .algorithm.samplers import (
        ArchiveSampler,
        EditedTop,
        MetropolisHastings,
        Reweight,
        Sampler,
        SpanChains,
        SuffixChains,
        Top,
        TwinArchive,
    )
    from .models.engines import Engine, TransformersEngine, VLLMEngine, VLLMServerEngine
    from .objective.calling import ObjectiveError
    from .objective.evaluated import evaluated_texts
    from .objective.rewards import from_reward
    from .objective.testing import check_objective
    from .reporting.callbacks import RunCallback
    from .reporting.record import RunRecord
    from .trainer.config import ALDRIFTConfig
    from .trainer.trainer import ALDRIFTTrainer
    from .types import Draws

__version__ = "0.2.0"

__all__ = [
    "ALDRIFTConfig",
    "ALDRIFTTrainer",
    "AdaptiveLadder",
    "ArchiveSampler",
    "Draws",
    "EditedTop",
    "Engine",
    "GeneralizedKL",
    "Ladder",
    "LinearLadder",
    "Loss",
    "MaximumLikelihood",
    "MetropolisHastings",
    "ObjectiveError",
    "Reweight",
    "RunCallback",
    "RunRecord",
    "Sampler",
    "SpanChains",
    "SuffixChains",
    "Top",
    "TransformersEngine",
    "TwinArchive",
    "VLLMEngine",
    "VLLMServerEngine",
    "check_objective",
    "evaluated_texts",
    "from_reward",
]

_EXPORTS = {
    "algorithm.ladders": ("AdaptiveLadder", "Ladder", "LinearLadder"),
    "algorithm.losses": ("GeneralizedKL", "Loss", "MaximumLikelihood"),
    "algorithm.samplers": (
        "ArchiveSampler",
        "EditedTop",
        "MetropolisHastings",
        "Reweight",
        "Sampler",
        "SpanChains",
        "SuffixChains",
        "Top",
        "TwinArchive",
    ),
    "models.engines": ("Engine", "TransformersEngine", "VLLMEngine", "VLLMServerEngine"),
    "objective.calling": ("ObjectiveError",),
    "objective.evaluated": ("evaluated_texts",),
    "objective.rewards": ("from_reward",),
    "objective.testing": ("check_objective",),
    "reporting.callbacks": ("RunCallback",),
    "reporting.record": ("RunRecord",),
    "trainer.config": ("ALDRIFTConfig",),
    "trainer.trainer": ("ALDRIFTTrainer",),
    "types": ("Draws",),
}
"""Names by the module that defines them; the same as under `TYPE_CHECKING`, for mypy and editors."""

leave_out_kernel_advice()  # before any import of bitsandbytes, as by PEFT

_MODULES = {name: module for module, names in _EXPORTS.items() for name in names}

if not TYPE_CHECKING:  # type checkers would take every misspelt name for a valid one

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
