"""Settings of how completions are drawn and scored; see `ALDRIFTConfig`, which has them all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from ..models.engines import ENGINES
from .defaults import TrainerDefaults
from .validation import Count, Kwargs


@dataclass
class GenerationSettings(TrainerDefaults):
    """Parameters that control generation."""

    engine: str = field(
        default="transformers",
        metadata={
            "choices": ENGINES,
            "help": "What draws completions: transformers (model.generate), vllm in the trainer's process, or "
            "vllm_server.",
        },
    )
    engine_kwargs: Optional[Kwargs] = field(
        default=None,
        metadata={
            "help": "Keyword arguments of the engine, as JSON: for vllm those of vllm.LLM, such as "
            '{"gpu_memory_utilization": 0.5}; for vllm_server base_url, api_key, timeout, concurrency, adapter_dir.'
        },
    )
    max_completion_length: Count = field(
        default=256,
        metadata={"help": "Largest number of tokens per completion; longer ones are cut, for the prior as well."},
    )
    per_device_generation_batch_size: Optional[Count] = field(
        default=None,
        metadata={
            "help": "Completions that each process generates, scores, or passes to the objective at once. None: as "
            "many as are likely to fit into memory, halved whenever they do not fit."
        },
    )
    scoring_batch_tokens: Count = field(
        default=16384,
        metadata={
            "help": "Largest number of tokens (completions x length) per forward pass when completions are scored; "
            "bounds memory. Logits are computed in chunks of 128 MiB."
        },
    )
    overlap_objective: bool = field(
        default=True,
        metadata={
            "help": "Evaluate the objective in a thread while the next completions are generated. "
            "--no_overlap_objective is for functions that work only in the main thread, or that run the trained model."
        },
    )
