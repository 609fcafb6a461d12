"""Many trainers in one process, as in a notebook or a sweep: nothing of a trainer outlives it."""

import gc
import threading
import weakref

import psutil
import pytest
from conftest import ALDRIFTTrainer, count_a, lora_config, tiny_gpt2


async def count_b(prompts, completions):
    return [float(text.count("b")) for text in completions]


def run(config, tokenizer, cost, what):
    model = tiny_gpt2()
    args = config(num_rungs=1, updates_per_rung=1, num_generations=16)
    trainer = ALDRIFTTrainer(model, cost, args, processing_class=tokenizer, peft_config=lora_config(model))
    trainer.train() if what == "train" else trainer.evaluate()
    trainer.sample(2)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("what", ["train", "evaluate"])
def test_threads_files_and_objects_end_with_the_trainer(what, config, tokenizer):
    run(config, tokenizer, count_b, what)  # what is made once per process, such as the event loop
    gc.collect()
    threads, files = threading.active_count(), psutil.Process().num_fds()
    left = []
    for number in range(8):
        trainer = run(config, tokenizer, count_a if number % 2 else count_b, what)
        left += [weakref.ref(trainer), weakref.ref(trainer.objective), weakref.ref(trainer.model)]
        assert threading.active_count() <= threads
        assert psutil.Process().num_fds() <= files
    del trainer
    gc.collect()
    assert [reference() for reference in left if reference() is not None] == []
