"""How many completions at once: found out, halved where memory runs out, and without a say in what is drawn."""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from conftest import EOS, ALDRIFTTrainer, count_a, every_completion, fuzz, log_probs, lora_config, tiny_gpt2, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, PreTrainedConfig

from aldrift_hf.models import batching as batches
from aldrift_hf.models.batching import Batches, fitting
from aldrift_hf.models.configs import numbers
from aldrift_hf.models.footprint import Footprint, Work
from aldrift_hf.models.loading import context_length
from aldrift_hf.trainer import rollout


def out_of_memory_above(limit, done):
    def work(rows):
        if len(rows) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        done.append(rows)
        return list(rows)

    return work


@pytest.mark.slow
def test_the_size_is_halved_for_good_and_nothing_is_done_twice(caplog):
    found, done = Batches(64, fixed=False), []
    results = found.over(range(10, 110), out_of_memory_above(20, done))
    assert [row for rows in results for row in rows] == list(range(10, 110))
    assert [len(rows) for rows in done] == [16] * 6 + [4]
    assert found.size == 16
    assert "continuing with 16 completions at once" in caplog.text
    done.clear()
    found.over(range(32), out_of_memory_above(20, done))
    assert [len(rows) for rows in done] == [16, 16]


def test_a_size_set_by_hand_is_not_changed():
    with pytest.raises(torch.OutOfMemoryError, match="per_device_generation_batch_size=64: lower it") as raised:
        Batches(64, fixed=True).over(range(100), out_of_memory_above(20, []))
    assert "Tried to allocate" in str(raised.value.__cause__)


def test_one_row_that_does_not_fit_is_an_error_and_so_is_any_other():
    with pytest.raises(torch.OutOfMemoryError, match=r"not even one completion fits .*Lower max_completion_length"):
        Batches(4, fixed=False).over(range(4), out_of_memory_above(0, []))

    def broken(rows):
        raise ValueError("not about memory")

    with pytest.raises(ValueError, match="not about memory"):
        Batches(4, fixed=False).over(range(4), broken)


def refused_by_the_host(rows):
    torch.empty(2**60, dtype=torch.uint8)


def refused_by_python(rows):
    bytearray(2**60)


@pytest.mark.slow
@pytest.mark.parametrize("refused", [refused_by_the_host, refused_by_python])
def test_memory_that_the_host_refuses(refused):
    """As under `ulimit -v`."""
    found, done = Batches(64, fixed=False), []
    found.over(range(100), lambda rows: refused(rows) if len(rows) > 20 else done.append(rows))
    assert found.size == 16
    assert sum(map(len, done)) == 100


def model_of(config, dtype=torch.float32):
    return SimpleNamespace(config=config, dtype=dtype, device=torch.device("cpu"), parameters=lambda: [])


def free(monkeypatch, size, share=1.0):
    monkeypatch.setattr(batches, "free_memory", lambda device: size)
    monkeypatch.setattr(batches, "MEMORY_SHARE", share)


def test_the_footprint_of_a_tiny_llama_by_hand():
    """2 layers, hidden 16, 2 heads of 8, 1 of them for keys, 32 in the middle; fp32."""
    footprint = Footprint.of(tiny_llama())
    assert footprint.cached == 2 * 2 * 8 * 4, "keys and values, layers, head, bytes"
    assert footprint.attended == 2 * (1 + 2) * 8 * 4
    assert footprint.activations == (6 * 32 + 4 * 16 + 6 * 16) * 4
    work = Work(prompt=5, completion=3, scoring_batch_tokens=16)
    step = 10 * 5 * (4 + 4 + 4 + 4 + 4 + 4 + 8)
    prefill = 10 * 5 * (footprint.activations + 5 * 5)
    assert footprint.drawing(10, work) == 10 * 8 * 128 + max(prefill, 10 * 8 * footprint.attended + step)
    rows = 2  # in a forward pass of 16 tokens
    assert footprint.scoring(10, work) == rows * 8 * (footprint.activations + 8 * 5) + rows * 3 * 5 * 12
    shared = dataclasses.replace(work, per_prompt=5)
    assert [shared.prompts(rows) for rows in (1, 2, 5, 6, 7, 10)] == [1, 2, 2, 2, 3, 3]
    assert footprint.drawing(10, shared) < footprint.drawing(10, work)


