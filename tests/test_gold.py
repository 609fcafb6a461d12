"""Gold: what draws of the prior say of p_τ and of any model, where everything can be enumerated."""

import json

import numpy as np
import pytest
from conftest import MAX_LENGTH, every_completion, log_probs, tiny_gpt2
from evaluation import gold as golden
from evaluation.drawing_gold import GoldMaker
from evaluation.gold import Gold
from problems.steering import SteeringTask

from aldrift_hf.types import no_progress

TAU = 2.0
LAWS = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.2, 0.6]])
COSTS = np.array([[1.0, 0.5, 0.2, 0.0], [0.0, 0.9, 0.3, 1.0]])
MODELS = np.array([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])
"""Probabilities of four completions of two prompts under the prior and under a model, and their costs."""


def exact(tau=TAU):
    """By enumeration: log Z, mean cost, KL from the prior, KL to the model; means over prompts."""
    tilted = LAWS * np.exp(-tau * COSTS)
    z = tilted.sum(-1, keepdims=True)
    p = tilted / z
    return {
        "log_z": np.log(z).mean(),
        "mean_cost": (p * COSTS).sum(-1).mean(),
        "kl_from_prior": (p * np.log(p / LAWS)).sum(-1).mean(),
        "kl_to_model": (p * np.log(p / MODELS)).sum(-1).mean(),
    }


def estimates(seen, tau=TAU):
    """The same from draws of the prior; `seen` are positions `[P, n]` in the tables."""
    cost, log_prior, log_model = (np.take_along_axis(table, seen, 1) for table in (COSTS, np.log(LAWS), np.log(MODELS)))
    return {
        "log_z": golden.log_z(cost, tau),
        "mean_cost": golden.mean_cost(cost, tau),
        "kl_from_prior": golden.kl_from_prior(cost, tau),
        "kl_to_model": golden.kl_to_model(cost, tau, log_prior, log_model),
    }


@pytest.mark.parametrize("tau", [0.0, 1.0, TAU])
def test_on_draws_in_the_priors_proportions_everything_is_exact(tau):
    seen = np.array([np.repeat(np.arange(4), np.round(10 * law).astype(int)) for law in LAWS])
    for name, value in exact(tau).items():
        assert estimates(seen, tau)[name].value == pytest.approx(value, abs=1e-12), name
    weights = golden.weights(np.take_along_axis(COSTS, seen, 1), tau)
    p = LAWS * np.exp(-tau * COSTS)
    p /= p.sum(-1, keepdims=True)
    for row in range(2):
        assert np.bincount(seen[row], weights[row]) == pytest.approx(p[row])
    ess = golden.effective_sample_size(np.take_along_axis(COSTS, seen, 1), tau)
    assert ess == pytest.approx(10 / (p**2 / LAWS).sum(-1))


def test_errors_cover_the_truth():
    """In 95 % of repetitions the truth lies within 1.96 standard errors, up to four of this experiment's own."""
    rng, repetitions, n, truth = np.random.default_rng(0), 1000, 200, exact()
    hits = dict.fromkeys(truth, 0)
    for _ in range(repetitions):
        seen = np.array([rng.choice(4, n, p=law) for law in LAWS])
        for name, (value, error) in estimates(seen).items():
            hits[name] += abs(value - truth[name]) <= 1.96 * error
    for name, count in hits.items():
        assert count / repetitions == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / repetitions)), name


def test_two_models_are_compared_on_the_same_draws():
    """Exactly where they differ by a constant factor, although neither distance is known well."""
    seen = np.random.default_rng(0).integers(4, size=(2, 20))
    cost, log_prior, log_model = (np.take_along_axis(table, seen, 1) for table in (COSTS, np.log(LAWS), np.log(MODELS)))
    farther = golden.mean(log_model - (log_model - 0.5), cost, TAU)
    assert farther == pytest.approx((0.5, 0.0))
    near, far = (golden.kl_to_model(cost, TAU, log_prior, log_q) for log_q in (log_model, log_model - 0.5))
    assert far.value - near.value == pytest.approx(farther.value)
    assert near.error > 0.05


def test_draws_of_the_target_are_in_its_proportions():
    seen = np.array([np.repeat(np.arange(4), np.round(10 * law).astype(int)) for law in LAWS])
    cost = np.take_along_axis(COSTS, seen, 1)
    drawn = golden.draws(cost, TAU, 40_000, np.random.default_rng(0))
    assert drawn.shape == (2, 40_000)
    p = LAWS * np.exp(-TAU * COSTS)
    p /= p.sum(-1, keepdims=True)
    for row in range(2):
        assert np.bincount(seen[row][drawn[row]]) / 40_000 == pytest.approx(p[row], abs=0.01)


def test_one_draw_has_no_error():
    with pytest.raises(ValueError, match="an error needs at least two"):
        golden.log_z(np.zeros((3, 1)), 1.0)


# ---- Drawing ---------------------------------------------------------------------------------------------------------


def count_b(prompts, completions, at_least):
    """A cost with a column."""
    return [float(abs(text.split().count("b") - wanted)) for text, wanted in zip(completions, at_least, strict=True)]


def task(name="b", length=MAX_LENGTH, cost=count_b, prompts=("a", "b a", "c")):
    rows = [{"prompt": prompt, "at_least": number} for number, prompt in enumerate(prompts)]
    return SteeringTask(name, rows, cost, 3.0, TAU, length)


def maker(tokenizer, model_seed=0, seed=0, **changes):
    return GoldMaker(task(**changes), tiny_gpt2(model_seed), tokenizer, seed)


