"""The self-test that ships with the package: green here, red where something is broken, and clear about its options."""

import contextlib
import dataclasses
import math
import runpy
import sys
from importlib.metadata import version

import pytest
import torch
from conftest import WORDS, tiny_gpt2
from transformers import BartConfig, DeepseekV3Config, Gemma3TextConfig, GPT2Config

from aldrift_hf import cli, selftest
from aldrift_hf.algorithm import diagnostics, losses, samplers
from aldrift_hf.algorithm.archive import Archive
from aldrift_hf.models import generation as proposals
from aldrift_hf.models import prior
from aldrift_hf.models import scoring as sequences
from aldrift_hf.selftest import checks, main, subjects, tiny
from aldrift_hf.selftest.exact import chain_law, chi_square_p
from aldrift_hf.selftest.options import Options
from aldrift_hf.toy import word_tokenizer
from aldrift_hf.types import Proposals, join_rungs

GPT2, LLAMA = selftest.FAMILIES
WITHOUT_RUNS = tuple(check for check in checks.CHECKS if check not in (checks.learning, checks.log_z, checks.archive))


@pytest.fixture(autouse=True)
def _quick_and_wide(monkeypatch):
    monkeypatch.setattr(subjects, "DRAWS", 1500)
    monkeypatch.setenv("COLUMNS", "120")


def verdicts(printed):
    return [line.split()[-1] for line in printed.splitlines() if line.rstrip().endswith(("pass", "FAIL"))]


# ---- Green ----------------------------------------------------------------------------------------------------------


def test_a_model_passes_as_it_is_and_as_a_tiny_one(tmp_path, capsys, monkeypatch):
    """Everything, whole runs included; and nothing is left in the folder of temporary files."""
    tiny_gpt2(n_positions=64, vocab_size=40).save_pretrained(tmp_path / "model")
    word_tokenizer(WORDS, " ").save_pretrained(tmp_path / "model")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    status = main(["--model_name_or_path", str(tmp_path / "model")])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "all checks pass" in printed
    assert f"torch {version('torch')}" in printed
    as_it_is, as_tiny = (verdicts(part) for part in printed.split("a tiny gpt2"))
    assert as_it_is == ["pass"] * len(checks.OF_ANY_MODEL)
    assert as_tiny == ["pass"] * len(checks.CHECKS)
    assert not list((tmp_path / "temporary").iterdir())


def test_llamas_family_passes(capsys, monkeypatch):
    monkeypatch.setattr(selftest, "FAMILIES", (LLAMA,))
    assert main([]) == 0
    assert verdicts(capsys.readouterr().out) == ["pass"] * len(checks.CHECKS)


@pytest.mark.parametrize("options", [["--dtype", "bfloat16"], ["--mixed_precision", "bf16"], ["--load_in_4bit"]])
def test_other_precisions_pass(options, capsys, monkeypatch):
    if "--load_in_4bit" in options:
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(selftest, "FAMILIES", (LLAMA,))
    monkeypatch.setattr(selftest, "CHECKS", WITHOUT_RUNS)
    assert main(options) == 0
    assert verdicts(capsys.readouterr().out) == ["pass"] * len(WITHOUT_RUNS)


# ---- Red ------------------------------------------------------------------------------------------------------------

draw, projected, join = proposals._draw, sequences.projected_logprobs, sequences.join
pad_left, log_z_increment = proposals._pad_left, diagnostics.log_z_increment
metropolis_hastings, maximum_likelihood = samplers.metropolis_hastings, losses.maximum_likelihood


def shifted(model, select, targets, **inputs):
    """The scorer reads the logits of the token itself."""
    return projected(model, lambda hidden: select(hidden.roll(-1, 1)), targets, **inputs)


def end_not_counted(prompts, completions, pad_token_id):
    rows = join(prompts, completions, pad_token_id)
    last = torch.tensor([len(prompt) + len(tokens) - 1 for prompt, tokens in zip(prompts, completions)])
    mask = rows.completion_mask.clone()
    mask[range(len(last)), last] &= torch.tensor([len(tokens) == 1 for tokens in completions])
    return rows._replace(completion_mask=mask)


