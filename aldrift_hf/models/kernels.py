"""Attention by kernels that take every shape as it comes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def attention_of_any_shape() -> Iterator[None]:
    """A context in which PyTorch's attention is not computed by cuDNN.

    In 16 bits cuDNN's is PyTorch's first choice on a Hopper or Blackwell GPU. It builds a plan for each new shape,
    which takes far longer than computing it, and here nearly every shape is new: each token drawn has one more before
    it, and the batches that are scored and learned differ in width.
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)
