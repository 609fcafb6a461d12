"""The comparison of steering methods: its measures, gradients and tables, against enumeration where possible."""

import copy

import numpy as np
import pytest
import torch
from conftest import every_completion, lora, tiny_gpt2
from evaluation import gold as golden
from evaluation import steering_measures, steering_methods, steering_table
from evaluation import steering_trainers as trainers
from evaluation.drawing_gold import GoldMaker
from evaluation.gold import Gold
from evaluation.steering_measures import ScoredGold
from evaluation.steering_model import Drawn, Learner, Steered
from evaluation.steering_setting import PRECISIONS, Setting
from problems.steering import SteeringTask
from test_gold import COSTS, LAWS, MODELS, TAU, count_b, exact

from aldrift_hf.models.shared_prompts.attention import sharing
from aldrift_hf.types import no_progress

# ---- Measures --------------------------------------------------------------------------------------------------------


def in_proportion(laws):
    """Ten draws of each prompt in exactly these proportions: positions `[P, 10]`."""
    return np.array([np.repeat(np.arange(4), np.round(10 * law).astype(int)) for law in laws])


def pick(table, seen):
    return np.take_along_axis(table, seen, 1)


def enumerated_gold():
    seen = in_proportion(LAWS)
    return ScoredGold(
        pick(COSTS, seen), np.log(pick(LAWS, seen)), np.log(pick(MODELS, seen)), np.ones_like(seen, dtype=bool)
    )


def enumerated_draws():
    seen = in_proportion(MODELS)
    names = [str(position) for row in seen for position in row]
    return Drawn(
        [[0] * (1 + int(name)) for name in names],
        names,
        pick(COSTS, seen),
        np.log(pick(MODELS, seen)),
        np.log(pick(LAWS, seen)),
    )


def test_measures_are_those_of_an_enumeration():
    gold, drawn = enumerated_gold(), enumerated_draws()
    bound, quantile = steering_measures.log_bounds(gold, TAU)
    found = steering_measures.of_gold(gold, TAU) | steering_measures.of_draws(drawn, TAU, bound, quantile)
    truth, weight = exact(), LAWS * np.exp(-TAU * COSTS) / MODELS
    z = (LAWS * np.exp(-TAU * COSTS)).sum(-1, keepdims=True)
    p = LAWS * np.exp(-TAU * COSTS) / z
    accepted = (MODELS * weight / weight.max(-1, keepdims=True)).sum(-1)
    tokens = (MODELS * np.arange(1, 5)).sum(-1)
    expected = {
        "kl": truth["kl_to_model"],
        "log_z_upper": truth["log_z"] + truth["kl_to_model"],
        "log_z_lower": truth["log_z"] - (MODELS * np.log(MODELS / p)).sum(-1).mean(),
        "cost": (MODELS * COSTS).sum(-1).mean(),
        "kl_prior": (MODELS * np.log(MODELS / LAWS)).sum(-1).mean(),
        "satisfied": MODELS[COSTS == 0].sum() / 2,
        "acceptance": accepted.mean(),
        "acceptance_quantile": accepted.mean(),
        "ess": (1 / (MODELS * (weight / z) ** 2).sum(-1)).mean(),
        "corrected_cost": truth["mean_cost"],
        "distinct": 8 / 20,
        "tokens_per_draw": tokens.mean(),
        "tokens_per_exact_draw": (tokens / accepted).mean(),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert found["corrected_cost_error"] > 0


@pytest.mark.slow
def test_errors_of_corrected_draws_cover_the_truth():
    rng, hits, repetitions = np.random.default_rng(0), 0, 500
    for _ in range(repetitions):
        seen = np.array([rng.choice(4, 200, p=law) for law in MODELS])
        drawn = Drawn([[0]] * 400, [""] * 400, pick(COSTS, seen), np.log(pick(MODELS, seen)), np.log(pick(LAWS, seen)))
        found = steering_measures.of_draws(drawn, TAU, np.zeros((2, 1)), np.zeros((2, 1)))
        hits += abs(found["corrected_cost"] - exact()["mean_cost"]) <= 1.96 * found["corrected_cost_error"]
    assert hits / repetitions == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / repetitions))


def test_a_bound_that_a_hundredth_of_the_target_exceeds():
    weights = np.full((1, 200), 1.0)
    log_weight = np.linspace(0.0, 1.99, 200)[None]
    gold = ScoredGold(0.0 * weights, log_weight, 0.0 * weights, weights > 0)
    largest, quantile = steering_measures.log_bounds(gold, TAU)
    assert (largest.item(), quantile.item()) == pytest.approx((1.99, 1.97))


