"""Models whose parameters are spread over the processes: FSDP2 and DeepSpeed ZeRO-3.

A forward pass of a sharded model waits for all processes, and these make different numbers of them when they propose
and score. Where the model itself draws, which takes a pass per token, its parameters are gathered once per phase
([`gathered`]), and no process waits for another. Where an engine draws with weights of its own, layers stay sharded,
and the processes make their forward passes together ([`in_step`]). Training steps run sharded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import types
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, StateDictType, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ._trl import add_hooks, remove_hooks

logger = logging.getLogger(__name__)


def check(accelerator: Accelerator, model: Any, draws_first: bool = False) -> None:
    """Refuse configurations that are known not to work, before anything is computed.

    Args:
        accelerator: the Trainer's.
        model: the language model itself.
        draws_first: whether draws are made before training begins, which is when the model is sharded.

    Raises:
        ValueError: with the setting to change.
    """
    state = accelerator.state
    plugin = getattr(state, "fsdp_plugin", None)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and plugin is None:
        logger.warning("FSDP was requested, but Accelerate supports it on accelerators only: this run uses plain DDP.")
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError("FSDP version 1 is not supported: set fsdp_version: 2 (accelerate_configs/fsdp2.yaml).")
    if plugin is not None and plugin.state_dict_type is not StateDictType.FULL_STATE_DICT:
        raise ValueError("checkpoints would miss the adapter: set fsdp_state_dict_type: FULL_STATE_DICT.")
    zero = getattr(state, "deepspeed_plugin", None)
    # The Trainer refuses them, too, but after draws.
    if differences := getattr(getattr(zero, "hf_ds_config", None), "mismatches", []):
        raise ValueError(
            f"DeepSpeed's config differs from the settings: {'; '.join(each.lstrip('- ') for each in differences)} "
            "(ds: the config, hf: the settings). Set these to auto in the config, or give the settings its values."
        )
    if plugin is None and (zero is None or zero.zero_stage != 3):
        return
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "quantized weights are not sharded here: each process holds all of them (in 4 bits, an eighth of fp32). "
            "Launch with accelerate_configs/multi_gpu.yaml."
        )
    if draws_first:
        logger.warning(
            "objective_range is not set: D is found from draws that are made before training shards the model, and "
            "until then each process holds all of it. Where that does not fit, set objective_range."
        )


@contextlib.contextmanager
def gathered(wrapped: nn.Module, accelerator: Accelerator, whole: bool = True) -> Iterator[None]:
    """Within a `with` block every process has whole parameters; all processes enter and leave it together.

    Args:
        wrapped: the model as the Trainer trains it.
        accelerator: the Trainer's.
        whole: if false, only what is not in a layer (embeddings, the last norm) is gathered; each layer is in a forward
            pass, for as long as it runs, and these are made [`in_step`].
    """
    if any(isinstance(module, FSDPModule) for module in wrapped.modules()):
        with _gathered_by_fsdp(wrapped, accelerator, whole):
            yield
    elif is_sharded(wrapped):
        with _gathered_by_deepspeed(wrapped, whole):
            yield
    else:
        yield


@contextlib.contextmanager
def _gathered_by_deepspeed(wrapped: nn.Module, whole: bool) -> Iterator[None]:
    """Without DeepSpeed's own hooks, which fetch what they have seen needed before: that differs between processes."""
    layers = [] if whole else list(_layers(wrapped))
    in_layers = {parameter for layer in layers for parameter in layer.parameters()}
    remove_hooks(wrapped)
    handles = [handle for layer in layers for handle in _gathered_as_it_runs(layer)]
    try:
        with _joined([parameter for parameter in wrapped.parameters() if parameter not in in_layers]):
            yield
    finally:
        for handle in handles:
            handle.remove()
        add_hooks(wrapped)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The members of a model's outermost lists of modules."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)


def _gathered_as_it_runs(layer: nn.Module) -> list[RemovableHandle]:
    joined = _joined(list(layer.parameters()))

    def enter(*_: Any) -> None:
        joined.__enter__()

    def leave(*_: Any) -> None:
        joined.__exit__(None, None, None)

    return [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave, always_call=True)]


