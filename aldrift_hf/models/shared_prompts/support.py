"""Which models can compute a prompt once for all of its completions: found out by doing it."""

from __future__ import annotations

import contextlib
import logging
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import sharding
from ..head import projected_logprobs
from ..passes import Pass, apart, join
from .attention import may_share, sharing
from .packing import pack

logger = logging.getLogger(__name__)

MAX_GAP, MAX_GAP_IN_HALF = 1e-3, 0.1
"""Mean difference of a token's log-probability, nats, that is still rounding: in fp32, and in half precision."""

_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def can_share_prompts(model: PreTrainedModel, tokens: int, find_out: bool = True) -> bool:
    """Whether a model gives completions that share a prompt the probabilities that it gives them apart.

    Found out once for each model, on a few short rows. Models whose attention is not looked up by name, that have other
    layers than attention, or that do not take positions, compute every copy of a prompt.

    Args:
        model: in eval mode, without gradients, unless `find_out` is false.
        tokens: most tokens of a prompt and its completion.
        find_out: run the model if it is not known yet.
    """
    if not may_share(model, tokens):
        return False
    if find_out and model not in _known:
        _known[model] = _gives_the_same(model)
    return _known.get(model, False)


def sharing_if_known(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """[`sharing`], for a model that is known to share prompts. Others may ask for the implementation by its name, as
    Falcon does: by another name they would attend in another way, to later tokens even."""
    return sharing(model) if _known.get(model, False) else contextlib.nullcontext()


def _gives_the_same(model: PreTrainedModel) -> bool:
    ids = torch.randint(sharding.vocabulary_size(model), (12,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [ids[:4], ids[:4], ids[3:5], ids[:4], ids[3:5]]
    completions = [ids[4:7], ids[5:9], ids[6:12], ids[8:10], ids[2:5]]
    packed = pack(prompts, completions)
    try:
        separate = _logprobs(model, apart(join(prompts, completions, 0)))
        with sharing(model):
            shared = _logprobs(model, packed)
    except Exception:  # whatever a model raises for positions, or masks, that it does not know
        logger.debug(f"{type(model).__name__} does not share prompts", exc_info=True)
        return False
    in_full = model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    layers = set(range(model.config.get_text_config().num_hidden_layers))
    return packed.inputs["shared_prompts"].layers == layers and bool(
        (separate - shared).abs().mean() < (MAX_GAP if in_full else MAX_GAP_IN_HALF)
    )


def _logprobs(model: PreTrainedModel, forward: Pass) -> Tensor:
    forward = forward.to(model.device)
    return forward.table(projected_logprobs(model, forward.select, forward.targets, **forward.inputs))
