"""Instructions that a program can check: IFEval's checkers, on requests of one sentence."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any
from unittest.mock import patch

REQUESTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Describe a cat in one sentence.", "keywords:frequency", {"keyword": "cat", "frequency": 2}),
    ("Describe a rainy day in one sentence.", "keywords:frequency", {"keyword": "rain", "frequency": 2}),
    ("Describe the sea in one sentence.", "keywords:forbidden_words", {"forbidden_words": ["vast", "water", "waves"]}),
    ("Describe winter in one sentence.", "keywords:forbidden_words", {"forbidden_words": ["cold", "snow", "winter"]}),
    ("Describe a forest in one sentence.", "keywords:letter_frequency", {"letter": "z", "let_frequency": 1}),
    ("Describe a market in one sentence.", "keywords:letter_frequency", {"letter": "q", "let_frequency": 1}),
    ("Tell me what a bank does.", "length_constraints:number_words", {"num_words": 15}),
    ("Say what a bridge is for.", "length_constraints:number_words", {"num_words": 15}),
    ("Thank a friend for a gift.", "detectable_content:postscript", {"postscript_marker": "P.S."}),
    ("Wish somebody a good morning.", "detectable_content:postscript", {"postscript_marker": "P.S."}),
    ("Name two fruits.", "detectable_format:number_bullet_lists", {"num_bullets": 2}),
    ("Name three cities.", "detectable_format:number_bullet_lists", {"num_bullets": 3}),
    ("Give me a motto for a football club.", "startend:quotation", {}),
    ("Give me a motto for a chess club.", "startend:quotation", {}),
    ("Describe a city in one sentence.", "punctuation:no_comma", {}),
    ("Describe a good breakfast in one sentence.", "punctuation:no_comma", {}),
)
"""What is asked for, and a checker of IFEval with its arguments."""
RELATIONS = {
    "keywords:frequency": {"relation": "at least"},
    "keywords:letter_frequency": {"let_relation": "at least"},
    "length_constraints:number_words": {"relation": "less than"},
}
"""Arguments that a checker would otherwise draw at random."""


def rows() -> list[dict[str, Any]]:
    """A row per request, with the columns of IFEval's data set. The words of the instruction are the checker's own."""
    made = []
    for request, name, given in REQUESTS:
        arguments = {**given, **RELATIONS.get(name, {})}
        instruction = _ifeval().instructions_registry.INSTRUCTION_DICT[name](name).build_description(**arguments)
        prompt = [{"role": "user", "content": f"{request} {instruction}"}]
        made.append({"prompt": prompt, "instruction_id_list": [name], "kwargs": [arguments]})
    return made


def not_followed(
    prompts: Sequence[Any],
    completions: Sequence[str],
    instruction_id_list: Sequence[Sequence[str]],
    kwargs: Sequence[Sequence[Mapping[str, Any]]],
) -> list[float]:
    """The share of a row's instructions that a text does not follow, by IFEval's strict rule, from 0 to 1.

    Args:
        prompts: chat messages, or text.
        completions: the texts.
        instruction_id_list: for each row, the names of its instructions.
        kwargs: for each row, the arguments of its instructions; `None` where there is none.
    """
    ifeval, costs = _ifeval(), []
    for prompt, text, names, arguments in zip(prompts, completions, instruction_id_list, kwargs, strict=True):
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        example = ifeval.InputExample(0, list(names), asked, [dict(each) for each in arguments])
        followed = ifeval.test_instruction_following_strict(example, text).follow_instruction_list
        costs.append(1 - sum(followed) / len(followed))
    return costs


@functools.lru_cache(maxsize=1)
def _ifeval() -> Any:
    """IFEval's checkers, of the package lm-eval."""
    # On import they look for a splitter of sentences, and download it; none of the requests here needs it.
    with patch("nltk.data.find"):
        from lm_eval.tasks.ifeval import utils
    return utils
