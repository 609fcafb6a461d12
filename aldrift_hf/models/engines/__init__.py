"""Engines by their names in the settings. A new one is one file here, and one line below."""

from .base import Engine, EngineSettings
from .guard import EngineGuard
from .transformers import TransformersEngine
from .vllm import VLLMEngine
from .vllm_server import VLLMServerEngine

ENGINES: dict[str, type[Engine]] = {
    "transformers": TransformersEngine,
    "vllm": VLLMEngine,
    "vllm_server": VLLMServerEngine,
}

__all__ = ["ENGINES", "Engine", "EngineGuard", "EngineSettings", "TransformersEngine", "VLLMEngine", "VLLMServerEngine"]
