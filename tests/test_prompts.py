"""Prompts as the model reads them: special tokens around texts, and chat messages with what belongs to them."""

import json
import logging

import pytest
from conftest import ALDRIFTTrainer, count_a, lora_config, tiny_gpt2
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from trl import apply_chat_template

from aldrift_hf.models.prompts import encode_prompt, encode_prompts

VOCABULARY = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "c": 5, "<cls>": 6, "<sep>": 7}


def tokenizer_of(template=None, **special) -> PreTrainedTokenizerFast:
    """Words, and special tokens around a text as `template` says."""
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template is not None:
        words.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(VOCABULARY.items()))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


# ---- Special tokens around texts -------------------------------------------------------------------------------------

TEXTS = ["", " ", "a b", "<s>", "<s> a", "<s> <s> a", "a </s>", "</s>", "<s> a </s>", "a <s> b"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, ["<s>", "<s>", "a b", "<s>", "<s> a", "<s> <s> a", "a </s>", "</s>", "<s> a </s>", "a <s> b"]),
        ("$A </s>", ["<s>", "<s>", "a b", "<s>", "<s> a", "<s> <s> a", "a </s>", "</s>", "<s> a </s>", "a <s> b"]),
        *(
            (template, [
                "<s>", "<s>", "<s> a b", "<s>", "<s> a", "<s> <s> a", "<s> a </s>", "<s> </s>", "<s> a </s>",
                "<s> a <s> b",
            ])
            for template in ("<s> $A", "<s> $A </s>", "<s> $A <sep>", "<s> $A </s> </s>")
        ),
    ],
)  # fmt: skip
def test_a_text_begins_once_and_never_ends(template, expected):
    """One BOS before it where the tokenizer adds one, and no EOS behind it unless the text itself has it."""
    tokenizer = tokenizer_of(template, sep_token="<sep>")
    encoded = [encode_prompt(text, 0, tokenizer) for text in TEXTS]
    assert [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in encoded] == expected


def test_other_tokens_before_a_text_stay():
    tokenizer = tokenizer_of("<cls> <s> $A <sep>", cls_token="<cls>", sep_token="<sep>")
    assert encode_prompt("a", 0, tokenizer) == encode_prompt("<cls> <s> a", 0, tokenizer) == [6, 0, 3]
    assert encode_prompt("", 0, tokenizer) == [6, 0]


@pytest.mark.parametrize("template", [None, "</s> $A", "$A </s>"])
def test_one_token_for_beginning_and_end(template):
    """As in GPT-2: the only token to start from is also the end of text."""
    tokenizer = tokenizer_of(template, bos_token="</s>")
    start = [1] if template == "</s> $A" else []
    assert encode_prompt("", 0, tokenizer) == encode_prompt("</s>", 0, tokenizer) == [1]
    assert encode_prompt("a", 0, tokenizer) == [*start, 3]
    assert encode_prompt("</s> a", 0, tokenizer) == [1, 3]


def test_an_empty_text_without_a_token_to_start_from():
    assert encode_prompt("", 0, tokenizer_of("$A </s>", bos_token=None)) == [1]
    with pytest.raises(ValueError, match="prompt 4 is empty and the tokenizer has neither a BOS nor an EOS token"):
        encode_prompt("", 4, tokenizer_of(bos_token=None, eos_token=None))


def test_a_tokenizer_that_cuts_and_pads_of_its_own_accord(tmp_path):
    """`tokenizer.json` can say so; prompts are whole all the same, and as long as they are."""
    tokenizer = tokenizer_of("<s> $A </s>", model_max_length=2)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    for each in (tokenizer, loaded):
        assert encode_prompt("a b c a", 0, each) == [0, 3, 4, 5, 3]


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("add_eos", [True, False])
def test_the_flags_of_llamas_tokenizer(tmp_path, add_bos, add_eos):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5}
    LlamaTokenizer(vocab=vocabulary, merges=[], add_bos_token=add_bos, add_eos_token=add_eos).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert encode_prompt("a b", 0, tokenizer) == [*[1][:add_bos], 3, 4, 3, 5]
    (start, *between, last) = encode_prompt("<s>a", 0, tokenizer)
    assert (start, last) == (1, 4)
    assert 1 not in between
    assert encode_prompt("", 0, tokenizer) == [1]


