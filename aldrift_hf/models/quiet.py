"""What other packages print as models are loaded and wrapped, and what does not concern the users of this one.

Each message is named here. Everything else that these packages say is printed.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

SECONDS_BEFORE_A_BAR = 3.0
"""Loading or saving weights that takes less has no progress bar."""


def leave_out_kernel_advice() -> None:
    """Leave out bitsandbytes' advice to install `kernels`, which it prints on CPUs with AVX512-BF16 as it is imported.

    4-bit weights never take that kernel here: see [`aldrift_hf.models.prior.keep_four_bit_weights`].
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_kernel_advice)


def _is_no_kernel_advice(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward from kernels-community")


@contextlib.contextmanager
def old_names() -> Iterator[None]:
    """Within a `with` block transformers does not warn of its older names for activation checkpointing.

    PEFT asks every model by such a name, and the oldest version that is allowed here has no others.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated", FutureWarning)
        yield


@contextlib.contextmanager
def new_adapter() -> Iterator[None]:
    """Within a `with` block PEFT adds an adapter without telling what needs no action.

    That is [`old_names`], and that GPT-2's layers store their weights transposed, which PEFT sees by itself.
    """
    with old_names():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but the target module is `Conv1D`")
        yield


@contextlib.contextmanager
def masks_of_ones() -> Iterator[None]:
    """Within a `with` block transformers does not ask for an attention mask.

    Its `generate` is given one, leaves it out where it hides nothing, and then misses it.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_asks_for_no_mask)
    try:
        yield
    finally:
        logger.removeFilter(_asks_for_no_mask)


def _asks_for_no_mask(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("We strongly recommend passing in an `attention_mask`")


@contextlib.contextmanager
def late_bars() -> Iterator[None]:
    """Within a `with` block transformers draws a progress bar of weights only where they take their time."""
    # Here, because the package imports this module and loads no transformers.
    from transformers import logging as transformers_logging

    previous = transformers_logging.set_tqdm_hook(_late_bar)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


@contextlib.contextmanager
def reading_files() -> Iterator[None]:
    """Within a `with` block datasets draws no progress bars, as for the few seconds that a file of prompts takes."""
    import datasets

    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _late_bar(bar: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return bar(*args, **{"delay": SECONDS_BEFORE_A_BAR, **kwargs})
