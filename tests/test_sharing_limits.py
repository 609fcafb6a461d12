"""Where prompts may be computed once for several rows, and where not; and which adapters begin as the prior."""

import threading

import pytest
import torch
from peft import LoHaConfig, LoraConfig
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from aldrift_hf.models import prior as prior_module
from aldrift_hf.models.scoring import _batches, inference, sequence_logprobs
from aldrift_hf.models.shared_prompts import attention
from aldrift_hf.models.shared_prompts.cache import SharedPrompts, prefill
from aldrift_hf.models.shared_prompts.support import can_share_prompts
from aldrift_hf.types import Completions


@pytest.mark.parametrize("shared", [False, True])
def test_a_pass_has_no_more_tokens_than_asked(shared):
    rows = [((prompt,) * 10, (1,) * length) for prompt in range(3) for length in range(9, 1, -1)]
    rows = rows if shared else sorted(rows, key=lambda row: -len(row[1]))
    batches = [*_batches(rows, 4, 32, shared)]
    assert [row for batch in batches for row in batch] == rows
    for batch in batches:
        packed = sum(map(len, {prompt for prompt, _ in batch})) + sum(len(completion) for _, completion in batch)
        assert (packed if shared else len(batch) * max(len(a) + len(b) for a, b in batch)) <= 32
        assert len(batch) <= 4


def windowed(window):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=5,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        sliding_window=window,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    return MistralForCausalLM(config).eval()


def test_rows_beyond_a_models_window_are_scored_apart():
    """A window wider than the rows on which sharing is tried, and narrower than these."""
    model, prompt, rows = windowed(12), [2, 3, 4, 3] * 5, [[2, 0], [3, 0], [4, 3, 0], [4, 4, 0]]
    with inference(model):
        together, *apart = (
            sequence_logprobs(model, [prompt] * len(some), Completions.of(some, 0), pad_token_id=0, batch_size=64)
            for some in (rows, *([row] for row in rows))
        )
    assert torch.allclose(together, torch.cat(apart), atol=1e-5)


def test_prompts_are_shared_in_drawing_where_all_that_follows_is_within_the_window():
    model, prompt = windowed(20), [2, 3, 4, 3] * 4
    ids = torch.tensor([prompt] * 4)
    with inference(model):
        assert can_share_prompts(model, 20)
        assert prefill(model, [prompt] * 4, ids, torch.ones_like(ids), 5) is None


def test_chunked_attention_is_not_shared_beyond_its_chunk():
    model = windowed(None)
    model.config.attention_chunk_size = 12
    assert attention.may_share(model, 12)
    assert not attention.may_share(model, 13)


def test_a_cache_is_back_after_another_pass_within():
    model, cache = windowed(None), object()
    with attention.sharing(model, cache):
        with attention.sharing(model):
            assert attention._current.cache is None
        assert attention._current.cache is cache
    assert attention._current.cache is None


def test_a_cache_of_shared_prompts_is_its_threads_own():
    model, seen = windowed(None), []
    with attention.sharing(model, object()):
        (other := threading.Thread(target=lambda: seen.append(attention._current.cache))).start()
        other.join()
    assert seen == [None]


@pytest.mark.parametrize("scaling", [None, 0.9])
def test_attention_in_two_parts_has_the_models_own_scaling(scaling):
    """As Gemma's and Granite's, which is not one over the root of the width."""
    chance = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=chance)

    keys, values, prompt_of = normal(2, 1, 5, 4), normal(2, 1, 5, 4), torch.tensor([0, 1, 0])
    query, key, value = normal(3, 2, 1, 4), normal(3, 1, 3, 4), normal(3, 1, 3, 4)
    computed = DynamicCache()
    computed.update(keys, values, 0)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    found = SharedPrompts(computed, mask, prompt_of).attend(0, query, key, value, scaling)
    for row, prompt in enumerate(prompt_of.tolist()):
        seen = mask[prompt].bool()
        every, what = (torch.cat([a[prompt, 0, seen], b[row, 0]]) for a, b in ((keys, key), (values, value)))
        scores = query[row, :, 0] @ every.T * (0.5 if scaling is None else scaling)
        assert torch.allclose(found[row, 0], scores.softmax(-1) @ what, atol=1e-5)


@pytest.mark.parametrize("adapter", [LoraConfig(init_lora_weights=False), LoHaConfig(init_weights=False)])
def test_an_adapter_that_changes_the_model_from_the_start_is_known(adapter):
    assert not prior_module.AdapterOff(adapter).is_start
    assert prior_module.AdapterOff(type(adapter)()).is_start


def test_olora_in_any_case_of_letters_is_refused():
    with pytest.raises(ValueError, match="rewrites the base weights"):
        prior_module.check_peft_config(LoraConfig(task_type="CAUSAL_LM", init_lora_weights="OLoRA"))
