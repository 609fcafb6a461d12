"""bf16 where the processor has no instructions for it: a warning that says what to take."""

import pytest
import torch
from conftest import count_a, tiny_gpt2

from aldrift_hf import ALDRIFTTrainer
from aldrift_hf.models import slow_precision


@pytest.mark.parametrize(
    ("dtype", "autocast", "device", "capabilities", "warns"),
    [
        ("bfloat16", False, "cpu", {"avx512_bf16": False, "amx_bf16": False}, True),
        ("float32", True, "cpu", {"avx512_bf16": False, "amx_bf16": False}, True),
        ("float32", False, "cpu", {"avx512_bf16": False, "amx_bf16": False}, False),
        ("bfloat16", False, "cpu", {"avx512_bf16": True, "amx_bf16": False}, False),
        ("bfloat16", False, "cpu", {"avx512_bf16": False, "amx_bf16": True}, False),
        ("bfloat16", False, "cpu", {"neon": True}, False),
        ("bfloat16", True, "cuda", {"avx512_bf16": False, "amx_bf16": False}, False),
    ],
)
def test_slow_bf16_is_said(monkeypatch, caplog, dtype, autocast, device, capabilities, warns):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    model = tiny_gpt2().to(getattr(torch, dtype))
    slow_precision.warn_of_slow_bf16(model, autocast, torch.device(device))
    assert ("--dtype float32" in caplog.text) == warns


def test_a_run_says_so(config, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False}, raising=False)
    ALDRIFTTrainer(tiny_gpt2(), count_a, config(bf16=True), processing_class=tokenizer)
    assert caplog.text.count("no instructions for bf16") == 1


def test_an_older_pytorch_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert slow_precision.has_bf16_instructions() is None
