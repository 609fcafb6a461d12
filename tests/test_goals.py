"""T chosen for a mean cost, a share of successes or a distance from the prior: against enumeration."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import ALDRIFTTrainer, count_a, every_completion, log_probs, lora_config, tiny_gpt2
from test_archive import COST, PRIOR, draws

from aldrift_hf.algorithm.goals import KLBudget, TargetCost, TargetSuccess
from aldrift_hf.algorithm.ladders import AdaptiveLadder, LadderState, LinearLadder
from aldrift_hf.reporting.health import run_warnings

MODEL = torch.tensor([0.25, 0.25, 0.25, 0.25], dtype=torch.float64)
LOG_PRIOR = PRIOR.log()
THRESHOLD = 1.0


def of_target(tau, log_prior=LOG_PRIOR, cost=COST, threshold=THRESHOLD):
    """Mean cost, success and KL(p_τ‖L), enumerated."""
    log_p = (log_prior - tau * cost).log_softmax(0)
    p = log_p.exp()
    kl = torch.where(p > 0, p * (log_p - log_prior), 0.0).sum()
    return {"target_cost": p @ cost, "target_success": p @ (cost <= threshold).double(), "kl_budget": kl}


def goal(name, wanted):
    if name == "target_success":
        return TargetSuccess(wanted, THRESHOLD)
    return {"target_cost": TargetCost, "kl_budget": KLBudget}[name](wanted)


NAMES = ("target_cost", "target_success", "kl_budget")


def exact_pool(prompts=1):
    """Draws without sampling noise of a model that is not the prior."""
    events = torch.arange(4).repeat(prompts * 4)
    pool = draws(0, 8, prompts)
    shape = (prompts, 16)
    return replace(
        pool,
        rows=torch.arange(prompts).repeat_interleave(16),
        objective=COST[events].view(shape),
        log_prior=LOG_PRIOR[events].view(shape),
        log_model=MODEL.log()[events].view(shape),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tau", [0.1, 0.7, 3.0])
def test_t_is_the_one_of_an_enumeration(name, tau):
    """From weighted draws without noise it is exact, wherever the ladder stands."""
    wanted = of_target(tau)[name].item()
    state = goal(name, wanted).aim(LadderState.start(2, None), exact_pool(2))
    assert state.tau_max == pytest.approx(tau, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_slopes_are_derivatives(name):
    value = lambda tau: goal(name, 0.5).figure(exact_pool(), tau).value  # noqa: E731
    slope = goal(name, 0.5).figure(exact_pool(), 0.7).slope
    assert slope == pytest.approx((value(0.7 + 1e-5) - value(0.7 - 1e-5)) / 2e-5, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_error_is_the_spread_of_the_estimates(name):
    """Over 3,000 repetitions of 200 draws for each of two prompts, 5 %."""
    tau, repetitions = 1.0, 3000
    generator = torch.Generator().manual_seed(1)
    events = torch.multinomial(MODEL, repetitions * 400, replacement=True, generator=generator)
    aim, found = goal(name, of_target(tau)[name].item()), []
    for part in events.view(repetitions, 2, 200):
        pool = replace(
            exact_pool(2),
            rows=torch.arange(2).repeat_interleave(200),
            objective=COST[part],
            log_prior=LOG_PRIOR[part],
            log_model=MODEL.log()[part],
        )
        state = aim.aim(LadderState.start(2, None), pool)
        found.append((state.tau_max, state.tau_max_error))
    estimates, errors = torch.tensor(found, dtype=torch.float64).T
    assert errors.square().mean().sqrt().item() == pytest.approx(estimates.std().item(), rel=0.05)
    assert estimates.mean().item() == pytest.approx(tau, abs=0.05)


def test_prompts_are_averaged():
    """Where one prompt's draws all cost the same, the other one has to make up for it."""
    pool = exact_pool(2)
    pool.objective[0] = 1.0
    tau = TargetCost(0.9).aim(LadderState.start(2, None), pool).tau_max
    assert (1.0 + of_target(tau)["target_cost"].item()) / 2 == pytest.approx(0.9)


@pytest.mark.parametrize(("name", "wanted"), [("target_cost", 0.0), ("target_success", 0.9999), ("kl_budget", 50.0)])
def test_out_of_reach_of_the_draws_t_is_infinite(name, wanted):
    """No draw costs so little, and none is so unlikely under the prior."""
    pool = exact_pool()
    pool.objective += 2.0
    state = goal(name, wanted).aim(LadderState.start(1, None), pool)
    assert math.isinf(state.tau_max)
    assert math.isinf(state.tau_max_error)
    linear, adaptive = LinearLadder(0.5), AdaptiveLadder(0.1, 16)
    assert linear.next_tau(state, pool) == 0.5
    assert linear.num_rungs(state) is None
    assert adaptive.next_tau(state, pool) <= 4 / pool.objective.max().item()


