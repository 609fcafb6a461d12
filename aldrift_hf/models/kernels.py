"""Attention by kernels that take every shape as it comes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch


@contextlib.contextmanager
def attention_of_any_shape() -> Iterator[None]:
    """A context in which PyTorch's attention is not computed by cuDNN.

    In 16 bits cuDNN's is PyTorch's first choice on a Hopper or Blackwell GPU. It builds a plan for each new shape,
    which takes far longer than computing it, and here nearly every shape is new: each token drawn has one more before
    it, and the batches that are scored and learned differ in width.
    """
    choices = cast(Any, torch.backends.cuda)
    enabled = choices.cudnn_sdp_enabled()
    choices.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        choices.enable_cudnn_sdp(enabled)
