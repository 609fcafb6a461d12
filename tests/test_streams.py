"""Random numbers by address: no two draws of a run are made with the same ones."""

import pytest
from conftest import ALDRIFTTrainer, count_a, lora_config, tiny_gpt2

from aldrift_hf import streams
from aldrift_hf.models.engines import transformers as engine


@pytest.mark.parametrize("sampler", ["archive", "metropolis_hastings", "suffix", "span"])
def test_no_number_is_used_twice(sampler, config, tokenizer, monkeypatch):
    """Chains whose moves share numbers have another law, and rungs that share them learn from the same texts."""
    drawn, chosen = [], []

    def watched(address, rows, width):
        drawn.extend((*address, row) for row in rows)
        return streams.uniforms(address, rows, width)

    def watched_generator(*address):
        chosen.append(address)
        return generator(*address)

    generator = streams.generator
    monkeypatch.setattr(engine, "uniforms", watched)
    monkeypatch.setattr(streams, "generator", watched_generator)
    model = tiny_gpt2()
    trainer = ALDRIFTTrainer(
        model, count_a, config(sampler=sampler, num_generations=16), ["", "a b"], processing_class=tokenizer,
        peft_config=lora_config(model),
    )  # fmt: skip
    trainer.evaluate()
    trainer.train()  # and one more measurement
    for correction in ("metropolis_hastings", "metropolis_hastings", "suffix"):
        trainer.sample(3, chain_length=3, correction=correction)
    for used in (drawn, [address for address in chosen if address[1] != streams.DEAL]):
        assert len(used) == len({*used}) > 4