def attending_to_padding(prompts, pad_token_id):
    input_ids, mask = pad_left(prompts, pad_token_id)
    return input_ids, torch.ones_like(mask)


@contextlib.contextmanager
def left_on(self, policy):
    yield prior.base_model(policy)


def hot(scores, numbers):
    """Drawn at a temperature of 0.9; `log q` is that of 1."""
    tokens, _ = draw(scores / 0.9, numbers)
    return tokens, scores.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def top(k):
    def truncated(scores, numbers):
        least = scores.topk(min(k, scores.shape[-1])).values[:, -1:]
        return draw(scores.masked_fill(scores < least, -math.inf), numbers)

    return truncated


def own_model_alone(self):
    """Each of the archive's draws weighed by the model that drew it."""
    own = [log_q[rung] for rung, log_q in enumerate(self.log_q)]
    return dataclasses.replace(join_rungs(self.rungs), log_model=torch.cat(own, dim=1))


BREAKS = {
    "scorer shifted by one token": (sequences, "projected_logprobs", shifted, "scores"),
    "last token not counted": (sequences, "join", end_not_counted, "probabilities"),
    "dropout left on": (torch.nn.Module, "eval", torch.nn.Module.train, "scores"),
    "padding attended to": (proposals, "_pad_left", attending_to_padding, "generation"),
    "adapter not turned off": (prior.AdapterOff, "active", left_on, "adapter_off"),
    "temperature": (proposals, "_draw", hot, "draws"),
    "top_k=3": (proposals, "_draw", top(3), "draws"),
    "top_k=50": (proposals, "_draw", top(50), "rare_tokens"),
    "no Hastings correction": (Proposals, "log_weight", Proposals.log_target, "corrected_draws"),
    "half the weight": (
        samplers,
        "metropolis_hastings",
        lambda log_weight, generator: metropolis_hastings(log_weight / 2, generator),
        "detailed_balance",
    ),
}
"""What is broken: where, how, and the check that goes red."""


@pytest.fixture
def subject(tmp_path):
    options = Options(device="cpu")
    options.folder = str(tmp_path)
    return subjects.tiny_subject(GPT2, options)


@pytest.mark.parametrize("broken", BREAKS)
def test_what_is_broken_goes_red(broken, subject, monkeypatch):
    module, name, defect, red = BREAKS[broken]
    monkeypatch.setattr(module, name, defect)
    assert not getattr(checks, red)(subject).passed


def test_runs_that_are_broken_go_red(subject, monkeypatch):
    """Runs that learn nothing, and add log Z up the wrong way round; then an archive's weights."""
    monkeypatch.setattr(losses, "maximum_likelihood", lambda *args, **kwargs: 0 * maximum_likelihood(*args, **kwargs))
    monkeypatch.setattr(diagnostics, "log_z_increment", lambda before, after: log_z_increment(after, before))
    assert not checks.learning(subject).passed
    assert not checks.log_z(subject).passed
    assert checks.archive(subject).passed, "until its weights are broken, too"
    monkeypatch.setattr(Archive, "mixture", own_model_alone)
    assert not checks.archive(subject).passed


def test_a_failure_names_the_remedy(monkeypatch, capsys):
    """Of a check that fails and of one that breaks; the others are still made."""

    def broken(subject):
        """nothing

        Do
        this.
        """
        raise RuntimeError("no kernel for this device\nand more")

    monkeypatch.setattr(proposals, "_draw", top(3))
    monkeypatch.setattr(selftest, "FAMILIES", (GPT2,))
    monkeypatch.setattr(selftest, "CHECKS", (broken, checks.draws, checks.adapter_off))
    assert main([]) == 1
    printed = capsys.readouterr().out
    assert verdicts(printed) == ["FAIL", "FAIL", "pass"]
    printed = " ".join(printed.split())
    assert "a tiny gpt2: broken: RuntimeError: no kernel for this device Do this." in printed
    assert "a tiny gpt2: draws: The model is not drawn from as it is scored: a temperature, a truncation" in printed
    assert "failed checks: 2" in printed


# ---- Options --------------------------------------------------------------------------------------------------------


