"""The prior is what was passed in: checked on a few short rows, before a run and in numbers.

The model scores the rows before anything is attached to it. Then the prior must give them the same log-probabilities,
as the trainer will use it: at once, and after the trainable parameters have moved. And the policy must be the same
model whether it is trained (called as a whole) or scored and sampled (its base model, adapter layers in place).
Otherwise log-weights would be silently wrong: an adapter whose layers stay in effect when it is switched off,
layers that are repeated, base weights that are trained too, an adapter that looks at its input before it acts.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import gather_object
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..types import Completions
from . import sharding
from .causality import check_causal
from .head import projecting
from .loading import context_length
from .passes import join
from .prior import Prior, base_model, keep_four_bit_weights, split
from .scoring import inference, learning_pass, sequence_logprobs
from .shared_prompts.support import can_share_prompts, sharing_if_known

logger = logging.getLogger(__name__)

MAX_DRIFT = 1e-3
"""Largest difference of a row's log-probability, nats, that is still rounding where the kernels are the same."""
MAX_OTHER_DRIFT = 0.02
"""Likewise in fp32 where another kernel, or another machine, rounds otherwise."""
MAX_HALF_DRIFT = 0.5
"""Likewise in half precision."""
NOISE = 0.02
"""Standard deviation of what is added to trainable parameters, relative to 1 plus their size."""


