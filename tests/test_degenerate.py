"""Runs that cannot work raise an error or log a warning that says what to change; no NaN goes unnoticed."""

import copy
import math

import pytest
import torch
from conftest import ALDRIFTTrainer, count_a, lora_config, tiny_gpt2

from aldrift_hf.models import numerics
from aldrift_hf.reporting import health
from aldrift_hf.reporting.record import RunRecord


@pytest.fixture
def make(config, tokenizer):
    def build(objective=count_a, model=None, adapter=True, **settings):
        model = tiny_gpt2() if model is None else model
        peft_config = lora_config(model) if adapter else None
        return ALDRIFTTrainer(model, objective, config(**settings), processing_class=tokenizer, peft_config=peft_config)

    return build


def constant(cost):
    return lambda prompts, completions: [cost for _ in completions]


def check_finite(trainer, infinite=()):
    """All of a run's figures are numbers, but for those that have no meaning in it, and so are the parameters."""
    without_meaning = {"khat", "archive_khat", "acceptance_rate", *infinite}
    for figures in [*trainer.record.rungs, trainer.record.metrics]:
        assert [name for name, value in figures.items() if not math.isfinite(value)] == [
            name for name in figures if name in without_meaning and not math.isfinite(figures[name])
        ]
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert all(bool(parameter.isfinite().all()) for parameter in trained)


# ---- The objective tells nothing apart -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "ladder"),
    [
        ("metropolis_hastings", "linear"),
        ("metropolis_hastings", "adaptive"),
        ("suffix", "linear"),
        ("span", "linear"),
        ("archive", "adaptive"),
        ("reweight", "linear"),
        ("top", "linear"),
    ],
)
@pytest.mark.parametrize("objective_range", [3.0, None])
def test_nothing_is_better_than_the_worst(make, sampler, ladder, objective_range, caplog):
    """All malformed, or a cost that is never below D: a user sees the same."""
    step = 0.75 if ladder == "linear" else None
    trainer = make(constant(3.0), sampler=sampler, ladder=ladder, objective_range=objective_range, tau_step=step)
    trainer.train()
    words = "No draw costs less than D = 3: the objective gives its largest value to every completion"
    assert caplog.text.count(words) == 2  # of the first rung to give rise to it, and of the final model
    assert "let it give partial credit" in caplog.text
    check_finite(trainer)
    assert trainer.run.state.ladder.tau == 1.5
    assert sum(words in warning for warning in health.run_warnings(RunRecord.read(trainer.args.output_dir))) == 1


@pytest.mark.slow
def test_all_costs_are_equal(make, caplog):
    trainer = make(constant(1.0))
    trainer.train()
    words = "For 100% of the prompts, all of the prior's draws have the same cost"
    assert caplog.text.count(words) == 1
    assert any(words in warning for warning in health.run_warnings(trainer.record))
    check_finite(trainer)
    assert abs(trainer.record.metrics["missing_mass"]) < 0.1  # the target is the prior, and known to be


def test_a_converged_model_is_not_blamed_for_equal_costs():
    metrics = {"rung": 7, "draws": 10_000, "constant_cost": 1.0, "objective_best": 2.0, "ess": 0.9}
    record = RunRecord({"num_generations": 10_000}, objective_range=5.0)
    assert health.health_warnings("The model", record, metrics) == {}
    assert [*health.health_warnings("The prior", record, metrics | {"rung": 0})] == ["constant_cost"]


@pytest.mark.slow
def test_a_cost_above_its_range(make):
    with pytest.raises(
        ValueError, match=r"returned 4\.0 for row \d+, above objective_range=3\.0.* Raise objective_range"
    ):
        make(constant(4.0)).train()


@pytest.mark.slow
def test_a_cost_that_fails_on_some_texts_goes_into_the_record(make, caplog):
    def flaky(prompts, completions):
        if any(text.startswith("c") for text in completions):
            raise TimeoutError("no answer")
        return count_a(prompts, completions)

    trainer = make(flaky, objective_on_error="worst", per_device_generation_batch_size=8)
    trainer.train()
    assert 0 < trainer.record.rungs[-1]["objective_failures"] <= trainer.objective.failures < trainer.objective_calls
    assert "could not be evaluated and cost 3" in caplog.text
    assert "no answer" in caplog.text
    check_finite(trainer)


# ---- Weights that leave nothing --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_draw_carries_all_weight_and_chains_accept_nothing(make, caplog):
    few = {"num_generations": 4, "chain_length": 4, "tau_max": 1.0, "tau_step": 1.0, "num_rungs": 1}
    for seed in range(100):  # until the first proposal is like no other
        looked_at = make(seed=seed, **few)
        first, *others = looked_at.rollout.propose(looked_at.inputs.prompts, 4, (0, 0)).texts
        if first not in others:
            break

    def only_the_first(prompts, completions):
        return [0.0 if text == first else 50.0 for text in completions]

    trainer = make(only_the_first, objective_range=50.0, seed=seed, **few)
    trainer.train()
    (rung,) = trainer.record.rungs
    assert rung["acceptance_rate"] == 0
    assert rung["ess"] == pytest.approx(1 / 4)
    assert "a rung's proposals are worth 1.0 independent draws per prompt. Take smaller steps" in caplog.text
    assert "The chains accept 0.0% of their proposals: most never move. Take smaller steps" in caplog.text
    check_finite(trainer)