def test_the_guess_is_the_rows_that_fit(monkeypatch):
    work, footprint = Work(40, 32, 2**14), Footprint.of(tiny_llama())
    free(monkeypatch, footprint.needed(64, work))
    assert fitting(tiny_llama().requires_grad_(False), work) == 64
    free(monkeypatch, footprint.needed(64, work) - 1)
    assert fitting(tiny_llama().requires_grad_(False), work) == 32
    free(monkeypatch, 2 * footprint.needed(64, work), share=0.5)
    assert fitting(tiny_llama().requires_grad_(False), work) == 64
    assert fitting(tiny_llama().requires_grad_(False), Work(1, 1, 2**14)) == batches.MAX_BATCH_SIZE
    monkeypatch.undo()
    assert fitting(tiny_gpt2(), Work(5, 5, 2**14)) == batches.MAX_BATCH_SIZE, "a tiny model fits into this machine"


def test_the_first_update_still_needs_memory(monkeypatch):
    """Gradients and two moments of what is trained: 12 bytes for each parameter in fp32."""
    work, model = Work(40, 32, 2**14), tiny_llama()
    needed = Footprint.of(model).needed(64, work)
    free(monkeypatch, needed + 12 * model.num_parameters())
    assert fitting(model, work) == 64
    free(monkeypatch, needed + 12 * model.num_parameters() - 1)
    assert fitting(model, work) == 32
    assert fitting(model, work, present=64) == 64, "later it has taken it"


def test_a_run_keeps_its_size_as_long_as_that_fits(monkeypatch):
    work, model = Work(40, 32, 2**14), tiny_llama()
    needed = Footprint.of(model).needed(64, work)
    free(monkeypatch, needed, share=0.5)
    assert fitting(model, work, present=64) == 64
    assert fitting(model, work, present=16) == 16, "it does not grow: other batches round differently"
    assert fitting(model, Work(45, 32, 2**14), present=64) < 64
    free(monkeypatch, needed - 1, share=0.5)
    assert fitting(model, work, present=64) < 64


@pytest.mark.slow
def test_where_not_even_one_row_fits(monkeypatch, config, tokenizer):
    model = tiny_llama().requires_grad_(False)
    work = Work(40, 32, 2**14)
    free(monkeypatch, Footprint.of(model).needed(1, work))
    assert fitting(model, work) == 1
    free(monkeypatch, Footprint.of(model).needed(1, work) - 1)
    with pytest.raises(MemoryError, match=r"32 tokens after a prompt of 40 needs .*Lower max_completion_length"):
        fitting(model, work)
    free(monkeypatch, 0)
    settings = config(per_device_generation_batch_size=None, num_rungs=1)
    trainer = ALDRIFTTrainer(model, count_a, settings, processing_class=tokenizer, peft_config=lora_config(model))
    with pytest.raises(MemoryError, match="set per_device_generation_batch_size=1"):
        trainer.train()
    assert trainer.objective_calls == 0
    settings = config(per_device_generation_batch_size=1, num_rungs=1, num_generations=4)
    trainer = ALDRIFTTrainer(
        tiny_llama(), count_a, settings, processing_class=tokenizer, peft_config=lora_config(model)
    )
    trainer.train()


def test_prompts_that_share_their_computation_are_counted_once(monkeypatch, config, tokenizer):
    seen = []
    monkeypatch.setattr(rollout, "fitting", lambda model, work, present: seen.append((work, present)) or 32)
    monkeypatch.setattr(rollout, "MIN_PROMPT", 4)
    model = tiny_llama()
    settings = config(per_device_generation_batch_size=None)
    prompts = ["a b c", "a"]
    trainer = ALDRIFTTrainer(
        model, count_a, settings, train_dataset=prompts, processing_class=tokenizer, peft_config=lora_config(model)
    )
    trainer.rollout.propose(trainer.inputs.prompts, 8, (1, 2))
    trainer.rollout.propose(trainer.inputs.encode(["b c"], "prompts"), 8, (1, 2))
    assert seen == [(Work(4, 3, 2**14, per_prompt=8), None), (Work(3, 3, 2**14), 32)]


SIZES = st.one_of(
    st.none(), st.booleans(), st.integers(-1, 2**20), st.floats(), st.text(max_size=2), st.lists(st.integers(-1, 512))
)
NAMES = (
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "num_hidden_layers", "vocab_size"),
    "max_position_embeddings",
)


class Odd(PreTrainedConfig):
    """A config whose every number may be anything, be absent, or fail when it is read."""

    model_type = "odd"

    def __getattribute__(self, name):
        values = super().__getattribute__("__dict__").get("values", {})
        if name not in NAMES:
            return super().__getattribute__(name)
        if name not in values:
            raise AttributeError(name)
        if values[name] == "?":
            raise RuntimeError("ambiguous: it differs between layers")
        return values[name]