# ---- Chat messages ---------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }} "
    "{% if tools is not none %}{% for tool in tools %}{{ tool | tojson }} {% endfor %}{% endif %}"
    "{% for message in messages %}{{ message['role'] }} {% for key in message %}{{ key }} {% endfor %}"
    "{{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}b {% endif %}"
    "{% if enable_thinking is defined %}thinking={{ enable_thinking }}{% endif %}"
)
TOOLS = [
    [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}}],
    [{"type": "function", "function": {"name": "g", "parameters": {"properties": {"y": {"type": "string"}}}}}],
    [],
]
KWARGS = [{"enable_thinking": False}, {"language": "en"}, {}]
CHATS = [
    [{"role": "user", "content": "a"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [{"function": {"name": "g", "arguments": {"y": "c"}}}]},
        {"role": "tool", "content": "3"},
    ],
    [{"role": "user", "content": "c"}, {"role": "assistant", "content": "a"}],
]


class Characters(PreTrainedTokenizerFast):
    """Every character is a token, so that texts can be compared."""

    def __init__(self) -> None:
        vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **{chr(code): code - 29 for code in range(32, 127)}}
        characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        characters.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        super().__init__(tokenizer_object=characters, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        self.chat_template = TEMPLATE

    def text(self, ids):
        return "".join(self.convert_ids_to_tokens(ids))


def expected(tokenizer):
    """Each row by itself, as TRL renders it, with nothing in it that other rows have."""
    return [
        apply_chat_template({"prompt": chat, "chat_template_kwargs": kwargs}, tokenizer, tools=tools)["prompt"]
        for chat, tools, kwargs in zip(CHATS, TOOLS, KWARGS, strict=True)
    ]


def encode(rows, tokenizer):
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return encode_prompts(data, tokenizer, max_completion_length=1, context_length=None)


@pytest.mark.parametrize("format", [None, "numpy", "torch"])
def test_tools_and_template_arguments_reach_the_template(format, caplog):
    tokenizer = Characters()
    rows = [
        {"prompt": chat, "tools": tools, "chat_template_kwargs": kwargs}
        for chat, tools, kwargs in zip(CHATS, TOOLS, KWARGS, strict=True)
    ]
    texts = expected(tokenizer)
    assert '"name": "f"' in texts[0]
    assert texts[0].endswith("b thinking=False")
    data = Dataset.from_list(rows)
    assert "y" in data[0]["tools"][0]["function"]["parameters"]["properties"], "Arrow fills in other rows' keys"
    prompts = encode(data.with_format(format), tokenizer)
    assert [tokenizer.text(ids) for ids in prompts.token_ids] == texts
    assert not caplog.records


@pytest.mark.parametrize("empty", [None, ""])
def test_tools_and_template_arguments_as_json_text(empty):
    tokenizer = Characters()
    rows = [
        {
            "prompt": chat,
            "tools": json.dumps(tools) if tools else empty,
            "chat_template_kwargs": json.dumps(kwargs) if kwargs else empty,
        }
        for chat, tools, kwargs in zip(CHATS, TOOLS, KWARGS, strict=True)
    ]
    assert [tokenizer.text(ids) for ids in encode(rows, tokenizer).token_ids] == expected(tokenizer)


def test_a_null_in_json_text_is_meant():
    tokenizer = Characters()
    tool = {"name": "f", "parameters": {"default": None}}
    (ids,) = encode([{"prompt": CHATS[0], "tools": json.dumps([tool])}], tokenizer).token_ids
    assert json.dumps(tool) in tokenizer.text(ids)


def test_a_template_that_begins_with_bos_is_not_given_another():
    tokenizer = Characters()
    (ids,) = encode([{"prompt": CHATS[0]}], tokenizer).token_ids
    assert ids[0] == 0
    assert ids.count(0) == 1


def test_the_cost_gets_the_columns_too(config, tokenizer):
    """As in TRL, where rewards get every column."""
    tokenizer.chat_template = "{{ 'a' if tools else 'b' }} {{ 'c' if deep else '' }}"
    seen = []

    def cost(prompts, completions, tools, chat_template_kwargs):
        seen.extend(zip(map(str, tools), map(str, chat_template_kwargs)))
        return count_a(prompts, completions)

    model = tiny_gpt2()
    rows = [{"prompt": CHATS[0], "tools": [{"name": "f"}], "chat_template_kwargs": {"deep": True}}]
    rows.append({"prompt": CHATS[0], "tools": None, "chat_template_kwargs": None})
    trainer = ALDRIFTTrainer(
        model, cost, config(), train_dataset=rows, processing_class=tokenizer, peft_config=lora_config(model)
    )
    texts = [tokenizer.decode(ids) for ids in trainer.inputs.prompts.token_ids]
    assert [text.strip() for text in texts] == ["a c", "b"]
    trainer.sample(1)
    assert set(seen) == {("[{'name': 'f'}]", "{'deep': True}"), ("None", "None")}


def test_what_has_no_effect_is_said_once(caplog):
    tokenizer = Characters()
    encode([{"prompt": "a", "tools": [{"name": "f"}]}] * 3, tokenizer)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "columns tools and chat_template_kwargs have no effect on prompts that are text" in record.message
    caplog.clear()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    encode([{"prompt": CHATS[0], "tools": [{"name": "f"}]}] * 3, tokenizer)
    (record,) = caplog.records
    assert "the tokenizer's chat template has no place for tools" in record.message
    caplog.clear()
    encode([{"prompt": CHATS[0], "tools": None}, {"prompt": CHATS[0], "tools": None}], tokenizer)
    encode([{"prompt": "a", "tools": None, "chat_template_kwargs": None}], tokenizer)
    assert not caplog.records


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tools": "not json"}, "tools of prompt 1 is text, but not JSON"),
        ({"tools": '{"name": "f"}'}, "tools of prompt 1 must be a list of JSON schemas"),
        ({"tools": "[1]"}, "tools of prompt 1 must be a list of JSON schemas"),
        ({"tools": 3}, "tools of prompt 1 must be a list of JSON schemas"),
        ({"chat_template_kwargs": "[]x"}, "chat_template_kwargs of prompt 1 is text, but not JSON"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs of prompt 1 must be a mapping"),
        ({"chat_template_kwargs": {"tokenize": True}}, "cannot be applied to prompt 1 with chat_template_kwargs"),
        ({"prompt": [{"role": "system", "content": "a"}]}, "cannot be applied to prompt 1: Invalid role .*: system"),
        ({"prompt": [{"content": "a"}]}, "prompt 1 is neither text nor a list of messages"),
        ({"prompt": [CHATS[0][0], {"content": "a"}]}, "prompt 1 is neither text nor a list of messages"),
        ({"prompt": []}, "prompt 1 is neither text nor a list of messages"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "prompt 1 has content of type 'image'"),
    ],
)
def test_what_the_template_cannot_take_is_refused(columns, message):
    row = {"prompt": CHATS[0], **columns}
    with pytest.raises(ValueError, match=message):
        encode_prompt(row["prompt"], 1, Characters(), row)


def test_parts_of_text_are_text():
    tokenizer = Characters()
    tokenizer.chat_template = "{{ messages[0]['content'][0]['text'] }}"
    (ids,) = encode([{"prompt": [{"role": "user", "content": [{"type": "text", "text": "abc"}]}]}], tokenizer).token_ids
    assert tokenizer.text(ids) == "abc"
