"""A prompt is computed once for all of its completions: in drawing, in scoring and in learning."""

from .attention import sharing
from .cache import SharedPrompts, prefill
from .packing import pack, pays
from .support import can_share_prompts

__all__ = ["SharedPrompts", "can_share_prompts", "pack", "pays", "prefill", "sharing"]