def test_draws_of_little_weight_need_no_scores():
    cost = np.array([[0.0, 5.0, 1.0, 9.0], [9.0, 9.0, 9.0, 0.0]])
    scored = steering_measures.heaviest(cost, 1.0, 0.999)
    assert scored.tolist() == [[True, True, True, False], [True, False, False, True]]
    assert steering_measures.heaviest(cost, 1.0, 1.0).all()
    log_prior, ratio = np.arange(8.0).reshape(2, 4), np.array([[1.0, 3.0, 2.0, 5.0], [2.0, 0.0, 0.0, 4.0]])
    whole = steering_measures.filled(np.where(scored, log_prior + ratio, np.nan), log_prior, cost, 1.0)
    assert (whole - log_prior)[scored] == pytest.approx(ratio[scored])
    for row in range(2):
        known = scored[row]
        average = np.average(ratio[row, known], weights=np.exp(-cost[row, known]))
        assert (whole - log_prior)[row, ~known] == pytest.approx(average)


def test_scores_of_gold_are_the_models(tokenizer, tmp_path):
    """The right log q for each prompt's draws, also where some are left out."""
    task = task_b()
    gold = GoldMaker(task, tiny_gpt2(), tokenizer, 0).make(tmp_path / "b.json", 60, 60, no_progress)
    steered = Steered(task, lora(tiny_gpt2(), seed=1), tokenizer, 0)
    scored = ScoredGold.of(gold, steered, TAU, 0.9)
    every = gold.by_prompt(steered.scores([draw % 3 for draw in range(60)], gold.completions))
    assert 6 <= scored.scored.sum() < 60
    assert scored.log_model[scored.scored] == pytest.approx(every[scored.scored], abs=1e-4)
    prior = steered.scores([draw % 3 for draw in range(60)], gold.completions, prior=True)
    assert prior == pytest.approx(gold.log_prior, abs=1e-3)


# ---- Methods ---------------------------------------------------------------------------------------------------------


def task_b():
    rows = [{"prompt": prompt, "at_least": number} for number, prompt in enumerate(("a", "b a", "c"))]
    return SteeringTask("b", rows, count_b, 3.0, TAU, 3)


