"""The server engine against a stand-in of a vLLM server, and, where vLLM is installed, against vLLM itself."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import pytest
import torch
from conftest import EOS, MAX_LENGTH, ALDRIFTTrainer, count_a, free_port, lora_config, perturb, tiny_llama
from peft import get_peft_model

from aldrift_hf.models.engines import EngineGuard, EngineSettings, VLLMServerEngine, vllm_server
from aldrift_hf.models.prior import base_model
from aldrift_hf.models.scoring import inference
from aldrift_hf.toy import word_tokenizer

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is in an environment of its own")


class StandIn(ThreadingHTTPServer):
    """Answers completions with the same two tokens; keeps what it was asked, and fails as often as it is told to."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.asked, self.failures, self.status = [], 0, 503
        self.reason = "stop"
        self.loaded: set[str] = set()
        self.tells_tokens = True
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def paths(self):
        return [path for path, _ in self.asked]


class Answers(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        if self.server.failures:
            self.server.failures -= 1
            return self.answer(self.server.status, {"error": "out of order"})
        name, loaded = body.get("lora_name"), self.server.loaded
        if self.path == "/v1/load_lora_adapter":
            if name in loaded:
                return self.answer(400, {"error": f"The lora adapter '{name}' has already been loaded."})
            loaded.add(name)
        if self.path == "/v1/unload_lora_adapter":
            if name not in loaded:
                return self.answer(404, {"error": f"The lora adapter '{name}' cannot be found."})
            loaded.remove(name)
        logprobs = {"token_logprobs": [-0.5, -1.25]}
        choice = {"token_ids": [3, EOS], "logprobs": logprobs, "finish_reason": self.server.reason}
        if not self.server.tells_tokens:
            del choice["token_ids"]
        return self.answer(200, {"choices": [choice]})

    def answer(self, status, content):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(vllm_server, "PAUSES", (0.01, 0.01))
    stand_in = StandIn()
    yield stand_in
    stand_in.shutdown()


def engine_at(address, **options):
    return VLLMServerEngine.from_settings(EngineSettings(MAX_LENGTH, (EOS, 4), EOS, {"base_url": address, **options}))


def policy_of():
    model = tiny_llama(hidden_size=64, initializer_range=0.15)
    policy = get_peft_model(model, lora_config(model)).eval()
    perturb(policy, seed=5, scale=0.05)
    return policy


def test_requests_change_no_probability(server):
    engine = engine_at(server.address)
    engine.sync(policy_of())
    draws = engine.generate([[1], [1, 2]], (7,), range(10, 12), [3, 2])
    assert draws.completions.tokens() == [[3, EOS], [3, EOS]]
    assert draws.log_probs.tolist() == [-1.75, -1.75]
    bodies = sorted((body for path, body in server.asked if path == "/v1/completions"), key=lambda body: body["prompt"])
    assert [body["prompt"] for body in bodies] == [[1], [1, 2]]
    assert [body["max_tokens"] for body in bodies] == [3, 2]
    assert bodies[0]["seed"] != bodies[1]["seed"]
    neutral = {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "repetition_penalty": 1.0, "n": 1, "ignore_eos": True, "stop_token_ids": [EOS, 4], "min_tokens": 0,
    }  # fmt: skip
    assert all(body.items() >= neutral.items() for body in bodies)


def test_each_round_has_an_adapter_of_a_new_name(server):
    """And the one before is unloaded, its folder deleted."""
    policy, engine = policy_of(), engine_at(server.address)
    loaded = []
    for _ in range(3):
        engine.sync(policy)
        loaded.append(next(body for path, body in reversed(server.asked) if path == "/v1/load_lora_adapter"))
        assert os.path.exists(os.path.join(loaded[-1]["lora_path"], "adapter_model.safetensors"))
    names = [body["lora_name"] for body in loaded]
    assert len({*names}) == 3
    gone = [body["lora_name"] for path, body in server.asked if path == "/v1/unload_lora_adapter"]
    assert gone == names[:2]
    assert [os.path.exists(body["lora_path"]) for body in loaded] == [False, False, True]


def test_a_busy_server_is_asked_again(server):
    engine = engine_at(server.address)
    server.failures = 2
    engine.sync(policy_of())
    assert server.paths() == ["/v1/load_lora_adapter"] * 3


def test_an_answer_that_was_lost_and_a_server_that_was_restarted_are_no_errors(server, monkeypatch):
    policy, engine = policy_of(), engine_at(server.address)
    post, lost = engine._client.post, [True]

    def losing(path, **given):
        answer = post(path, **given)
        return httpx.Response(504) if lost and lost.pop() else answer

    monkeypatch.setattr(engine._client, "post", losing)
    engine.sync(policy)
    assert server.paths() == ["/v1/load_lora_adapter"] * 2
    server.loaded.clear()
    engine.sync(policy)
    assert server.paths()[2:] == ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
    assert len(server.loaded) == 1


def test_a_server_that_does_not_tell_tokens_is_told_so(server):
    server.tells_tokens = False
    engine = engine_at(server.address)
    engine.sync(policy_of())
    with pytest.raises(RuntimeError, match=r"does not tell the tokens that it drew \(return_token_ids\)"):
        engine.generate([[1]], (7,), range(1))


@pytest.mark.parametrize(("status", "asked"), [(503, 3), (400, 1)])
def test_an_error_of_the_server_is_passed_on(server, status, asked):
    server.failures, server.status = 9, status
    with pytest.raises(
        RuntimeError, match=rf"answers /v1/load_lora_adapter with {status}: .*out of order.*LORA_UPDATING"
    ):
        engine_at(server.address).sync(policy_of())
    assert len(server.asked) == asked


def test_without_a_server_the_error_says_how_to_start_it(server):
    address = server.address
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match=r"does not answer .* asked 3 times\. Start it \(vllm serve"):
        engine_at(address).sync(policy_of())


