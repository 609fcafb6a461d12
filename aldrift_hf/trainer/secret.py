"""Tokens that can be used but are never written down."""

from __future__ import annotations

from typing import Any

SECRETS = {"model_init_kwargs": "token", "engine_kwargs": "api_key"}
"""Settings that are mappings, and what they may hold that nobody else should see."""


class Secret(str):
    """A string that is shown as `<secret>` and pickled as `None`.

    The Trainer pickles its settings into `training_args.bin`, next to the weights and in every push to the Hub.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "<secret>"

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Secret:
        return self


def hide(settings: Any) -> None:
    """Make the secrets of settings a [`Secret`]."""
    for name, key in SECRETS.items():
        if isinstance(kwargs := getattr(settings, name), dict) and isinstance(kwargs.get(key), str):
            setattr(settings, name, {**kwargs, key: Secret(kwargs[key])})


def masked(plain: dict[str, Any]) -> dict[str, Any]:
    """Settings as plain values, with `<TOKEN>` in place of secrets."""
    held = {name: plain[name] for name, key in SECRETS.items() if isinstance(plain[name], dict) and key in plain[name]}
    return plain | {name: {**kwargs, SECRETS[name]: "<TOKEN>"} for name, kwargs in held.items()}