@contextlib.contextmanager
def _gathered_by_fsdp(root: Any, accelerator: Accelerator, whole: bool) -> Iterator[None]:
    shards: list[Any] = [module for module in root.modules() if isinstance(module, FSDPModule)]
    reshards = bool(accelerator.state.fsdp_plugin.reshard_after_forward)
    _touch(root)
    root.set_reshard_after_forward(not whole)
    root.set_reshard_after_forward(False, recurse=False)
    # Transformers registers `generate` as a forward pass around the inner ones: FSDP reshards when it ends, whatever it
    # was told, and the next call would wait for all processes.
    as_forward = {module: module.__dict__.pop("generate") for module in shards if "generate" in module.__dict__}
    together = shards if whole else shards[:1]
    try:
        for module in together:
            module.unshard()
        yield
    finally:
        for module, generate in as_forward.items():
            module.generate = generate
        root.set_reshard_after_forward(reshards)
        root.set_reshard_after_forward(False, recurse=False)  # as FSDP itself has it for the root
        for module in together:
            module.reshard()


@contextlib.contextmanager
def in_step(model: PreTrainedModel) -> Iterator[bool]:
    """Within a `with` block all processes make their forward passes of a model together.

    A process that has made all of its own joins in the others' with one token, until nobody has any left; all enter
    and leave the block together. Where each process has whole parameters there is nothing to wait for.

    Args:
        model: the language model itself; only its own forward passes are counted.

    Yields:
        whether they do; then one that fails within a pass cannot go on alone.
    """
    if not any(is_apart(parameter) for parameter in model.parameters()):
        yield False
        return

    def announce(*_: Any) -> None:
        gather_object([True])

    handle = model.register_forward_pre_hook(announce)
    try:
        yield True
    finally:
        handle.remove()
    while any(gather_object([False])):
        token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False)


@contextlib.contextmanager
def writable(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within a `with` block parameters that ZeRO-3 has partitioned are whole; what rank 0 writes is kept."""
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        with _joined(parameters, modifier_rank=0):
            yield
    else:
        yield


def _joined(
    parameters: Sequence[nn.Parameter], modifier_rank: int | None = None
) -> contextlib.AbstractContextManager[None]:
    """A context in which parameters that ZeRO-3 has partitioned are whole; it may be entered again and again."""
    import deepspeed  # type: ignore[import-not-found,import-untyped,unused-ignore]

    context: contextlib.AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        parameters, modifier_rank=modifier_rank
    )
    return context


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 manages the parameters."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def vocabulary_size(model: Any) -> int:
    """Rows of the output embeddings, also where ZeRO-3 holds none of them on this process."""
    weight = model.get_output_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def whole(parameter: Tensor) -> Tensor:
    """A whole parameter, on the CPU; all processes call it."""
    detached = parameter.detach()
    if isinstance(detached, DTensor):
        return detached.full_tensor().cpu()
    with _joined([cast(nn.Parameter, parameter)]) if is_apart(parameter) else contextlib.nullcontext():
        return parameter.detach().to("cpu", copy=True)


def is_apart(parameter: Tensor) -> bool:
    """Whether a process now has only its own part of a parameter."""
    status = getattr(parameter, "ds_status", None)  # of ZeRO-3's parameters
    return isinstance(parameter, DTensor) or (status is not None and status.name == "NOT_AVAILABLE")


def put(parameter: nn.Parameter, value: Tensor) -> None:
    """Write a whole value, the same on all processes, into a parameter; each process writes its own part."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        # Every process has the whole value: nothing needs to be sent.
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    with torch.no_grad():
        parameter.copy_(value)


def _touch(root: Any) -> None:
    """A forward pass of the root that computes nothing: FSDP takes the first module that runs for the root."""
    if not hasattr(root, "_aldrift_touch"):
        root._aldrift_touch = types.MethodType(lambda self: None, root)
        register_fsdp_forward_method(root, "_aldrift_touch")
    root._aldrift_touch()