def test_a_completion_that_is_given_up_is_an_error(server):
    engine = engine_at(server.address)
    engine.sync(policy_of())
    server.reason = "abort"
    with pytest.raises(RuntimeError, match="gave a completion up: its reason is 'abort'"):
        engine.generate([[1]], (7,), range(1))


def test_the_first_process_passes_the_adapter_on_for_all(server, monkeypatch):
    """The others draw under its name."""
    engine = engine_at(server.address)
    process = SimpleNamespace(is_main_process=False, wait_for_everyone=lambda: None)
    monkeypatch.setattr(vllm_server, "PartialState", lambda: process)
    monkeypatch.setattr(vllm_server, "broadcast_object_list", lambda values: ["the first's"])
    for _ in range(2):
        engine.sync(policy_of())
    assert server.asked == []
    engine.generate([[1]], (7,), range(1))
    assert [body["model"] for _, body in server.asked] == ["the first's"]


def test_what_a_server_cannot_serve_is_refused_when_the_trainer_is_made(server, config, tokenizer):
    args = config(engine="vllm_server", engine_kwargs={"base_url": server.address})
    with pytest.raises(ValueError, match="passes on adapters alone: set peft_config"):
        ALDRIFTTrainer(tiny_llama(), count_a, args, processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"engine_kwargs of engine='vllm_server' are base_url, .* got gpu"):
        engine_at(server.address, gpu=1)
    assert server.asked == []


@pytest.fixture(scope="module")
def vllm_at(tmp_path_factory):
    """A vLLM server of the tiny model."""
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    tiny_llama(hidden_size=64, initializer_range=0.15).save_pretrained(folder)
    word_tokenizer(["a", "b", "c"], " ").save_pretrained(folder)
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    line += ["--dtype", "float32", "--enforce-eager", "--enable-lora", "--max-lora-rank", "8", "--max-model-len", "16"]
    line += ["--host", "127.0.0.1", "--generation-config", "vllm"]
    settings = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1"}
    settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **settings})
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(900):  # it takes a minute, and many where much else runs
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail(f"the server does not answer after 15 minutes:\n{(folder / 'log').read_text()[-3000:]}")
        yield address
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()


@needs_vllm
def test_a_server_draws_from_the_present_adapter(vllm_at):
    """Its log-probabilities are the model's, and its draws pass the guard, whatever the adapter has become."""
    policy, engine = policy_of(), engine_at(vllm_at, timeout=120.0)
    guard = EngineGuard(engine, EOS, 16384)
    before = None
    for round in range(3):
        with inference(policy):
            engine.sync(policy)
            draws = engine.generate([[EOS], [EOS, 4, 1]] * 40, (round,), range(80))
            guard.begin()
            guard.check(guard.measure(base_model(policy), [[EOS], [EOS, 4, 1]] * 40, draws))
        assert guard.gaps.abs().max() < 1e-4
        assert before is None or not torch.equal(draws.log_probs, before)
        before = draws.log_probs
        perturb(policy, seed=round, scale=0.1)
    again = engine.generate([[EOS]] * 8, (5,), range(8)), engine.generate([[EOS]] * 4, (5,), range(4))
    assert again[0].completions.tokens()[:4] == again[1].completions.tokens()
