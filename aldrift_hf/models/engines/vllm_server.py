"""A vLLM server as the engine: on GPUs of its own, or shared by several processes of a run.

Start it with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank R`, with the model
that the run begins with, in the same precision. What it listens at is yours to guard: whoever reaches it can load
adapters. The run's first process passes adapters on as folders that the server can read, each under a new name; the
model's own weights never are, so full fine-tuning needs `engine="vllm"`.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, cast

import httpx
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import nn

from ...streams import stream_seed
from ...types import Draws
from .base import Engine, EngineSettings
from .vllm import check_servable, draws_of, plain_sampling, save_adapter, whole_adapter

ADDRESS = "http://localhost:8000"
TIMEOUT = 600.0
"""Seconds after which an answer is given up."""
PAUSES = (1.0, 4.0, 16.0)
"""Seconds before a request is made again that found no server, or one that is too busy."""
BUSY = (429, 502, 503, 504)
"""What such a server answers."""


class VLLMServerEngine(Engine):
    """Draws with a vLLM server's completions, one request per row, each with the row's own seed; see [`Engine`].

    Args:
        settings: the run's. Its `options` are `base_url` (default `http://localhost:8000`), `api_key`, `timeout`
            (seconds), `concurrency` (requests at once, default 64) and `adapter_dir` (a folder that the server sees
            under the same path; default: a temporary one).

    Raises:
        ValueError: for other options.
    """

    draws_with_policy: ClassVar[bool] = False
    remedy: ClassVar[str] = (
        "Serve the model that the run begins with, in the same precision, with --enable-lora, a --max-lora-rank of at "
        "least the adapter's, and the default --logprobs-mode."
    )

    def __init__(self, settings: EngineSettings) -> None:
        known = {"base_url": ADDRESS, "api_key": "", "timeout": TIMEOUT, "concurrency": 64, "adapter_dir": None}
        if unknown := settings.options.keys() - known.keys():
            raise ValueError(
                f"engine_kwargs of engine='vllm_server' are {', '.join(known)}, got {', '.join(sorted(unknown))}."
            )
        options: dict[str, Any] = {**known, **settings.options}
        self.settings, self.concurrency = settings, int(options["concurrency"])
        headers = {"Authorization": f"Bearer {options['api_key']}"} if options["api_key"] else {}
        self._client = httpx.Client(base_url=options["base_url"], headers=headers, timeout=options["timeout"])
        self._temporary = tempfile.TemporaryDirectory(prefix="aldrift_adapters_", dir=options["adapter_dir"])
        self._folder = Path(self._temporary.name)
        self._names = (f"aldrift-{uuid.uuid4().hex}-{number}" for number in itertools.count(1))
        self._name: str | None = None

    @classmethod
    def from_settings(cls, settings: EngineSettings) -> VLLMServerEngine:
        return cls(settings)

    def check(self, policy: nn.Module) -> None:
        """See [`Engine.check`].

        Raises:
            ValueError: for models that the server cannot serve, and for full fine-tuning.
        """
        check_servable(policy)
        if not isinstance(policy, PeftModel):
            raise ValueError(
                "engine='vllm_server' passes on adapters alone: set peft_config, or take engine='vllm' for full "
                "fine-tuning."
            )

    def sync(self, policy: nn.Module) -> None:
        """See [`Engine.sync`].

        Raises:
            ConnectionError: for a server that does not answer.
            RuntimeError: for one that refuses the adapter.
        """
        policy = cast(PeftModel, policy)
        before, parameters = self._name, whole_adapter(policy)
        self._name = broadcast_object_list([next(self._names)])[0]
        if PartialState().is_main_process:
            path = save_adapter(policy, parameters, self._folder / self._name)
            # After an answer that was lost on the way, the adapter may be there; after a restart, the old one is not.
            body = {"lora_name": self._name, "lora_path": str(path.resolve())}
            self._post("/v1/load_lora_adapter", body, lambda answer: "already been loaded" in answer.text)
            if before is not None:
                self._post("/v1/unload_lora_adapter", {"lora_name": before}, lambda answer: answer.status_code == 404)
                shutil.rmtree(self._folder / before)
        PartialState().wait_for_everyone()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        address: Sequence[int],
        rows: range,
        limits: Sequence[int] | None = None,
    ) -> Draws:
        """See [`Engine.generate`].

        Raises:
            ConnectionError: for a server that does not answer.
            RuntimeError: for one that refuses a request, or gives a completion up.
        """
        if self._name is None:
            raise RuntimeError("call sync(policy) before generate()")
        most = self.settings.max_completion_length
        bodies = [
            {
                "model": self._name,
                "prompt": list(prompt),
                "return_token_ids": True,
                "skip_special_tokens": False,
                **plain_sampling(stream_seed(*address, row), limit, self.settings.eos_token_ids),
            }
            for prompt, row, limit in zip(prompts, rows, limits or [most] * len(prompts), strict=True)
        ]
        with ThreadPoolExecutor(self.concurrency) as pool:
            answers = list(pool.map(lambda body: self._post("/v1/completions", body), bodies))
        choices = [answer.json()["choices"][0] for answer in answers]
        if any(choice.get("token_ids") is None for choice in choices):
            raise RuntimeError(
                f"the vLLM server at {self._client.base_url} does not tell the tokens that it drew (return_token_ids). "
                f"{self.remedy}"
            )
        return draws_of(
            [choice["token_ids"] for choice in choices],
            [choice["logprobs"]["token_logprobs"] for choice in choices],
            [choice["finish_reason"] for choice in choices],
            self.settings,
        )

    def _post(
        self, path: str, body: dict[str, Any], is_done: Callable[[httpx.Response], bool] = lambda answer: False
    ) -> httpx.Response:
        """The answer to a request, made again where the server is busy.

        Args:
            path: of the request.
            body: of the request.
            is_done: whether a refusal says that nothing is left to do.
        """
        answer = self._try(path, body)
        for pause in PAUSES:
            if isinstance(answer, httpx.Response) and answer.status_code not in BUSY:
                break
            time.sleep(pause)
            answer = self._try(path, body)
        where = f"the vLLM server at {self._client.base_url}"
        if isinstance(answer, httpx.TransportError):
            raise ConnectionError(
                f"{where} does not answer {path} ({answer!r}), asked {1 + len(PAUSES)} times. Start it (vllm serve "
                "MODEL --enable-lora), or set base_url or timeout in engine_kwargs."
            ) from answer
        if not answer.is_success and not is_done(answer):
            raise RuntimeError(
                f"{where} answers {path} with {answer.status_code}: {answer.text[:500]} {self.remedy} To load adapters "
                "it needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=True."
            )
        return answer

    def _try(self, path: str, body: dict[str, Any]) -> httpx.Response | httpx.TransportError:
        try:
            return self._client.post(path, json=body)
        except httpx.TransportError as error:  # no server, or none that answers in time
            return error