def mask(model, tokens):
    """Has a model say `tokens` with probability 0."""

    head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[tokens] = -math.inf
    model.lm_head = head.requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "loss_type"),
    [("metropolis_hastings", "nll"), ("archive", "nll"), ("archive", "generalized_kl")],
)
def test_a_token_of_probability_zero_under_model_and_prior(make, sampler, loss_type, caplog):
    model = tiny_gpt2()
    mask(model, [3])
    trainer = make(model=model, sampler=sampler, loss_type=loss_type)
    trainer.train()
    check_finite(trainer)
    assert "probability 0" not in caplog.text
    assert not any("b" in draw["completion"] for draw in trainer.record.draws)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["metropolis_hastings", "suffix", "span", "archive", "reweight"])
def test_draws_that_the_prior_excludes_have_no_weight(make, sampler, caplog):
    n = 64 * (16 if sampler == "span" else 1)  # 64 whole texts
    trainer = make(adapter=False, sampler=sampler, num_generations=n, chain_length=16, learning_rate=1e-3)
    mask(trainer.rollout.prior.model, [3])
    trainer.train()
    # The model writes what its target never does: these are infinite, and two have no error.
    check_finite(trainer, infinite=["kl", "kl_error", "kl_to_prior", "kl_to_target", "kl_to_target_error"])
    (rung, *_) = trainer.record.rungs
    assert (
        f"{rung['excluded']:.1%} of the draws have probability 0 under the prior. The model writes what" in caplog.text
    )
    assert any("have probability 0 under the prior" in warning for warning in health.run_warnings(trainer.record))
    if sampler != "reweight":
        samples = trainer.run.samples.samples
        texts = trainer.rollout.decode(samples.completions)
        # Of the archive's rows, half are not drawn by weight: what is excluded has the target density 0 there.
        log_target = samples.columns.get("log_target", torch.zeros(len(texts))).tolist()
        assert not any("b" in text for text, target in zip(texts, log_target) if target > -math.inf)


def test_a_prior_that_excludes_all_draws(make):
    trainer = make(adapter=False)
    mask(trainer.model, [1])
    mask(trainer.rollout.prior.model, [0, 2, 3, 4])
    with pytest.raises(FloatingPointError, match="1 of 1 prompts have no proposal that the prior can write"):
        trainer.train()


# ---- NaN and infinity ------------------------------------------------------------------------------------------------


def never(prompts, completions):
    raise AssertionError("evaluated draws that cannot be weighted")


@pytest.mark.parametrize("adapter", [True, False])
def test_half_precision_overflows(make, adapter):
    model = tiny_gpt2()
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_proj.weight.mul_(1e6).clamp_(-3e4, 3e4)
    with pytest.raises(FloatingPointError, match=r"no token can be drawn.*float16.*'dtype': 'bfloat16'"):
        make(never, copy.deepcopy(model).half(), adapter).train()
    in_full = make(model=model, adapter=adapter)
    in_full.rollout.propose(in_full.inputs.prompts, 4, (0, 0))


@pytest.mark.slow
def test_impossible_log_probabilities_are_refused_before_the_draws_are_evaluated(make):
    """Where the first tokens are well and later ones are not."""
    for broken, who in (("policy", "the model"), ("prior", "the prior")):
        trainer = make(never, adapter=False)
        model = trainer.model if broken == "policy" else trainer.rollout.prior.model
        with torch.no_grad():
            model.transformer.wpe.weight[2] = math.nan  # where the third token is predicted
        with pytest.raises(FloatingPointError, match=f"probability nan under {who}, so they cannot be weighted"):
            trainer.train()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_the_update(make, value, monkeypatch):
    trainer = make(loss_type="nll", save_strategy="epoch", learning_rate=0.125)
    compute = trainer.compute_loss
    calls = []

    def diverging(*args, **kwargs):
        calls.append(None)
        if len(calls) == 6:
            before.update({name: value.clone() for name, value in trainer.model.state_dict().items()})
            return value * compute(*args, **kwargs)
        return compute(*args, **kwargs)

    before = {}
    monkeypatch.setattr(trainer, "compute_loss", diverging)
    with pytest.raises(FloatingPointError, match=rf"the loss is {value}.*Lower learning_rate \(it is 0\.125\)"):
        trainer.train()
    assert trainer.state.global_step == 5
    after = trainer.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    check_finite(trainer)


def test_a_gradient_that_is_no_number_stops_before_the_update(make):
    trainer = make(max_grad_norm=0.0)
    parameter = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    parameter.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(FloatingPointError, match="the loss is finite, but its gradient is not"):
        trainer.train()
    check_finite(trainer)


def test_an_adapter_that_diverges(make):
    """For real: steps so long that the logits overflow."""
    with pytest.raises(FloatingPointError, match="Lower learning_rate"):
        make(learning_rate=1e15, lr_scheduler_type="constant").train()


def test_gradients_of_any_size_and_kind_are_looked_at():
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    parameters[0].grad = torch.full((3,), 1e30)  # whose square overflows
    parameters[1].grad = torch.zeros(3)
    numerics.check_gradients(parameters, 1.0)
    parameters[1].grad[2] = -math.inf
    with pytest.raises(FloatingPointError):
        numerics.check_gradients(parameters, 1.0)
    numerics.check_gradients([], 1.0)
