"""Rows that share a prompt, packed into one: each distinct prompt, followed by its completions.

A completion's last token predicts nothing and is left out, and its first token is predicted by the prompt's last one,
which is there once. So `m` completions of `t` tokens after a prompt of `P` take `P + m·(t - 1)` tokens instead of
`m·(P + t)`, without padding.
"""

from __future__ import annotations

import torch

from ..passes import Pass, Tokens
from .attention import Layout

MAX_SHARE = 0.8
"""Share of the tokens of separate rows above which packing them is not worth its smaller attention kernels."""


def pack(prompts: Tokens, completions: Tokens) -> Pass:
    """A forward pass over one row, in which each distinct prompt is followed by its completions (none empty)."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(row)
    tokens: list[int] = []
    positions: list[int] = []
    predicting: list[int] = []
    for prompt, members in groups.items():
        tokens += prompt
        positions += range(len(prompt))
        last = len(tokens) - 1
        for row in members:
            given = completions[row][:-1]
            predicting += [last, *range(len(tokens), len(tokens) + len(given))]
            tokens += given
            positions += range(len(prompt), len(prompt) + len(given))
    targets, rows, places = torch.tensor(
        [
            (token, row, place)
            for members in groups.values()
            for row in members
            for place, token in enumerate(completions[row])
        ]
    ).unbind(-1)
    inputs = {
        "input_ids": torch.tensor([tokens]),
        "position_ids": torch.tensor([positions]),
        # A mask of four dimensions is passed on to the attention as it is. Ours does not need one, and no other
        # attention can do anything with this one: outside of `sharing` the pass fails instead of being wrong.
        "attention_mask": torch.ones((1, 1, 0, 0), dtype=torch.bool),
        "use_cache": False,
        "shared_prompts": Layout.of(
            [(len(prompt), [len(completions[row]) - 1 for row in members]) for prompt, members in groups.items()]
        ),
    }
    where = torch.tensor(predicting)
    return Pass(inputs, lambda states: states[0, where.to(states.device)], targets, rows, places, len(prompts))


def pays(prompts: Tokens, completions: Tokens) -> bool:
    """Whether rows take clearly fewer tokens when they share prompts. Empty completions cannot be packed."""
    lengths = [len(completion) for completion in completions]
    if min(lengths, default=0) < 1:
        return False
    shared = sum(map(len, {tuple(prompt) for prompt in prompts}))
    return shared + sum(lengths) <= MAX_SHARE * (sum(map(len, prompts)) + sum(lengths))