def test_fresh_draws(tokenizer):
    """Their log q and log L are the scores of their tokens, and their costs those of their own prompts."""
    steered = Steered(task_b(), lora(tiny_gpt2(), seed=1), tokenizer, 0)
    drawn = steered.draw(50, (0,), which=[2, 0])
    rows = [2] * 50 + [0] * 50
    assert drawn.log_model.flatten() == pytest.approx(steered.scores(rows, drawn.completions), abs=1e-4)
    assert drawn.log_prior.flatten() == pytest.approx(steered.scores(rows, drawn.completions, prior=True), abs=1e-4)
    assert drawn.cost.flatten().tolist() == count_b(rows, drawn.texts, rows)
    assert abs(drawn.log_model - drawn.log_prior).mean() > 0.1
    plain = Steered(task_b(), tiny_gpt2(), tokenizer, 0).draw(2, (0,))
    assert (plain.log_prior == plain.log_model).all()
    assert plain.tokens.shape == (3, 2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_holds_in_drawing_scoring_and_learning(tokenizer, precision):
    """What is drawn, scored and learned has the same rounding, and the adapter the type that was asked for."""
    setting = Setting("tone", "dpg", 1e-2, 64, 0, "somewhere", precision=precision)
    assert setting.label == ("dpg" if precision == "fp32" else f"dpg precision={precision}")
    model = tiny_gpt2().to(getattr(torch, setting.dtype))
    policy = trainers.set_precision(lora(model, seed=1), setting)
    adapter = {parameter.dtype for parameter in policy.parameters() if parameter.requires_grad}
    assert adapter == {torch.bfloat16 if precision == "bf16_lora" else torch.float32}
    steered = Steered(task_b(), policy, tokenizer, 0, setting.autocast)
    drawn = steered.draw(20, (0,), which=[2])
    rows, in_fp32 = [2] * 20, Steered(task_b(), copy.deepcopy(policy).float(), tokenizer, 0)
    exact_scores = in_fp32.scores(rows, drawn.completions)
    found = abs(drawn.log_model.flatten() - exact_scores).max()
    assert (found < 1e-4) == (precision == "fp32")
    assert found < 0.2
    Learner(steered, 1e-2).ascend(rows, drawn.completions, [0.05] * 20)
    assert steered.scores(rows, drawn.completions).mean() > exact_scores.mean() + 0.01


def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def test_dpg_follows_the_gradient_of_cross_entropy(tokenizer):
    """In expectation over the model's draws, `factors · ∇ log q` is `∇ E_p[log q]`."""
    task, model, every = task_b(), lora(tiny_gpt2(), seed=1), every_completion().tokens()
    steered, row = Steered(task, model, tokenizer, 0), 1
    rows = [row] * len(every)
    texts = tokenizer.batch_decode(every, skip_special_tokens=True)
    cost = np.array(count_b(rows, texts, rows))
    log_target = steered.scores(rows, every, prior=True) - TAU * cost
    log_z = np.logaddexp.reduce(log_target)
    with sharing(steered.base):
        log_q = steered.log_probs(rows, every)
        (torch.tensor(np.exp(log_target - log_z)).float() * log_q).sum().backward()
        wanted = gradients(model).clone()
        model.zero_grad()
        scores = steered.log_probs(rows, every)
        log_weight = log_target - scores.detach().double().numpy()
        factors = len(every) * steering_methods.dpg_factors(log_weight[None], np.array([log_z]))[0]
        (scores.detach().exp() * torch.tensor(factors).float() * scores).sum().backward()
    assert wanted.norm() > 0.1
    assert gradients(model) == pytest.approx(wanted, abs=1e-4)


def test_an_update_raises_what_has_positive_factors(tokenizer):
    steered = Steered(task_b(), lora(tiny_gpt2()), tokenizer, 0)
    rows, completions = [0, 2], [[2, 3, 4], [4, 0]]
    before = steered.scores(rows, completions)
    Learner(steered, 1e-2).ascend(rows, completions, [1.0, -1.0])
    after = steered.scores(rows, completions)
    assert after[0] > before[0] + 0.01
    assert after[1] < before[1] - 0.01


def test_expert_iteration_keeps_the_best():
    found = [(0.5, [1]), (0.1, [2]), (0.5, [3]), (0.9, [4])]
    assert steering_methods.best_share(found, 0.5) == [[2], [1]]
    assert steering_methods.best_share(found, 0.01) == [[2]]


def test_rewards_are_of_texts_and_get_the_costs_columns():
    reward = trainers.reward_of(count_b)
    given = {"completion_ids": [[1], [2]], "at_least": [1, 1], "trainer_state": None}
    answers = [[{"role": "assistant", "content": "b a"}], "b b b"]
    assert reward(prompts=[None] * 2, completions=answers, **given) == [0.0, -2.0]


# ---- Tables ----------------------------------------------------------------------------------------------------------


def result(method="rloo", rate=1e-4, calls=64, seed=0, **measures):
    setting = Setting("tone", method, rate, calls, seed, "somewhere")
    return {"setting": setting.identity(), "calls": calls, "cost": 0.5, "kl_prior": 1.0, **measures}


def test_the_best_learning_rate_is_that_of_the_first_seed():
    results = [
        result(rate=1e-4, kl=1.0),
        result(rate=2e-4, kl=0.9, kl_error=0.3),
        result(rate=2e-4, seed=1, kl=1.1),
        result(rate=1e-4, seed=1, kl=0.1),
        result(rate=4e-4, seed=1, kl=0.0),
        result("dpg", kl=2.0, kl_error=0.2),
        result("rejection", rate=0.0),
    ]
    gold = Gold({}, [[1]], [[0]] * 4, [-1.0] * 4, [0.0, 0.0, 1.0, 1.0])
    rows, costs = (dict(table.rows) for table in steering_table.tables("tone", results, gold, 8.0))
    assert [*rows] == ["p_T, by gold", "rloo, lr 0.0002, 2 seeds", "dpg, lr 0.0001", "rejection"]
    assert rows["rloo, lr 0.0002, 2 seeds"][0] == "1.00 ± 0.10"
    assert rows["dpg, lr 0.0001"][0] == "2.00 ± 0.20"
    assert rows["rejection"][0] == ""
    assert rows["p_T, by gold"][4:6] == [f"{golden.log_z(gold.by_prompt(gold.cost), 8.0).value:.2f}"] * 2
    assert [*costs] == [*rows][1:]
    assert costs["rejection"][4] == "64"
