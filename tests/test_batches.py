"""How many completions at once: found out, halved where memory runs out, and without a say in what is drawn."""

import pytest
import torch
from conftest import EOS, ALDRIFTTrainer, count_a, every_completion, log_probs, lora_config, tiny_gpt2, tiny_llama

from aldrift_hf.models import batching as batches
from aldrift_hf.models.batching import Batches, fitting


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
