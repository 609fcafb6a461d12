"""What makes a model in training another one than the model that is scored: dropout, skipped layers, router jitter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

NAMES = ("drop", "jitter")
"""What the names of rates contain that are kept outside of a dropout module: OPT's `dropout` and `layerdrop`, Llama's
`attention_dropout`, Bloom's `hidden_dropout`, Mixtral's `jitter_noise`, LoHa's `rank_dropout`."""


def without_dropout(model: nn.Module) -> None:
    """Turn every dropout of a model off for good: `log q` in training is then the number that was scored.

    Rates that a model reads from its config as it runs are left alone, since the config is saved with the model;
    [`aldrift_hf.models.fidelity.check_exact`] finds what is left.
    """
    for rates, name in _rates(model):
        rates[name] = 0.0


def has_dropout(model: nn.Module) -> bool:
    """Whether a model in training mode would drop something."""
    return any(True for _ in _rates(model))


def _rates(model: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Every rate above 0, as what holds it and its name there: a module's attributes, or PEFT's rates by adapter."""
    for module in model.modules():
        attributes = vars(module)
        names = ["p"] if isinstance(module, _DropoutNd) else [n for n in attributes if any(part in n for part in NAMES)]
        for name in names:
            held = attributes[name]
            for rates, key in [(held, key) for key in held] if isinstance(held, dict) else [(attributes, name)]:
                if isinstance(rates[key], float) and rates[key] > 0:
                    yield rates, key