def test_gold_is_of_the_prior(tokenizer, tmp_path):
    """Its log L is the model's, its costs are the texts', and its estimates are those of an enumeration."""
    made = maker(tokenizer).make(tmp_path / "b.json", 4500, 512, no_progress)
    assert len(made) == 3 * 1500
    every, model = every_completion(), tiny_gpt2()
    texts = tokenizer.batch_decode(every.tokens(), skip_special_tokens=True)
    position = {tuple(row): index for index, row in enumerate(every.tokens())}
    cost, log_prior = made.by_prompt(made.cost), made.by_prompt(made.log_prior)
    exact_log_z = []
    for index, prompt in enumerate(made.prompts):
        scores = log_probs(model, prompt, every).numpy()
        costs = np.array(count_b([], texts, [index] * len(texts)))
        exact_log_z.append(np.logaddexp.reduce(scores - TAU * costs))
        where = [position[tuple(row)] for row in made.completions[index::3]]
        assert log_prior[index] == pytest.approx(scores[where], abs=1e-3)
        assert cost[index] == pytest.approx(costs[where])
    value, error = golden.log_z(cost, TAU)
    assert abs(value - np.mean(exact_log_z)) < 3 * error < 0.1


def test_resumed_is_as_uninterrupted(tokenizer, tmp_path):
    """Whatever the blocks, and wherever it was stopped: within a turn of the prompts, too."""
    alone, parts = tmp_path / "alone.json", tmp_path / "new" / "parts.json"
    maker(tokenizer).make(alone, 60, 1000, no_progress)
    interrupted = maker(tokenizer)
    write, blocks = Gold.write, []

    def stopped(gold, path):
        write(gold, path)
        blocks.append(len(gold))
        if len(blocks) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gold, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            interrupted.make(parts, 60, 11, no_progress)
    assert len(Gold.read(parts)) == 22
    maker(tokenizer).make(parts, 60, 7, no_progress)
    first, second = Gold.read(alone), Gold.read(parts)
    assert first.completions == second.completions
    assert first.cost == second.cost
    assert first.log_prior == pytest.approx(second.log_prior, abs=2e-4)
    before = parts.stat().st_mtime_ns
    maker(tokenizer).make(parts, 45, 7, no_progress)
    assert parts.stat().st_mtime_ns == before, "there is nothing to draw"


def test_progress_counts_what_was_there(tokenizer, tmp_path):
    maker(tokenizer).make(tmp_path / "b.json", 12, 8, no_progress)
    seen = []

    class Bar:
        def __init__(self, description, total, done):
            seen.append((description, total, done))

        def __enter__(self):
            return seen.append

        def __exit__(self, *exception):
            pass

    maker(tokenizer).make(tmp_path / "b.json", 18, 4, Bar)
    assert seen == [("gold of b", 18, 12), 4, 2]


def test_another_task_with_the_same_prompts_needs_no_draws_of_its_own(tokenizer, tmp_path, monkeypatch):
    made = maker(tokenizer).make(tmp_path / "b.json", 12, 8, no_progress)

    def never(prompts, completions, at_least):
        return [3.0] * len(completions)

    with monkeypatch.context() as patch:
        patch.setattr("evaluation.drawing_gold.generate", pytest.fail)
        maker(tokenizer, name="never", cost=never).make(tmp_path / "never.json", 12, 8, no_progress)
    stored = Gold.read(tmp_path / "never.json")
    assert (stored.completions, stored.log_prior) == (made.completions, made.log_prior)
    assert stored.about == made.about | {"task": "never"}
    assert stored.cost == [3.0] * 12
    maker(tokenizer, name="short", length=2).make(tmp_path / "short.json", 12, 8, no_progress)
    assert Gold.read(tmp_path / "short.json").completions != made.completions


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"seed": 1}, "settings"),
        ({"length": 2}, "settings"),
        ({"prompts": ("a", "b a", "c c")}, "prompts"),
        ({"cost": lambda prompts, completions, at_least: [0.5] * len(completions)}, "costs"),
        ({"model_seed": 1}, "log-probabilities"),
    ],
)
def test_draws_of_something_else_are_refused(tokenizer, tmp_path, changes, what):
    path = tmp_path / "b.json"
    maker(tokenizer).make(path, 6, 8, no_progress)
    before = path.read_text()
    with pytest.raises(ValueError, match=rf"b.json have other {what} than this task.*--gold_dir"):
        maker(tokenizer, **changes).make(path, 12, 8, no_progress)
    assert path.read_text() == before


def test_the_file_is_json_with_a_draw_per_line(tokenizer, tmp_path):
    path = tmp_path / "b.json"
    made = maker(tokenizer).make(path, 6, 8, no_progress)
    stored = json.loads(path.read_text())
    assert stored["columns"] == ["cost", "log_prior", "token_ids"]
    assert stored["draws"][0] == [made.cost[0], made.log_prior[0], made.completions[0]]
    assert len(path.read_text().splitlines()) == 4 + 6 + 1
    assert Gold.read(path) == made
    assert made.padded.tokens() == made.completions
    assert made.prompt_of_draws[:4] == [*made.prompts, made.prompts[0]]
    assert [*tmp_path.iterdir()] == [path], "what it was written under is gone"


def test_an_unfinished_turn_is_left_out():
    gold = Gold({}, [[1], [2]], [[0]] * 5, [0.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert gold.by_prompt(gold.cost).tolist() == [[1.0, 3.0], [2.0, 4.0]]