class Rows(NamedTuple):
    """Short rows of arbitrary tokens.

    Attributes:
        prompts: token ids of different lengths.
        completions: one per prompt.
    """

    prompts: list[list[int]]
    completions: Completions

    @classmethod
    def for_model(cls, model: PreTrainedModel, num_rows: int = 3, length: int = 12) -> Rows:
        """`num_rows` rows of at most `length` tokens that the model can read."""
        length = max(2, min(length, context_length(model.config) or length))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(sharding.vocabulary_size(model), (num_rows, length), generator=generator)
        start = [1 + row % max(1, length // 4) for row in range(num_rows)]
        return cls(
            [tokens[:cut] for tokens, cut in zip(ids.tolist(), start, strict=True)],
            Completions.of([tokens[cut:] for tokens, cut in zip(ids.tolist(), start, strict=True)], 0),
        )

    def scores(self, model: PreTrainedModel) -> Tensor:
        """`[num_rows]` log-probabilities of the completions, as proposals are scored, nats."""
        return sequence_logprobs(model, self.prompts, self.completions, pad_token_id=0, batch_size=len(self.prompts))

    def logprobs(self, model: nn.Module) -> Tensor:
        """`[num_rows]` log-probabilities of the completions, as the training loss computes them, nats."""
        forward = learning_pass(base_model(model), join(self.prompts, self.completions.tokens(), 0))
        forward = forward.to(next(model.parameters()).device)
        base = base_model(model)
        with sharing_if_known(base), projecting(base, forward.select, forward.targets) as projection:
            found = projection.of(model(**forward.inputs).logits)
        return forward.table(found.double()).sum(-1).cpu()


def split_checked(
    model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None
) -> tuple[PreTrainedModel | PeftModel, Prior]:
    """As [`aldrift_hf.models.prior.split`], with the check that this module describes.

    Models whose weights are spread over the processes, or not loaded in this one, are not checked; nor is a model that
    cannot run where it is, which is logged as a warning.

    Raises:
        ValueError: if the prior would not be the model that was passed in, if nothing could be learned, or if
            bitsandbytes has changed 4-bit weights already.
    """
    keep_four_bit_weights(model)  # before its first forward pass
    reference, error = _reference(model), None
    if reference is not None:
        try:
            with inference(model):
                check_causal(base_model(model), *reference[0], reference[1], _max_rounding(model))
        except ValueError as caught:
            error = caught
    policy, prior = split(model, peft_config)
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise ValueError(
            "no parameter of the model is trainable, so nothing would be learned. Load the model again, or call "
            "model.requires_grad_(True) for full fine-tuning."
        )
    if reference is not None and error is None:
        rows, prior.row_scores = reference
        try:
            _check(rows, prior.row_scores, policy, prior)
            with inference(policy):  # found out now, so that a resumed run learns just as its first part did
                can_share_prompts(base_model(policy), tokens=1)
        except ValueError as caught:
            error = caught
    # Not every process may have the weights: all hear of an error, and agree on whether the first model is the prior.
    shared = gather_object([(error and str(error), prior.is_start, prior.row_scores)])
    messages = [message for message, *_ in shared if message is not None]
    if messages:
        raise error or ValueError(f"on another process: {messages[0]}")
    scored = [scores for *_, scores in shared if scores is not None]
    gap = max((_gap(scores, scored[0]) for scores in scored), default=0.0)
    if not gap <= _max_rounding(policy):
        raise ValueError(
            f"the processes were given different models: log-probabilities of short rows differ by {gap:.2g} nats. "
            "Weights that your program makes at random (of resized embeddings, of a model that it trains first) must "
            "be the same everywhere: call transformers.set_seed before it makes them, or load them from a folder."
        )
    prior.is_start = all(is_start for _, is_start, _ in shared)
    return policy, prior


def check_gradient(policy: nn.Module) -> None:
    """Check that a policy can be trained: that the log-probability of short rows has a gradient that is not zero.

    Args:
        policy: in the state in which it is trained.

    Raises:
        ValueError: if it is zero for every trainable parameter.
    """
    rows = Rows.for_model(base_model(policy))
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    scores = rows.logprobs(policy)
    gradients = torch.autograd.grad(scores.sum(), trained, allow_unused=True) if scores.requires_grad else []
    if not any(gradient is not None and bool(gradient.any()) for gradient in gradients):
        raise ValueError(
            "the gradient of the log-likelihood is zero for every trainable parameter, so nothing would be learned. "
            "Either the trainable layers have no effect on the text (lora_alpha=0, or an adapter on layers that text "
            "does not pass through), or the gradient is lost on its way: with gradient_checkpointing, set "
            "gradient_checkpointing_kwargs={'use_reentrant': False}."
        )


def check_exact(policy: nn.Module, prior: Prior) -> None:
    """Check that in training mode, with dropout turned off, a policy is the model that is scored.

    Args:
        policy: what is trained. Its modes are left as they are.
        prior: of the policy; where its rows could not be scored, nothing is checked.

    Raises:
        ValueError: if log-probabilities differ by more than rounding.
    """
    if prior.row_scores is None:
        return
    rows = Rows.for_model(base_model(policy))
    with inference(policy):
        expected = rows.logprobs(policy)
        policy.train()
        gap = _gap(rows.logprobs(policy), expected)
    if not gap <= _max_rounding(policy):
        raise ValueError(
            "this loss needs log q in training as it was scored, and the model drops something at random that could "
            f"not be turned off: log-probabilities of short rows differ by {gap:.2g} nats. Set its rates to 0 when it "
            "is loaded (in model_init_kwargs, by their names in its config.json), or use loss_type='nll'."
        )


def _reference(model: PreTrainedModel | PeftModel) -> tuple[Rows, Tensor] | None:
    """Rows and their log-probabilities under a model as it was passed in."""
    if sharding.is_sharded(model) or any(parameter.is_meta for parameter in model.parameters()):
        return None
    try:
        with inference(model):
            rows = Rows.for_model(base_model(model))
            scores = rows.scores(base_model(model))
    except Exception as error:  # whatever a kernel raises that exists on another device only
        logger.warning(f"whether the prior is the model that was passed in could not be checked: {error}")
        return None
    # A model that overflows is refused at its first draws, with the remedy (numerics.py).
    return None if bool(scores.isnan().any()) else (rows, scores)


class _Measured(NamedTuple):
    """Row scores, `[num_rows]` each, nats.

    Attributes:
        prior: of the prior.
        start: of the policy, as it is scored.
        moved_prior: of the prior, once the trainable parameters have moved.
        scored: of the moved policy, as it is scored.
        inside: of its base model, adapter layers in place, as the training loss computes them.
        trained: of the moved policy itself, called as a whole, as in training.
    """

    prior: Tensor
    start: Tensor
    moved_prior: Tensor
    scored: Tensor
    inside: Tensor
    trained: Tensor


def _measure(rows: Rows, policy: PreTrainedModel | PeftModel, prior: Prior) -> _Measured:
    with prior.active(policy) as model:
        at_start = rows.scores(model)
    start = rows.scores(base_model(policy))
    if not isinstance(policy, PeftModel):  # the prior is a copy that shares nothing with it
        trained = rows.logprobs(policy)
        return _Measured(at_start, start, at_start, start, trained, trained)
    with _moved(policy):
        with prior.active(policy) as model:
            moved_prior = rows.scores(model)
        scored, inside = rows.scores(base_model(policy)), rows.logprobs(base_model(policy))
        return _Measured(at_start, start, moved_prior, scored, inside, rows.logprobs(policy))


def _check(rows: Rows, expected: Tensor, policy: PreTrainedModel | PeftModel, prior: Prior) -> None:
    """Compare what the rows are to prior and policy with what was expected; see whether the policy is the prior yet."""
    try:
        with inference(policy):
            measured = _measure(rows, policy, prior)
    except Exception as error:  # of any type: the model alone could be run
        raise ValueError(
            f"with {_described(policy)} the model cannot be run as the trainer does: {error}. Use LoRA or another "
            "adapter on the weights."
        ) from error
    prior.is_start = prior.is_start and torch.equal(measured.start, measured.prior)
    _compare(measured.prior, expected, policy, "")
    _compare(measured.moved_prior, expected, policy, " once trainable parameters have moved")
    for other, most in ((measured.inside, MAX_DRIFT), (measured.scored, _max_rounding(policy))):
        gap = _gap(measured.trained, other)
        if not gap <= most:
            with_adapter, remedy = "", "Set another attn_implementation, such as 'eager'."
            if isinstance(policy, PeftModel):
                with_adapter = f"with {_described(policy)} "
                remedy = (
                    "Its effect depends on more than the tokens before a position (as in aLoRA and X-LoRA). Use LoRA "
                    "or another adapter on the weights; where it is one, another attn_implementation, such as 'eager'."
                )
            raise ValueError(
                f"{with_adapter}the model is another one when it is trained than when it is sampled and scored: "
                f"log-probabilities of short rows differ by {gap:.2g} nats. {remedy}"
            )


def _compare(scores: Tensor, expected: Tensor, policy: nn.Module, when: str) -> None:
    drift = _gap(scores, expected)
    if drift <= MAX_DRIFT:
        return
    if not isinstance(policy, PeftModel):
        reason = "The frozen copy of the model computes something else than the model. Load the model again."
    else:
        reason = (
            f"Either {_described(policy)} stays in effect when it is switched off, or something else in the model is "
            "trained with it. Common causes: options that change the base model (layer_replication, an initialisation "
            "that edits its weights), and biases, norms or embeddings of the base model that are trainable. Use an "
            "adapter that leaves the base model alone, as LoRA with bias='none' does, on a model that is loaded again."
        )
    raise ValueError(
        f"the prior would not be the model that was passed in: log-probabilities of short rows differ by {drift:.2g} "
        f"nats{when}. {reason}"
    )


def check_same_prior(prior: Prior, policy: nn.Module, theirs: Sequence[float] | None, whose: str) -> None:
    """Check that the prior of a checkpoint is that of the run which resumes it.

    Args:
        prior: of the run.
        policy: the run's, for its precision.
        theirs: the row scores of the checkpoint's prior; `None` if they were not computed.
        whose: names the checkpoint, for the message.

    Raises:
        ValueError: if they differ by more than rounding.
    """
    if prior.row_scores is None or theirs is None:
        return
    gap = _gap(prior.row_scores, torch.tensor(theirs, dtype=torch.float64))
    if not gap <= _max_rounding(policy):
        raise ValueError(
            f"{whose} was written with another prior: log-probabilities of short rows differ by {gap:.2g} nats. Pass "
            "the model that the run began with, as it was then."
        )


def _max_rounding(policy: nn.Module) -> float:
    """Largest difference of a row's log-probability between kernels or machines that is still rounding, nats."""
    half = any(parameter.dtype.itemsize < 4 for parameter in policy.parameters())
    return MAX_HALF_DRIFT if half else MAX_OTHER_DRIFT


def _gap(scores: Tensor, others: Tensor) -> float:
    """The largest difference, where both are not the same infinity; NaN where only one of them is a number."""
    return torch.where(scores == others, 0.0, (scores - others).abs()).max().item()


def _described(policy: nn.Module) -> str:
    if not isinstance(policy, PeftModel):
        return "its frozen copy beside it"
    name = policy.active_adapter
    return f"the {policy.peft_config[name].peft_type.value} adapter {name!r}"


@contextlib.contextmanager
def _moved(policy: nn.Module) -> Iterator[None]:
    """Within a `with` block the trainable parameters are elsewhere; afterwards exactly where they were."""
    generator = torch.Generator().manual_seed(0)
    kept = [(parameter, parameter.detach().clone()) for parameter in policy.parameters() if parameter.requires_grad]
    try:
        for parameter, value in kept:
            noise = torch.randn(value.shape, generator=generator).to(value.device, torch.float32)
            cast(Any, parameter.data).copy_(value + NOISE * (1 + value.float().abs()) * noise)
        yield
    finally:
        for parameter, value in kept:
            parameter.data.copy_(value)