def odd(**values):
    config = Odd()
    config.__dict__["values"] = values
    return config


@pytest.mark.slow
@given(
    values=st.fixed_dictionaries({}, optional={name: SIZES | st.just("?") for name in NAMES}),
    tokens=st.integers(1, 2**17),
)
@fuzz(200)
def test_any_config_can_be_estimated(values, tokens):
    model = model_of(odd(**values), torch.bfloat16)
    with contextlib.suppress(MemoryError):  # such a model could not have been loaded
        assert fitting(model, Work(tokens, 1, 2**14)) in {2**power for power in range(11)}
    length = context_length(model.config)
    assert length is None or length > 0


def test_layers_may_differ():
    """The estimate is made for the largest."""
    sizes = {"num_attention_heads": 4, "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 5}
    for layers in (
        {"head_dim": [16, 8], "num_key_value_heads": [1, None, 4, 0]},
        {"head_dim": None, "num_key_value_heads": None},
        {"head_dim": 0, "num_key_value_heads": {"full": 4, "sliding": 2}},
        {},
    ):
        footprint = Footprint.of(model_of(odd(**sizes, **layers)))
        assert footprint.cached == 2 * 2 * 4 * 16 * 4
        assert footprint.activations == (6 * 4 * 64 + 4 * 64 + 6 * 64) * 4


@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="this version of transformers has no Gemma 4")
@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="a version of Transformers without Gemma 4")
def test_gemma_4_whose_layers_differ():
    config = CONFIG_MAPPING["gemma4_text"]()
    assert set(numbers(config, "head_dim")) in ({256, 512}, {256})  # of each kind of layer, or of one as it was before
    assert 1 <= fitting(model_of(config, torch.bfloat16), Work(900, 100, 2**14)) <= batches.MAX_BATCH_SIZE
    assert context_length(config) == 131072


@pytest.mark.parametrize(
    ("length", "known"), [(16, 16), (None, None), (-1, None), (0, None), ([8, 16], 8), (True, None), ("16", None)]
)
def test_the_context_is_known_or_not(length, known):
    assert context_length(odd(max_position_embeddings=length)) == known


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["metropolis_hastings", "archive"])
def test_a_run_that_runs_out_of_memory_goes_on_with_the_same_draws(config, tokenizer, tmp_path, monkeypatch, sampler):
    """Generation fails beyond 10 rows: the run has the draws, the samples and the model of one that had the memory."""
    runs = {}
    for name in ("enough", "short"):
        model = tiny_gpt2()
        settings = config(
            output_dir=str(tmp_path / name),
            per_device_generation_batch_size=None,
            sampler=sampler,
            save_strategy="epoch",
        )
        trainer = ALDRIFTTrainer(
            model, count_a, settings, train_dataset=["", "a b"], processing_class=tokenizer,
            peft_config=lora_config(model),
        )  # fmt: skip
        if name == "short":
            generate = model.generate

            def short_of_memory(input_ids, generate=generate, **kwargs):
                if len(input_ids) > 10:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
                return generate(input_ids=input_ids, **kwargs)

            monkeypatch.setattr(model, "generate", short_of_memory)
        trainer.train()
        runs[name] = trainer
    assert runs["enough"].rollout.batches == Batches(batches.MAX_BATCH_SIZE, fixed=False)
    assert runs["short"].rollout.batches == Batches(8, fixed=False)
    scores = [log_probs(run.model.get_base_model(), [EOS], every_completion()) for run in runs.values()]
    assert torch.allclose(*scores, atol=1e-4)
    for key in ("objective_mean", "distinct_proposals", "objective_calls", "sample_objective_mean"):
        assert [record[key] for record in runs["enough"].record.rungs] == [
            record[key] for record in runs["short"].record.rungs
        ], key
    trainer = runs["short"]
    folder = str(tmp_path / "short" / "checkpoint-12")
    trainer.rollout.batches = None
    trainer.checkpointer.read(folder)
    assert trainer.rollout.batches == Batches(8, fixed=False), "a resumed run would draw in other batches"


def test_processes_that_wait_for_each_other_do_not_try_again():
    """One that repeated a pass with fewer rows would make another number of passes than the others expect."""
    found = Batches(64, fixed=False)

    def work(rows):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(torch.OutOfMemoryError, match="per_device_generation_batch_size=64: set a lower one"):
        found.over(range(100), work, retry=False)
    assert found.size == 64
