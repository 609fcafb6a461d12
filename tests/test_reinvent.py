"""REINVENT's loss: over the model's own draws its fixed point is p_T, with replay it is not."""

import pytest
import torch
from evaluation.baselines import CountedObjective
from evaluation.enumeration import Enumeration, kl_divergence, text_log_probs
from evaluation.reinvent import log_model, reinvent
from problems.prior import RecipeModelConfig, make_prior
from problems.text_problem import TextProblem

from aldrift_hf.models.prior import base_model

TAU_MAX = 2.0
QUICK = RecipeModelConfig(prior_steps=100)


class ThreeLetters(TextProblem):
    """Strings of three letters out of three; the cost counts those that are not a."""

    words, separator, worst_cost = ["a", "b", "c"], " ", 3.0

    def random_texts(self, count, rng):
        return [" ".join(rng.choice(self.words, 3)) for _ in range(count)]

    def cost_of(self, text):
        return float(3 - text.split().count("a"))

    def number_of_strings(self):
        return 27

    def all_texts(self):
        return (f"{x} {y} {z}" for x in self.words for y in self.words for z in self.words)


@pytest.fixture(scope="module")
def strings():
    problem = ThreeLetters()
    model, tokenizer, _ = make_prior(problem, QUICK)
    return Enumeration.of(problem.all_texts(), problem.cost_of, problem.worst_cost, tokenizer), model


def test_log_probabilities_are_the_scorers(strings):
    every, model = strings
    expected = torch.as_tensor(text_log_probs(every.texts, model, every.tokenizer))
    torch.testing.assert_close(log_model(model, every.tokenizer, every.texts).double(), expected, atol=1e-5, rtol=0)


def test_at_p_t_only_draws_of_the_model_leave_it_alone(strings):
    """The mean gradient of the loss where `q = p_T`, so that the bracket is log Z for every string: exact sums."""
    every, model = strings
    log_q = log_model(model, every.tokenizer, every.texts).double()
    log_q = log_q - log_q.logsumexp(0)  # as if there were no other text
    best = torch.tensor(every.cost == 0)

    def gradient(weights, log_z=-3.0):
        loss = weights @ (log_q.detach() + log_z - log_q).square()
        parts = torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
        return float(torch.cat([part.flatten() for part in parts]).norm())

    own = log_q.detach().exp()
    replayed = 0.7 * own + 0.3 * best / best.sum()
    assert gradient(own) < 1e-5 < 1e-2 < gradient(replayed)
    assert gradient(replayed, log_z=0.0) < 1e-5, "it is the constant that does it"


@pytest.mark.slow
def test_training_ends_at_p_t_without_replay_alone(strings):
    every, prior = strings
    log_target = every.target(every.log_probs(prior), TAU_MAX)

    def kl(replayed):
        problem = ThreeLetters()
        model, _, calls = reinvent(
            problem, QUICK, CountedObjective(problem), tau_max=TAU_MAX, proposals=64 * 250, batch=64,
            learning_rate=3e-4, replayed=replayed, seed=0,
        )  # fmt: skip
        assert calls >= 27
        return kl_divergence(log_target, every.log_probs(base_model(model)))

    before, on_policy, with_replay = kl_divergence(log_target, every.log_probs(prior)), kl(0), kl(24)
    assert on_policy < 0.05 * before
    assert with_replay > 5 * on_policy


def test_a_spent_budget_ends_the_run():
    problem = ThreeLetters()
    objective = CountedObjective(problem, limit=5)
    reinvent(
        problem, QUICK, objective, tau_max=1.0, proposals=6400, batch=8, learning_rate=1e-3, replayed=2, seed=0
    )  # fmt: skip
    assert 5 <= len(objective.known) <= 12
