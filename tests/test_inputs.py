"""What is passed in as model and tokenizer: checked in the constructor, before anything is loaded or drawn."""

import json
import logging
from pathlib import Path

import pytest
import torch
from conftest import (
    EOS,
    VOCABULARY,
    WORDS,
    ALDRIFTTrainer,
    count_a,
    every_completion,
    log_probs,
    lora_config,
    tiny_gpt2,
    tiny_llama,
)
from conftest import lora as with_lora
from peft import LoraConfig, PeftMixedModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    TextGenerationPipeline,
    XLNetConfig,
    XLNetLMHeadModel,
)

from aldrift_hf.models import loading
from aldrift_hf.models.vocabulary import eos_token_ids, size_of
from aldrift_hf.toy import word_tokenizer

T5 = {"vocab_size": 5, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
BERT = {
    "vocab_size": 5, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    "max_position_embeddings": 16,
}  # fmt: skip


@pytest.fixture
def make(config, tokenizer):
    """A trainer; the model comes first, `settings` go to the config, the rest to the trainer."""

    def build(model, settings=None, **kwargs):
        kwargs.setdefault("processing_class", tokenizer)
        return ALDRIFTTrainer(model, count_a, config(**{"num_generations": 16, **(settings or {})}), **kwargs)

    return build


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    """Weights must not be touched."""

    def fail(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading, "load_model", fail)


# ---- Objects ---------------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """As `DistributedDataParallel` and `DataParallel` do, without their processes."""

    def __init__(self, model):
        super().__init__()
        self.module = model


class ValueHead(nn.Module):
    """As TRL's models with a value head."""

    def __init__(self, model):
        super().__init__()
        self.pretrained_model = model


def pipeline():
    return TextGenerationPipeline(tiny_gpt2(), tokenizer=word_tokenizer(WORDS, " "), device="cpu")


def mixed():
    return PeftMixedModel(tiny_gpt2(), lora_config(tiny_gpt2()))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: None, "got NoneType"),
        (lambda: 3, "got int"),
        (lambda: LlamaForCausalLM, r"got the class LlamaForCausalLM. Pass an instance: LlamaForCausalLM.from_pretr"),
        (lambda: Path("gpt2"), r"got PosixPath. Pass the path as text: str\(path\)"),
        (lambda: nn.Linear(2, 2), "got Linear"),
        (lambda: Wrapped(tiny_gpt2()), "got Wrapped, which wraps a model. Pass the model inside, model.module"),
        (lambda: nn.DataParallel(tiny_gpt2()), "got DataParallel, which wraps a model"),
        (
            lambda: torch.compile(tiny_gpt2()),
            "got OptimizedModule, a compiled model. Pass the model before torch.compile",
        ),
        (lambda: ValueHead(tiny_gpt2()), "got ValueHead. Pass the model inside, its attribute pretrained_model"),
        (pipeline, "got TextGenerationPipeline. Pass the model inside, its attribute model"),
        (mixed, "got PeftMixedModel, whose adapters cannot be separated"),
        (
            lambda: get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"])),
            "got a PeftModel around Sequential",
        ),
    ],
)
def test_what_is_no_model_is_refused(make, model, message):
    with pytest.raises(
        TypeError, match=f"model must be an id or path, a .*PreTrainedModel or a .*PeftModel, {message}"
    ):
        make(model())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: T5ForConditionalGeneration(T5Config(**T5)), r"an encoder-decoder \(t5\)"),
        (lambda: T5EncoderModel(T5Config(**T5)), "an encoder"),
        (lambda: GPT2Model(tiny_gpt2().config), "GPT2Model has no language-modelling head"),
        (lambda: GPT2ForSequenceClassification(tiny_gpt2().config), "GPT2ForSequenceClassification has no lang"),
        (lambda: GPT2ForTokenClassification(tiny_gpt2().config), "GPT2ForTokenClassification has no language-mod"),
        (lambda: LlamaForSequenceClassification(tiny_llama().config), "LlamaForSequenceClassification has no lang"),
        (lambda: BertLMHeadModel(BertConfig(**BERT)), r"an encoder \(bert, is_decoder=False\)"),
        (lambda: BertForMaskedLM(BertConfig(**BERT)), r"an encoder \(bert, is_decoder=False\)"),
        (lambda: BertForMaskedLM(BertConfig(**BERT, is_decoder=True)), "BertForMaskedLM has no language-modelling"),
    ],
)
@pytest.mark.parametrize("adapter", [False, True])
def test_another_kind_of_model_is_refused(make, model, message, adapter):
    model = model()
    if adapter:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match=message):
        make(model)


