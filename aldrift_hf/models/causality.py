"""Whether a model's outputs at a token depend on the tokens before it alone: then they are a text's probabilities.

They are not for an encoder, for a decoder whose mask was taken off to make embeddings, or for a diffusion model. Not
every config says so; the chain rule does.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from ..types import Completions
from .scoring import sequence_logprobs


def check_causal(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], completions: Completions, scores: Tensor, rounding: float
) -> None:
    """Check that `log p(uv) = log p(u) + log p(v | u)`. Call it as [`sequence_logprobs`].

    Args:
        model: any that has logits.
        prompts: `n` lists of token ids.
        completions: `n` completions, of two tokens or more.
        scores: `[n]`, their log-probabilities under the model, nats.
        rounding: largest difference that is rounding, nats.

    Raises:
        ValueError: if it does not hold for any of the rows. (A single one can be rounded elsewhere, as where a mixture
            of experts takes another one.)
    """
    tokens = completions.tokens()
    first, rest = [row[:1] for row in tokens], [row[1:] for row in tokens]
    if not all(rest):
        return
    longer = [[*prompt, *start] for prompt, start in zip(prompts, first, strict=True)]
    parts = [
        sequence_logprobs(model, given, Completions.of(part, 0), pad_token_id=0, batch_size=len(part))
        for given, part in ((prompts, first), (longer, rest))
    ]
    gap = (scores - parts[0] - parts[1]).abs().min().item()
    if gap > rounding:
        raise ValueError(
            f"{type(model).__name__} is not causal: the log-probability of a text differs by {gap:.2g} nats from the "
            "sum of those of its parts, so its outputs at a token depend on what comes after it. Pass a causal "
            "language model."
        )
