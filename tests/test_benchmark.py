"""The benchmark: its exact distances, its baselines, and that no run is made twice."""

import json
import math

import numpy as np
import pytest
from conftest import log_probs, tiny_gpt2
from evaluation import baselines
from evaluation.baselines import CountedObjective, expert_iteration, policy_gradient
from evaluation.exact_distance import ExactTarget
from problems.prior import RecipeModelConfig, make_prior
from problems.round_trips import RoundTripProblem
from problems.text_problem import TextProblem

from aldrift_hf.models.prior import base_model
from aldrift_hf.types import Completions

QUICK = RecipeModelConfig(prior_steps=60)


class TwoWords(TextProblem):
    """Strings of two words out of three; the cost counts the words that differ from the prompt."""

    words, separator, worst_cost, prompts = ["a", "b", "c"], " ", 3.0, ["a", "b"]

    def random_texts(self, count, rng):
        return [" ".join(rng.choice(self.words, 2)) for _ in range(count)]

    def cost_of(self, text):
        return float(sum(word != "a" for word in text.split()))

    def cost(self, prompts, completions):
        return [float(sum(word != p for word in text.split())) for p, text in zip(prompts, completions)]

    def number_of_strings(self):
        return 9

    def all_texts(self):
        return (f"{x} {y}" for x in self.words for y in self.words)


def test_exact_distances_by_hand(tokenizer):
    """Distances over the nine strings and all other text for each prompt, and their means."""
    prior, model = tiny_gpt2(0), tiny_gpt2(1)
    target = ExactTarget.of(TwoWords(), prior, tokenizer, tau_max=2.0, slack=0.0)
    rows = [[2 + x, 2 + y, 0] for x in range(3) for y in range(3)]
    expected = []
    for index, prompt in enumerate(([0, 2], [0, 3])):
        log_l, log_q = (log_probs(m, prompt, Completions.of(rows, 0)).numpy() for m in (prior, model))
        log_l, log_q = (np.append(log, np.log1p(-np.exp(log).sum())) for log in (log_l, log_q))
        cost = np.array([*((x != index) + (y != index) for x in range(3) for y in range(3)), 3.0])
        log_p = log_l - 2 * cost
        log_p -= np.logaddexp.reduce(log_p)
        p, q = np.exp(log_p), np.exp(log_q)
        expected.append([abs(p - q).sum() / 2, p @ (log_p - log_q), q @ (log_q - log_p), q[:-1] @ (cost[:-1] == 0)])
    measures = target.measures(model, draws=2_000_000, seed=0)
    for name, value in zip(("tv", "kl", "reverse_kl", "success"), np.mean(expected, axis=0)):
        assert measures[name] == pytest.approx(value, abs=1e-5)
    assert measures["distinct"] == 2, "one solution per prompt"
    assert target.measures(prior, 10, 0)["kl"] > 0.1


def test_rare_strings_as_one_event(tokenizer):
    """The likeliest strings that hold a share of p_T keep their probabilities; all others are added up."""
    target = ExactTarget.of(TwoWords(), tiny_gpt2(0), tokenizer, tau_max=2.0)
    model = tiny_gpt2(1)
    for share in (0.5, 0.8):
        some = target.likeliest(share)
        for every, log_p, kept, log_kept in zip(target.strings, target.log_target, some.strings, some.log_target):
            strings = np.exp(log_p[:-1])
            fewest = next(k for k in range(10) if np.sort(strings)[::-1][:k].sum() >= share * strings.sum())
            assert len(kept.texts) == fewest < 9
            known = dict(zip(every.texts, zip(strings, every.cost)))
            assert [known[text] for text in kept.texts] == [*zip(np.exp(log_kept), kept.cost)]
            assert np.exp(log_kept).sum() == pytest.approx(1)
            assert np.exp(log_kept[-2]) >= max(p for text, (p, _) in known.items() if text not in kept.texts)
        assert 0 < some.measures(model, 10, 0)["kl"] < target.measures(model, 10, 0)["kl"]
    whole = target.likeliest(1 - 1e-12).measures(model, 10, 0)
    assert whole["kl"] == pytest.approx(target.measures(model, 10, 0)["kl"])


def test_distance_of_draws(tokenizer):
    target = ExactTarget.of(TwoWords(), tiny_gpt2(0), tokenizer, tau_max=2.0)
    assert target.tv_of_draws(["a", "a", "b"], ["nonsense", "", "b"]) == pytest.approx(
        1 - np.mean([np.exp(log_p[-1]) for log_p in target.log_target]), abs=1e-9
    )


