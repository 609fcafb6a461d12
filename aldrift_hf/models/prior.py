"""What the prior `L` is for each kind of model that a user can pass in: exactly that model, never a reloaded one.

| model passed in | prior `L` | policy `q` |
|---|---|---|
| plain model and a `peft_config` | the model with its new adapter switched off | with the adapter |
| [`peft.PeftModel`] | a frozen copy of its active adapter | that adapter, trained on |
| plain model | a frozen copy of the model | the model, fine-tuned in full |

Adapters are switched on and off, never merged: merging into 4-bit weights, or merging and unmerging in bf16, changes
the prior. And 4-bit weights stay as they are: see [`keep_four_bit_weights`].
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, Protocol, cast

from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import adapters, quiet, sharding

# LoRA initialisations that subtract the adapter's initial value from the base weights: with the adapter off, the base
# is then no longer the model that was passed in.
_INITS_THAT_EDIT_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Prior(Protocol):
    """Turns the policy into the prior within a `with` block.

    Attributes:
        is_start: whether the policy, before its first update, is the prior.
        row_scores: log-probabilities of the rows of [`aldrift_hf.models.fidelity`], nats; `None` if not computed.
    """

    is_start: bool
    row_scores: Tensor | None

    def active(self, policy: nn.Module) -> contextlib.AbstractContextManager[PreTrainedModel]:
        """A context that yields the module whose forward pass computes `L`."""
        ...


class AdapterOff:
    """`L` is the policy's base model.

    Args:
        config: the adapter's. Unless one of its `init_…` options is off, it changes nothing before its first update.
    """

    row_scores: Tensor | None = None

    def __init__(self, config: PeftConfig) -> None:
        self.is_start = all(value is not False for name, value in vars(config).items() if name.startswith("init_"))

    @contextlib.contextmanager
    def active(self, policy: nn.Module) -> Iterator[PreTrainedModel]:
        peft_model = cast(PeftModel, policy)
        with peft_model.disable_adapter():
            yield base_model(peft_model)


class FrozenAdapter:
    """`L` is the policy's base model under a frozen adapter.

    Args:
        name: the adapter's.
    """

    is_start = True
    row_scores: Tensor | None = None

    def __init__(self, name: str) -> None:
        self.name = name

    @contextlib.contextmanager
    def active(self, policy: nn.Module) -> Iterator[PreTrainedModel]:
        peft_model = cast(PeftModel, policy)
        trained = peft_model.active_adapter
        peft_model.set_adapter(self.name)
        try:
            yield base_model(peft_model)
        finally:
            # set_adapter also moves requires_grad: the prior is frozen again, and the policy trainable.
            peft_model.set_adapter(trained)


class FrozenCopy:
    """`L` is a copy of the model, made before the first update."""

    is_start = True
    row_scores: Tensor | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        if sharding.is_sharded(model):
            raise ValueError(
                "full fine-tuning keeps a frozen copy of the model, and this model was sharded over the processes as "
                "it was loaded. Set zero3_init_flag: false, or train an adapter (peft_config)."
            )
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @contextlib.contextmanager
    def active(self, policy: nn.Module) -> Iterator[PreTrainedModel]:
        self.model.to(base_model(policy).device)
        yield self.model


def split(
    model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None
) -> tuple[PreTrainedModel | PeftModel, Prior]:
    """The policy to train and the prior to keep, from the model that the user passed in.

    Args:
        model: gets adapter layers, or a frozen adapter.
        peft_config: is not changed, although PEFT writes into the one that it is given.

    Raises:
        ValueError: for a `peft_config` whose adapter, switched off, would not give the model back, or for a `PeftModel`
            that cannot be split; with the remedy.
    """
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ValueError(
                "model is a PeftModel already, so peft_config is ambiguous. Drop peft_config to train on from its "
                "adapter (a frozen copy of it is the prior), or pass model.merge_and_unload() with the peft_config."
            )
        for config in model.peft_config.values():
            check_apart(config)
        return model, FrozenAdapter(adapters.add_frozen_copy(model))
    if adapters.has_layers(model):
        raise ValueError(
            "the model has adapter layers in it already: it has been through get_peft_model, add_adapter or a trainer "
            "with a peft_config before, which change the object, or it was loaded from an adapter's folder. Load the "
            "model again; or pass the PeftModel itself (without peft_config) to train on from its adapter, or "
            "peft_model.unload() to drop it. Of an adapter's folder pass the path."
        )
    if peft_config is None:
        return model, FrozenCopy(model)
    check_peft_config(peft_config)
    config = copy.deepcopy(peft_config)
    config.inference_mode = False  # true in every config that PEFT has saved
    try:
        with quiet.new_adapter():
            policy = get_peft_model(model, config)
    except Exception as error:  # of any type: PEFT's own checks differ from one kind of adapter to the next
        raise ValueError(
            f"PEFT cannot put the {config.peft_type.value} adapter of this peft_config into a {type(model).__name__}: "
            f"{error}. Change peft_config, and load the model again, for a part of it may be in place."
        ) from error
    return cast(PeftModel, policy), AdapterOff(config)


def keep_four_bit_weights(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU with AVX512-BF16.

    At the first forward pass in eval mode it repacks them for its own kernel: scales are rounded to bf16, which changes
    the prior, and the kernel has no backward pass, so no gradient passes through it in training.

    Raises:
        ValueError: if it has already happened.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            cast(Any, module).support_avx512bf16_for_cpu = False
            if getattr(cast(Any, module).weight.quant_state, "packing_format_for_cpu", False):
                raise ValueError(
                    "the 4-bit model was used on this CPU before it was passed in, and bitsandbytes has rounded its "
                    "weights for a kernel without a backward pass. Load it again, and call "
                    "aldrift_hf.models.prior.keep_four_bit_weights(model) before you use it."
                )


def check_peft_config(config: PeftConfig) -> None:
    """Refuse an adapter that, switched off, would not give the model back.

    Raises:
        TypeError, ValueError: with the option to change.
    """
    if not isinstance(config, PeftConfig):
        raise TypeError(f"peft_config must be a peft.PeftConfig, as LoraConfig, got {type(config).__name__}")
    check_apart(config)
    if config.task_type not in (None, TaskType.CAUSAL_LM):
        raise ValueError(
            f"peft_config with task_type={str(config.task_type)!r} is for another kind of model. Use task_type="
            "'CAUSAL_LM'."
        )
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_INITS_THAT_EDIT_THE_BASE):
        raise ValueError(
            f"peft_config with init_lora_weights={init!r} rewrites the base weights, so the prior would not be the "
            "model that you passed in. Use init_lora_weights=True."
        )


def check_apart(config: PeftConfig) -> None:
    """Refuse an adapter that is not apart from the base model, or acts only where the whole model is called.

    Raises:
        ValueError: for virtual tokens, trained biases, and an adapter that acts from certain tokens on.
    """
    if config.is_prompt_learning:
        raise ValueError(
            f"an adapter of type {config.peft_type.value} prepends virtual tokens, which sequence log-probabilities do "
            "not account for. Use LoRA or another adapter on the weights."
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            "peft_config with alora_invocation_tokens acts only after these tokens, which PEFT looks for when the "
            "whole model is called; drawn and scored, the model would have no adapter. Use LoRA."
        )
    if getattr(config, "bias", "none") != "none":
        raise ValueError(
            f"an adapter with bias={config.bias!r} trains the base model's own biases, so the prior would change with "
            "them. Use bias='none'."
        )


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a `PeftModel`, adapter layers in place: it generates and is scored."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
