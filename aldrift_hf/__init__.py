"""Fine-tune a causal language model into a sampler of `p_T(s) ∝ L(s)·exp(-T·d(s))`, with a black-box cost `d`."""

from .objective.objective import from_reward
from .trainer.config import ALDRIFTConfig
from .trainer.trainer import ALDRIFTTrainer

__version__ = "0.1.0"

__all__ = ["ALDRIFTConfig", "ALDRIFTTrainer", "from_reward"]