def test_help_explains(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["selftest", "--help"])
    assert ended.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("usage: aldrift selftest", "--model_name_or_path", "detailed balance", "as a tiny model of its"):
        assert words in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "float8"], "--dtype: invalid choice: 'float8'"),
        (["--device", "abacus"], "--device abacus: there is none here; take "),
        (["--seed", "one"], "--seed: invalid int value: 'one'"),
        (["--mixed_precision", "fp16", "--device", "cpu"], "fp16 is for GPUs: on a CPU take bf16"),
        (["--model_name_or_path", "no/such-model"], "no/such-model"),
        (["--detype", "float32"], "there is no option --detype; did you mean --dtype?"),
    ],
)
def test_wrong_options_are_one_clear_line(options, message, capsys, monkeypatch):
    """Of the command, and of the module; before a model is made."""
    monkeypatch.setattr(selftest, "tiny_subject", None)
    monkeypatch.setattr(subjects, "tiny_model", None)
    monkeypatch.setattr(sys, "argv", ["selftest", *options])
    for run in (
        lambda: cli.main(["selftest", *options]),
        lambda: runpy.run_module("aldrift_hf.selftest", run_name="__main__"),
    ):
        with pytest.raises(SystemExit) as ended:
            run()
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("aldrift selftest: ")
        assert message in line


def test_the_commands_status_is_that_of_the_checks(monkeypatch):
    for status in (0, 1):
        monkeypatch.setattr(selftest, "main", lambda argv, status=status: status)
        with pytest.raises(SystemExit) as ended:
            cli.main(["selftest"])
        assert ended.value.code == status


# ---- Tiny models and exact laws -------------------------------------------------------------------------------------


def test_a_family_is_shrunk_to_one_layer_of_each_kind():
    assert tiny.tiny_model(Gemma3TextConfig(), 6, 0).config.layer_types == ["sliding_attention", "full_attention"]
    layers = tiny.tiny_model(DeepseekV3Config(), 6, 0).config.num_hidden_layers
    assert layers == DeepseekV3Config().first_k_dense_replace + 1, "a mixture of experts comes after dense layers"
    model = tiny.tiny_model(GPT2Config(), 6, 0)
    logits = model(input_ids=torch.randint(6, (64, 5))).logits
    assert logits.std(-1).mean().item() == pytest.approx(tiny.SPREAD, rel=0.3)
    with pytest.raises(tiny.NotShrunkError, match="no tiny model of type bart"):
        tiny.tiny_model(BartConfig(), 6, 0)


def test_p_values_are_right_where_most_events_are_rare():
    """1,500 draws from 781 events: as many p-values below 5 % as there should be, and none that is tiny."""
    generator = torch.Generator().manual_seed(0)
    p_values = []
    for _ in range(300):
        law = (2.3 * torch.randn(781, generator=generator, dtype=torch.float64)).softmax(0)
        draws = torch.multinomial(law, 1500, True, generator=generator)
        p_values.append(chi_square_p(draws.bincount(minlength=781), law))
    assert min(p_values) > 1e-5
    assert 4 < sum(p < 0.05 for p in p_values) < 28
    counts = torch.tensor([1000, 1040, 1])
    assert chi_square_p(counts, torch.tensor([0.5, 0.5, 0.0])) == 0.0
    exact, near = (chi_square_p(torch.tensor([5000, 5400]), torch.ones(2), ratio) for ratio in (1.0, 1.05))
    assert exact < 1e-3 < 0.1 < near


def test_the_law_of_a_chain():
    """Of two proposals by hand, and of many: the target."""
    log_q = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
    log_p = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    weight = (log_p - log_q).exp()
    q = log_q.exp()
    by_hand = [
        sum(q[s] * q[t] * min(1.0, weight[t] / weight[s]) for s in range(3) if s != t)
        + sum(q[t] * q[s] * (1 - min(1.0, weight[s] / weight[t])) for s in range(3) if s != t)
        + q[t] * q[t]
        for t in range(3)
    ]
    assert chain_law(log_p - log_q, log_q, 1).tolist() == pytest.approx(q.tolist())
    assert chain_law(log_p - log_q, log_q, 2).tolist() == pytest.approx([float(share) for share in by_hand])
    assert chain_law(log_p - log_q, log_q, 200).tolist() == pytest.approx(log_p.exp().tolist())
