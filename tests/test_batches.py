"""How many completions at once: found out, halved where memory runs out, and without a say in what is drawn."""

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
from aldrift_hf.models.loading import context_length


def out_of_memory_above(limit, done):
    def work(rows):
        if len(rows) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        done.append(rows)
        return list(rows)

    return work


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
    with pytest.raises(torch.OutOfMemoryError):
        Batches(64, fixed=True).over(range(100), out_of_memory_above(20, []))


def test_one_row_that_does_not_fit_is_an_error_and_so_is_any_other():
    with pytest.raises(torch.OutOfMemoryError):
        Batches(4, fixed=False).over(range(4), out_of_memory_above(0, []))

    def broken(rows):
        raise ValueError("not about memory")

    with pytest.raises(ValueError, match="not about memory"):
        Batches(4, fixed=False).over(range(4), broken)


def test_the_guess_is_the_rows_whose_cache_fits(monkeypatch):
    """By hand: a tiny Llama caches 2 layers × 1 head × 8 numbers, keys and values, 4 bytes each: 128 bytes a token."""
    monkeypatch.setattr(batches, "_free_memory", lambda device: 100 * 128 * 50)
    monkeypatch.setattr(batches, "MEMORY_SHARE", 1.0)
    assert fitting(tiny_llama(), tokens=50) == 64
    assert fitting(tiny_llama(), tokens=5) == 512
    assert fitting(tiny_llama(), tokens=1) == batches.MAX_BATCH_SIZE
    assert fitting(tiny_llama(), tokens=10**9) == 1
    monkeypatch.undo()
    assert fitting(tiny_gpt2(), tokens=10) == batches.MAX_BATCH_SIZE, "a tiny model fits into this machine"


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


@given(
    values=st.fixed_dictionaries({}, optional={name: SIZES | st.just("?") for name in NAMES}),
    tokens=st.integers(1, 2**17),
)
@fuzz(200)
def test_a_guess_never_ends_a_run(values, tokens):
    model = SimpleNamespace(config=odd(**values), dtype=torch.bfloat16, device=torch.device("cpu"))
    size = fitting(model, tokens)
    assert size in {2**power for power in range(11)}
    length = context_length(model.config)
    assert length is None or length > 0


def test_layers_may_differ(monkeypatch):
    """The guess is made for the largest. By hand: 2 layers × 4 heads × 16 numbers, keys and values, 4 bytes: 1 KiB."""
    monkeypatch.setattr(batches, "_free_memory", lambda device: 1024 * 64 + 12 * 5)
    monkeypatch.setattr(batches, "MEMORY_SHARE", 1.0)
    sizes = {"num_attention_heads": 4, "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 5}
    for layers in (
        {"head_dim": [16, 8], "num_key_value_heads": [1, None, 4, 0]},
        {"head_dim": None, "num_key_value_heads": None},
        {"head_dim": 0, "num_key_value_heads": {"full": 4, "sliding": 2}},
        {},
    ):
        config = odd(**sizes, **layers)
        model = SimpleNamespace(config=config, dtype=torch.float32, device=torch.device("cpu"))
        assert fitting(model, tokens=64) == 1
        assert fitting(model, tokens=63) == 1
        assert fitting(model, tokens=16) == 2, "four rows would fit without a step's logits"
        assert fitting(model, tokens=15) == 4


@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="this version of transformers has no Gemma 4")
@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="a version of Transformers without Gemma 4")
def test_gemma_4_whose_layers_differ():
    config = CONFIG_MAPPING["gemma4_text"]()
    assert set(numbers(config, "head_dim")) in ({256, 512}, {256})  # of each kind of layer, or of one as it was before
    model = SimpleNamespace(config=config, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert 1 <= fitting(model, 1000) <= batches.MAX_BATCH_SIZE
    assert context_length(config) == 131072


def test_a_device_that_does_not_say_what_is_free(monkeypatch):
    """As Apple's, whose memory is the host's, and drivers without the query."""

    class NoQuery:
        def mem_get_info(self, device):
            raise RuntimeError("The device doesn't support querying available free memory")

    for module in (SimpleNamespace(), NoQuery()):
        monkeypatch.setattr(torch, "get_device_module", lambda device, module=module: module)
        assert (
            fitting(SimpleNamespace(config=tiny_llama().config, dtype=torch.float32, device=torch.device("mps")), 4) > 1
        )


@pytest.mark.parametrize(
    ("length", "known"), [(16, 16), (None, None), (-1, None), (0, None), ([8, 16], 8), (True, None), ("16", None)]
)
def test_the_context_is_known_or_not(length, known):
    assert context_length(odd(max_position_embeddings=length)) == known


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