def test_causal_models_of_families_that_also_have_encoders_are_taken(make):
    bert = BertLMHeadModel(BertConfig(**BERT, is_decoder=True, eos_token_id=EOS))
    make(bert).sample(1)
    neox = GPTNeoXConfig(**{**BERT, "is_decoder": False}, eos_token_id=EOS)
    make(GPTNeoXForCausalLM(neox)).sample(1)


class SeesAhead(LlamaForCausalLM):
    """A decoder without its mask, as encoders of sentences are made; its config says nothing of that."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        ahead = torch.zeros(len(input_ids), 1, input_ids.shape[1], input_ids.shape[1])
        return super().forward(input_ids, attention_mask=ahead, **kwargs)


@pytest.mark.parametrize(
    "model",
    [
        lambda: SeesAhead(tiny_llama().config),
        lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=5, d_model=8, n_layer=1, n_head=2, d_inner=8)),
    ],
)
@pytest.mark.parametrize("adapter", [False, True])
def test_a_model_that_sees_what_comes_is_refused_whatever_its_config_says(make, model, adapter):
    torch.manual_seed(0)
    model = model()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    if adapter:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"is not causal: .* depend on what comes after it. Pass a causal"):
        make(model)


# ---- Ids -------------------------------------------------------------------------------------------------------------


def saved(model, folder, **changes):
    """A checkpoint, with changes to its config."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: T5ForConditionalGeneration(T5Config(**T5)), r"an encoder-decoder \(t5\)"),
        (lambda: BertLMHeadModel(BertConfig(**BERT)), r"an encoder \(bert, is_decoder=False\)"),
        (lambda: GPT2ForSequenceClassification(tiny_gpt2().config), "a GPT2ForSequenceClassification, whose head giv"),
        (lambda: GPT2ForTokenClassification(tiny_gpt2().config), "a GPT2ForTokenClassification, whose head gives sc"),
        (lambda: LlamaForSequenceClassification(tiny_llama().config), "a LlamaForSequenceClassification, whose head"),
    ],
)
@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_checkpoint_of_another_kind_is_refused_before_it_is_loaded(make, tmp_path, model, message):
    base = saved(model(), tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        make(base)
    adapter = get_peft_model(model(), LoraConfig(target_modules="all-linear"))
    adapter.peft_config["default"].base_model_name_or_path = base
    adapter.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        make(str(tmp_path / "adapter"))


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_kind_that_cannot_be_loaded_by_its_id_is_named(make, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "architectures": ["CLIPModel"]}))
    with pytest.raises(ValueError, match=r"AutoModelForCausalLM cannot load a model of type 'clip'.*pass the object"):
        make(str(tmp_path))


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_type": "SEQ_CLS"}, "the adapter was made for the task 'SEQ_CLS'"),
        ({"base_model_name_or_path": None}, "the adapter does not say which model it belongs to"),
    ],
)
def test_a_saved_adapter_of_another_kind_is_refused(make, tmp_path, changes, message):
    with_lora(tiny_gpt2()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        make(str(tmp_path))


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_saved_adapter_of_virtual_tokens_is_refused(make, tmp_path):
    base = saved(tiny_gpt2(), tmp_path / "base")
    model = get_peft_model(tiny_gpt2(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="prepends virtual tokens"):
        make(str(tmp_path / "adapter"))


# ---- Weights that a checkpoint lacks ---------------------------------------------------------------------------------


def without(folder, *names, file="model.safetensors", **more):
    """Take weights out of a checkpoint, and put others in."""
    weights = load_file(folder / file)
    assert set(names) <= set(weights)
    kept = {name: value for name, value in weights.items() if name not in names}
    save_file({**kept, **more}, folder / file, metadata={"format": "pt"})


def test_weights_that_would_be_random_are_refused(make, tmp_path):
    """The head of a base model's or a classifier's checkpoint; a layer of a damaged one."""
    base = saved(tiny_llama(), tmp_path / "base")
    without(tmp_path / "base", "lm_head.weight")
    with pytest.raises(ValueError, match=r"has no weights for lm_head.weight, which were made at random"):
        make(base)
    adapter = with_lora(tiny_llama())
    adapter.peft_config["default"].base_model_name_or_path = base
    adapter.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"base has no weights for lm_head.weight, which were made at random"):
        make(str(tmp_path / "adapter"))


def test_weights_of_another_size_are_not_made_at_random(make, tmp_path):
    base = saved(tiny_llama(), tmp_path, intermediate_size=64)
    with pytest.raises(ValueError, match=r"has no weights for .* and .* more, which were made at random"):
        make(base, {"model_init_kwargs": {"ignore_mismatched_sizes": True}})


def test_tied_weights_are_not_missing(make, tmp_path):
    """Also where the body alone was saved, whose embeddings are the head."""
    model = tiny_gpt2()
    whole, body = saved(model, tmp_path / "whole"), saved(model.transformer, tmp_path / "body")
    for folder in (whole, body):
        assert torch.equal(
            log_probs(make(folder).model, [EOS], every_completion()), log_probs(model, [EOS], every_completion())
        )


@pytest.fixture
def adapter(tmp_path):
    """A LoRA with weights, saved beside its base model; the folder of the adapter, and the model."""
    saved(tiny_gpt2(), tmp_path / "base")
    model = with_lora(tiny_gpt2(), seed=1)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


FILE = "adapter_model.safetensors"
A_WEIGHT = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


def test_an_adapter_is_loaded_as_it_was_saved(make, adapter):
    folder, model = adapter
    trainer = make(str(folder))
    expected = log_probs(model, [EOS], every_completion())
    assert torch.equal(log_probs(trainer.model, [EOS], every_completion()), expected)
    with trainer.prior.active(trainer.model) as prior:
        assert torch.equal(log_probs(prior, [EOS], every_completion()), expected)


def test_an_adapter_without_a_task_is_loaded_too(make, adapter):
    folder, model = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": None, "auto_mapping": None}))
    trained = make(str(folder)).model
    assert torch.equal(log_probs(trained, [EOS], every_completion()), log_probs(model, [EOS], every_completion()))


def test_an_adapter_that_does_not_fit_is_refused(make, adapter):
    folder, _ = adapter
    kept = load_file(folder / FILE)
    without(folder, A_WEIGHT, file=FILE)
    with pytest.raises(ValueError, match=r"does not fit its base model .*base: it lacks .*h\.0\.attn\.c_attn\.lora_A"):
        make(str(folder))
    save_file(kept, folder / FILE)
    without(folder, file=FILE, **{A_WEIGHT.replace("h.0", "h.7"): kept[A_WEIGHT]})
    with pytest.raises(ValueError, match=r"it has other parameters: .*h\.7\.attn"):
        make(str(folder))
    save_file(kept, folder / FILE)
    without(folder, file=FILE, **{A_WEIGHT: torch.zeros(4, 32)})
    with pytest.raises(ValueError, match=r"does not fit its base model: .*size mismatch"):
        make(str(folder))


def test_an_adapter_brings_the_embeddings_of_added_tokens(make, tmp_path):
    """As PEFT saves them where the tokenizer was extended before training."""
    saved(tiny_gpt2(), tmp_path / "base")
    model = tiny_gpt2()
    model.resize_token_embeddings(VOCABULARY + 1, mean_resizing=False)
    model = with_lora(model, seed=1)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    larger = word_tokenizer([*WORDS, "d"], " ")
    trainer = make(str(tmp_path / "adapter"), processing_class=larger, train_dataset=["d"])
    assert trainer.inputs.vocabulary == VOCABULARY + 1
    expected = log_probs(model, [VOCABULARY], every_completion())
    assert torch.equal(log_probs(trainer.model, [VOCABULARY], every_completion()), expected)
    # Without them there is no row for the new token, and none is made up.
    model.save_pretrained(tmp_path / "bare", save_embedding_layers=False)
    with pytest.raises(ValueError, match=r"prompt 0 has the token '▁d' with the id 5, beyond the model's 5 tokens"):
        make(str(tmp_path / "bare"), processing_class=larger, train_dataset=["d"])


# ---- Tokens beyond the vocabulary ------------------------------------------------------------------------------------


@pytest.fixture(params=["object", "id"])
def model(request, tmp_path):
    """A model, itself or by its path."""
    return tiny_gpt2() if request.param == "object" else saved(tiny_gpt2(), tmp_path / "model")


def beyond(**special):
    """The tests' tokenizer with tokens added that the model has no rows for."""
    tokenizer = word_tokenizer(WORDS, " ")
    tokenizer.add_special_tokens(special)
    return tokenizer


@pytest.mark.usefixtures("nothing_is_loaded")
def test_an_end_beyond_the_vocabulary_is_refused(make, model):
    tokenizer = beyond(eos_token="<end>")
    with pytest.raises(
        ValueError, match=r"end-of-text token '<end>' has the id 5, beyond the model's 5 tokens.*resize_token_embedd"
    ):
        make(model, processing_class=tokenizer)
    if not isinstance(model, str):
        model.resize_token_embeddings(len(tokenizer))
        make(model, processing_class=tokenizer)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_prompt_beyond_the_vocabulary_is_refused(make, model):
    tokenizer = beyond(additional_special_tokens=["<new>"])
    message = r"prompt 1 has the token '<new>' with the id 5, beyond the model's 5 tokens"
    with pytest.raises(ValueError, match=message):
        make(model, processing_class=tokenizer, train_dataset=["a", "b <new>"])
    with pytest.raises(ValueError, match=message):
        make(model, processing_class=tokenizer, eval_dataset=["a", "<new>"])


def test_later_prompts_are_checked_too(make, model):
    trainer = make(model, processing_class=beyond(additional_special_tokens=["<new>"]))
    with pytest.raises(ValueError, match="prompt 0 has the token '<new>'"):
        trainer.evaluate(["<new>"])
    with pytest.raises(ValueError, match="prompt 0 has the token '<new>'"):
        trainer.sample(1, ["<new>"])


def test_a_start_beyond_the_vocabulary_is_a_prompt_beyond_it(make):
    tokenizer = beyond(bos_token="<start>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(ValueError, match="prompt 0 has the token '<start>'"):
        make(tiny_gpt2(), processing_class=tokenizer)


@pytest.mark.slow
def test_the_padding_has_no_effect(make, model):
    """Whichever token it is, there or not: draws, scores and what is learned."""
    results = []
    for pad in (None, 2, 4, VOCABULARY):
        tokenizer = beyond(additional_special_tokens=["<pad>"])
        tokenizer.pad_token = None if pad is None else tokenizer.convert_ids_to_tokens(pad)
        assert tokenizer.pad_token_id == pad
        start = model if isinstance(model, str) else tiny_gpt2()
        trainer = make(start, {"num_rungs": 2}, processing_class=tokenizer, train_dataset=["", "a b", "c"])
        assert trainer.inputs.pad_token_id == (pad if pad in (2, 4) else EOS)
        trainer.train()
        draws = trainer.sample(4)
        results.append(({name: draws[name][:] for name in draws.column_names}, list(trainer.model.parameters())))
    (draws, weights), *others = results
    for other, other_weights in others:
        assert other == draws
        assert all(torch.equal(a, b) for a, b in zip(other_weights, weights))


def test_ends_are_those_that_the_model_has(tokenizer, caplog):
    model = tiny_gpt2()
    for own, ends in [
        (None, (EOS,)),
        (3, (EOS, 3)),
        ([3, 4], (EOS, 3, 4)),
        (torch.tensor([3]), (EOS, 3)),
        ([7, 50256, -1], (EOS,)),
        ([], (EOS,)),
    ]:
        model.generation_config.eos_token_id = own
        assert eos_token_ids(model, tokenizer) == ends
    tokenizer.eos_token = "<beyond>"
    tokenizer.add_tokens("<beyond>")
    with pytest.raises(ValueError, match="beyond the model's 5 tokens"):
        eos_token_ids(model, tokenizer)


def test_a_tokenizer_that_ends_otherwise_than_its_model_is_noticed(make, caplog):
    model = tiny_gpt2(eos_token_id=3, bos_token_id=3)
    with caplog.at_level(logging.WARNING, "aldrift_hf"):
        trainer = make(model)
    (message,) = [record.message for record in caplog.records if "ends texts" in record.message]
    assert "ends texts with '<|endoftext|>' (id 0), and the model with the ids [3]" in message
    assert trainer.run.eos_token_ids == (0, 3)
    caplog.clear()
    make(tiny_gpt2())
    assert not [record for record in caplog.records if "ends texts" in record.message]


def test_a_model_that_writes_what_it_cannot_read_is_refused(make):
    model = tiny_llama()
    model.lm_head = nn.Linear(16, VOCABULARY + 1, bias=False)
    with pytest.raises(ValueError, match=r"can write 6 tokens, and read 5.*Resize both"):
        make(model)
    model.lm_head = nn.Linear(16, VOCABULARY - 1, bias=False)
    assert size_of(model) == VOCABULARY - 1