def test_costs_are_counted_once():
    evaluated = []

    class Recorded(TwoWords):
        def cost(self, prompts, completions):
            evaluated.extend(zip(prompts, completions))
            return super().cost(prompts, completions)

    counted = CountedObjective(Recorded())
    assert counted(["a", "b", "a"], ["a b", "a b", "a b"]) == [1, 1, 1]
    assert counted(["a", "b"], ["a b", "b b"]) == [1, 0]
    assert evaluated == [("a", "a b"), ("b", "a b"), ("b", "b b")], "a completion counts once per prompt"
    assert len(counted.known) == 3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rloo", "grpo", "expert_iteration"])
def test_baselines_lower_the_cost_within_their_budget(method, tmp_path, monkeypatch):
    monkeypatch.setenv("ALDRIFT_CACHE", str(tmp_path))
    problem = RoundTripProblem()
    if method == "expert_iteration":
        model, tokenizer, calls = expert_iteration(
            problem, QUICK, rounds=2, proposals=280, updates=10, learning_rate=1e-3, seed=0
        )
    else:
        model, tokenizer, calls = policy_gradient(
            method, problem, QUICK, tau_max=4.0, proposals=560, generations=10, learning_rate=3e-3, seed=0
        )
    assert 100 < calls <= 560
    prior = base_model(make_prior(problem, QUICK)[0])
    target = ExactTarget.of(problem, prior, tokenizer, tau_max=4.0, slack=0.05)
    success = [target.measures(each, 100, 0)["success"] for each in (prior, base_model(model))]
    assert success[1] > 1.3 * success[0]


class Tied(RoundTripProblem):
    """Every text costs the same."""

    def cost_of(self, text):
        return 1.0

    def cost(self, prompts, completions):
        return [1.0 for _ in completions]


def test_expert_iteration_chooses_among_equal_costs_by_the_order_of_drawing(tmp_path, monkeypatch):
    monkeypatch.setenv("ALDRIFT_CACHE", str(tmp_path))
    drawn, learned = [], []

    def texts(policy, tokenizer, config, prompt, count, address):
        drawn.append([f"{10 * count - number} {address}" for number in range(count)])  # alphabetically from the last on
        return drawn[-1]

    def fit(policy, tokenizer, rows, *settings):
        learned.extend(rows(200, np.random.default_rng(0)))

    monkeypatch.setattr(baselines, "drawn_texts", texts)
    monkeypatch.setattr(baselines, "fit", fit)
    problem = Tied()
    prompts = len(problem.prompts)
    expert_iteration(problem, QUICK, rounds=1, proposals=20 * prompts, updates=1, learning_rate=1e-3, seed=0)
    first = {problem.separator.join((prompt, text)) for prompt, row in zip(problem.prompts, drawn) for text in row[:2]}
    assert {*learned} == first


@pytest.mark.slow
def test_the_recipe_keeps_its_runs(run_recipe, capsys):
    flags = {
        "problems": "trips", "methods": "prior archive defaults rloo", "budgets": 140, "seeds": "0 1", "longer": 2,
        "learning_rates": "1e-3 3e-3", "prior_steps": 30, "draws": 140, "updates": 3,
    }  # fmt: skip
    folder = run_recipe("benchmark", **flags)
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    # archive: two learning rates, and the second seed; rloo: the same, and twice the budget for both seeds.
    assert len(runs) == 1 + 3 + 2 + 3 + 2
    assert all(run["calls"] <= 140 for run in runs if run["method"] == "defaults")
    assert all(math.isfinite(run["kl"]) and 0 <= run["tv"] <= 1 for run in runs)
    assert {run["budget"] for run in runs if run["method"] == "rloo"} == {140, 280}
    assert all("corrected_tv" in run for run in runs if run["method"] in ("archive", "defaults"))
    table = (folder / "benchmark.md").read_text()
    assert table.count("| rloo") == 2
    assert (folder / "benchmark.png").stat().st_size > 10_000
    written = (folder / "runs.jsonl").stat().st_mtime_ns
    run_recipe("benchmark", **flags)
    assert (folder / "runs.jsonl").stat().st_mtime_ns == written
    assert (folder / "benchmark.md").read_text() == table


def test_a_budget_too_small_for_an_update_is_refused(run_recipe):
    with pytest.raises(SystemExit, match="--budgets 63: choose at least"):
        run_recipe("benchmark", budgets=63)


@pytest.mark.parametrize(("flag", "value"), [("problems", "karate"), ("methods", "ppo")])
def test_unknown_names_are_refused(flag, value, run_recipe):
    with pytest.raises(SystemExit, match=f"unknown: {value}. Choose from"):
        run_recipe("benchmark", **{flag: value})