@pytest.mark.parametrize(("name", "wanted"), [("target_cost", 2.9), ("target_success", 0.05)])
def test_less_than_the_prior_has_is_an_error(name, wanted):
    with pytest.raises(ValueError, match=rf"{name}={wanted:g} asks for less than the prior has, \d"):
        goal(name, wanted).aim(LadderState.start(1, None), exact_pool())
    later = replace(LadderState.start(1, None), taus=(1.0,))
    assert goal(name, wanted).aim(later, exact_pool()).tau_max < 1.0, "on later rungs T may be noise around 0"


@pytest.fixture
def make(config, tokenizer):
    def make(cost=count_a, **settings):
        model = tiny_gpt2()
        given = {
            **{"sampler": "archive", "tau_max": None, "num_rungs": None, "ladder": "adaptive", "tau_step": None},
            **{"num_generations": 1024, "updates_per_rung": 30, "chain_length": 4, **settings},
        }
        return ALDRIFTTrainer(model, cost, config(**given), processing_class=tokenizer, peft_config=lora_config(model))

    return make


def test_while_t_is_not_known_nothing_is_evaluated(make, caplog):
    """No draw of the first rung costs as little as is asked for, and the run goes on."""
    settings = {"num_generations": 16, "updates_per_rung": 1, "max_rungs": 2}
    trainer = make(target_cost=0.001, eval_strategy="epoch", eval_on_start=True, **settings)
    trainer.train()
    assert len(trainer.record.rungs) == 2
    assert "an evaluation is skipped: T is not known yet" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ladder", [{}, {"ladder": "linear", "tau_step": 0.5}], ids=["adaptive", "linear"])
def test_a_run_finds_t_and_ends_there(make, tokenizer, name, ladder):
    """Within 2 % of the enumeration, and within three standard errors."""
    tau, prior, completions = 1.2, tiny_gpt2(), every_completion()
    cost = torch.tensor(count_a([], tokenizer.batch_decode(completions.tokens(), skip_special_tokens=True)))
    wanted = of_target(tau, log_probs(prior, [0], completions), cost.double(), 0.0)[name].item()
    trainer = make(**{name: wanted}, **ladder, num_generations=4096)
    trainer.train()
    record = trainer.record
    assert record.tau_max == pytest.approx(tau, rel=0.02)
    assert abs(record.tau_max - tau) <= 3 * record.tau_max_error < 0.1
    assert record.rungs[-1]["tau"] == record.rungs[-1]["tau_max"] == record.tau_max
    assert record.ended_by.startswith("The model is close to p_T")
    assert trainer.run.tau_max == record.tau_max
    assert math.isfinite(record.metrics["missing_mass"])


@pytest.mark.slow
def test_a_resumed_run_knows_its_t(make, tmp_path):
    save = {"save_strategy": "epoch", "save_total_limit": None, "num_rungs": 3, "target_cost": 0.5}
    whole = make(output_dir=str(tmp_path / "whole"), **save)
    whole.train()
    resumed = make(output_dir=str(tmp_path / "resumed"), **save)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-60"))
    assert resumed.record.tau_max == whole.record.tau_max
    assert resumed.record.tau_max_error == whole.record.tau_max_error


@pytest.mark.slow
def test_a_run_that_is_loaded_has_its_t(make):
    trainer = make(target_cost=0.5, num_rungs=2)
    trainer.train()
    trainer.save_model()
    again = make(target_cost=0.5, num_rungs=2)
    again.load_run(trainer.args.output_dir)
    assert again.run.tau_max == trainer.record.tau_max
    assert again.sample(4).num_rows == 4


@pytest.mark.slow
def test_without_a_t_nothing_is_measured_or_sampled(make):
    at_least_one = lambda prompts, completions: [1 + cost for cost in count_a(prompts, completions)]  # noqa: E731
    trainer = make(at_least_one, target_cost=0.5, max_rungs=1, objective_range=4.0)
    with pytest.raises(ValueError, match="there is no T yet"):
        trainer.sample(4)
    trainer.train()
    assert trainer.record.tau_max is None
    assert not trainer.record.metrics
    assert any("without having found T" in warning for warning in run_warnings(trainer.record))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau_max": 2.0, "target_cost": 0.5}, "tau_max and target_cost each choose T"),
        ({"target_success": 0.5, "kl_budget": 1.0}, "target_success and kl_budget each choose T"),
        ({"target_cost": -1.0}, "target_cost must be positive"),
        ({"target_success": 1.0}, "target_success must be greater than 0 and less than 1"),
        ({"target_cost": 0.5, "sampler": "top", "ladder": "linear"}, "find T from the weights, and sampler='top'"),
    ],
)
def test_contradictions_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)
