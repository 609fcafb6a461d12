"""How different draws are: exact values for draws whose token pairs are known."""

from __future__ import annotations

import math

import pytest
import torch

from aldrift_hf.algorithm import diversity as module
from aldrift_hf.algorithm.diversity import diversity
from aldrift_hf.types import Completions, Proposals


def proposals(*prompts: list[list[int]]) -> Proposals:
    shape = len(prompts), len(prompts[0])
    nothing = torch.zeros(shape)
    rows = torch.arange(shape[0]).repeat_interleave(shape[1])
    tokens = [draw for draws in prompts for draw in draws]
    return Proposals(rows, Completions.of(tokens, 0), nothing, nothing, nothing)


def test_the_share_of_pairs_that_two_draws_do_not_have_in_common():
    assert diversity(proposals([[1, 2, 0], [1, 2, 0]])) == 0
    assert diversity(proposals([[1, 2, 0], [2, 1, 3]])) == 1
    # Pairs with the start: {^1, 12, 20} and {^1, 12, 23, 30}, of which 2 of 5 are in both.
    assert diversity(proposals([[1, 2, 0], [1, 2, 3, 0]])) == pytest.approx(3 / 5)
    assert diversity(proposals([[0], [0]])) == 0
    assert diversity(proposals([[0], [1, 0]])) == 1


def test_draws_are_compared_within_their_prompt():
    different = [[1, 0], [2, 0], [3, 0]]
    assert diversity(proposals([[1, 0]] * 3, [[2, 0]] * 3)) == 0
    assert diversity(proposals([[1, 0]] * 3, different)) == pytest.approx(1 / 2)
    assert math.isnan(diversity(proposals([[1, 0]], [[2, 0]])))


def test_of_many_pairs_some_are_compared(monkeypatch):
    monkeypatch.setattr(module, "MAX_PAIRS", 2)
    seen = []
    monkeypatch.setattr(module, "_distance", lambda one, other: seen.append((one, other)) or 0.5)
    assert diversity(proposals([[1, 0], [2, 0], [3, 0]], [[4, 0], [5, 0], [6, 0]])) == 0.5
    assert seen == [([1, 0], [2, 0]), ([4, 0], [5, 0])]


def test_the_start_of_a_text_is_no_token():
    completions = Completions(torch.tensor([[1, 9], [0, 1]]), torch.tensor([1, 2]))
    zeros = torch.zeros(1, 2, dtype=torch.float64)
    assert diversity(Proposals(torch.zeros(2).long(), completions, zeros, zeros, zeros)) == 1.0
