"""`recipes/long_completions.py` on a small model: exact answers, and figures that are kept."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import every_completion, log_probs, lora, tiny_gpt2

from aldrift_hf.algorithm import diagnostics

T = 8.0
CHAINS = 200


@pytest.fixture
def recipe(recipe_module, monkeypatch, tmp_path, chat_model, capsys):
    """The recipe, with costs that differ among the words; a run returns its files of figures."""
    module = recipe_module("long_completions")
    task = module.tone()

    def cost(prompts, completions):
        return [text.split().count("a") / 3 for text in completions]

    monkeypatch.setattr(module, "tone", lambda: type(task)("tone", task.rows, cost, 1.0, T, 32))

    def run(*line, **options):
        options = {"model_name_or_path": chat_model, "output_dir": tmp_path / "out", "lengths": 3, **options}
        given = [text for name, value in options.items() for text in (f"--{name}", *str(value).split())]
        monkeypatch.setattr(sys, "argv", ["long_completions.py", *given, *line])
        module.main()
        return {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}

    run.module = module
    return run


def exact(module, chat_model, model, tokenizer):
    """log Z, p_T's mean cost and its standard deviation, KL(p_T‖q) and ESS/n, from all completions."""
    from aldrift_hf.models.prompts import encode_prompt

    completions = every_completion()
    prompt = encode_prompt(module.tone().rows[0]["prompt"], 0, tokenizer)
    texts = tokenizer.batch_decode(completions.tokens(), skip_special_tokens=True)
    cost = torch.tensor([text.split().count("a") / 3 for text in texts], dtype=torch.float64)
    log_weight = log_probs(tiny_gpt2(n_positions=64), prompt, completions) - T * cost
    log_p, log_q = log_weight.log_softmax(0), log_probs(model, prompt, completions)
    ess = 1 / ((2 * log_p).exp() / log_q.exp()).sum()
    mean = (log_p.exp() * cost).sum()
    deviation = (log_p.exp() * (cost - mean) ** 2).sum().sqrt()
    return log_weight.logsumexp(0), mean, deviation, (log_p.exp() * (log_p - log_q)).sum(), ess


@pytest.mark.slow
def test_figures_are_those_of_the_distributions(recipe, chat_model, tokenizer, tmp_path):
    """Of the prior and of an adapter: ESS, KL, log Z, mean cost, and where the chains have come."""
    adapter = lora(tiny_gpt2(n_positions=64), seed=3, scale=0.1)
    adapter.save_pretrained(tmp_path / "adapter")
    files = recipe("--models", "prior", str(tmp_path / "adapter"), draws=30 * CHAINS, chains=CHAINS, block=3000)
    assert len(files) == 4
    for name, found in files.items():
        if not name.endswith("figures.json"):
            continue
        model = tiny_gpt2(n_positions=64) if name.startswith("prior") else adapter.base_model.model
        log_z, cost, deviation, kl, ess = exact(recipe.module, chat_model, model, tokenizer)
        assert found["log_z"] == pytest.approx(log_z.item(), abs=5 * found["log_z_error"])
        assert found["kl"] == pytest.approx(kl.item(), abs=5 * found["kl_error"])
        assert found["ess"] == pytest.approx(ess.item(), rel=0.15)
        assert abs(found["missing_mass"]) <= 5 * found["missing_mass_error"] + 1e-6
        for estimate in ("target_cost", "weighted_cost"):
            assert found[estimate] == pytest.approx(cost.item(), abs=5 * found[f"{estimate}_error"]), estimate
        for estimate in ("whole_cost", "suffix_cost"):  # of few chains, often all without a cost: an error of 0
            assert found[estimate] == pytest.approx(cost.item(), abs=5 * deviation.item() / CHAINS**0.5), estimate
            assert abs(found["cost"] - found[estimate]) > 10 * deviation.item() / CHAINS**0.5
        assert abs(found["cost"] - cost.item()) > 5 * found["cost_error"], "the draws are the target's"
        assert 0 <= found["suffix_tokens"] - found["tokens"] < 3 * CHAINS, "as many tokens, to a step"
        assert found["suffix_calls"] == CHAINS * (1 + found["suffix_steps"])
        assert found["suffix_steps"] > found["whole_steps"] == 29
    table = (tmp_path / "out" / "long_completions.md").read_text()
    assert "| 3, prior | 3, " in table
    assert "KL(p_T‖q), nats" in table


@pytest.mark.slow
def test_what_is_known_is_not_measured_again(recipe, tmp_path, monkeypatch):
    """Figures are read; draws of an interrupted command are gone on with, and are the same as in one go."""
    whole = recipe(draws=40, chains=4, block=8)
    rows = whole["prior_3_draws.json"]["draws"]
    assert rows[:8] != rows[8:16], "each block has random numbers of its own"
    figures = tmp_path / "out" / "prior_3_figures.json"
    draws = tmp_path / "out" / "prior_3_draws.json"
    written = figures.stat().st_mtime_ns
    recipe(draws=40, chains=4, block=8)
    assert figures.stat().st_mtime_ns == written
    figures.unlink()
    kept = json.loads(draws.read_text())
    draws.write_text(json.dumps({**kept, "draws": kept["draws"][:16]}))
    again = recipe(draws=40, chains=4, block=8)
    assert again[draws.name]["draws"] == whole[draws.name]["draws"]
    for name, value in whole[figures.name].items():
        if not name.endswith("seconds"):
            assert again[figures.name][name] == value or np.isnan(value), name
    more = recipe(draws=80, chains=4, block=8)
    assert more[draws.name]["draws"][:40] == whole[draws.name]["draws"]
    assert more[figures.name]["draws"] == 80


@pytest.mark.slow
def test_ess_is_that_of_the_weights(recipe, tmp_path):
    files = recipe(draws=40, chains=4, block=8)
    rows = files["prior_3_draws.json"]["draws"]
    log_weight = torch.tensor([[log_prior - T * cost - sum(log_q) for cost, log_prior, _, log_q in rows]])
    found = files["prior_3_figures.json"]
    assert found["ess"] == pytest.approx(diagnostics.effective_sample_size(log_weight).item(), rel=1e-6)
    assert found["tokens"] == sum(len(row[2]) for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 10, "chains": 4}, "--draws a multiple of --chains"),
        ({"draws": 4, "chains": 4}, "at least twice it"),
        ({"lengths": "0"}, "--lengths must be at least 1"),
        ({"models": "nowhere"}, "--models nowhere: there is no adapter_model.safetensors"),
        ({"model_name_or_path": "nowhere"}, "--model_name_or_path nowhere: "),
    ],
)
def test_bad_options_are_one_clear_line(recipe, options, message):
    with pytest.raises(SystemExit, match=message):
        recipe(**options)


def test_files_of_other_settings_are_refused(recipe):
    recipe(draws=8, chains=2, block=8)
    with pytest.raises(SystemExit, match=r"prior_3_figures\.json is of other settings"):
        recipe(draws=8, chains=2, block=8, seed=1)
