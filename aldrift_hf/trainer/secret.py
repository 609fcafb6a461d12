"""A token that can be used but is never written down."""

from __future__ import annotations

from typing import Any


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
