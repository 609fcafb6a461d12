"""The self-test that ships with the package: passes here, fails where something is broken, explains its options."""

import contextlib
import dataclasses
import math
import runpy
import sys
import types
from importlib.metadata import version

import pytest
import torch
from conftest import WORDS, tiny_gpt2
from own_parts import draws_of
from peft import IA3Config, get_peft_model
from transformers import AutoModelForCausalLM, BartConfig, DeepseekV3Config, Gemma3TextConfig, GPT2Config

from aldrift_hf import MaximumLikelihood, MetropolisHastings, cli, selftest
from aldrift_hf.algorithm.samplers.kernels import isir, metropolis_hastings
from aldrift_hf.models.generation import generate
from aldrift_hf.models.prior import base_model
from aldrift_hf.models.scoring import sequence_logprobs
from aldrift_hf.models.shared_prompts.cache import SharedPrompts
from aldrift_hf.selftest import checks, subjects, tiny
from aldrift_hf.selftest.exact import chain_law, chi_square_p
from aldrift_hf.selftest.options import Options
from aldrift_hf.toy import word_tokenizer
from aldrift_hf.types import join_rungs

GPT2, LLAMA = selftest.FAMILIES
WITHOUT_RUNS = tuple(check for check in checks.CHECKS if check not in (checks.learning, checks.log_z, checks.archive))
FEWER_DRAWS = 1500


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


def verdicts(printed):
    return [line.split()[-1] for line in printed.splitlines() if line.rstrip().endswith(("pass", "FAIL"))]


# ---- Passing --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_passes_as_it_is_and_as_a_tiny_one(tmp_path, capsys, monkeypatch):
    """All checks, including whole runs; and no temporary file is left behind."""
    tiny_gpt2(n_positions=64, vocab_size=40).save_pretrained(tmp_path / "model")
    word_tokenizer(WORDS, " ").save_pretrained(tmp_path / "model")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    status = selftest.main(["--model_name_or_path", str(tmp_path / "model")])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "all checks pass" in printed
    assert f"torch {version('torch')}" in printed
    as_it_is, as_tiny = (verdicts(part) for part in printed.split("a tiny gpt2"))
    assert as_it_is == ["pass"] * len(checks.CHECKS_OF_ANY_MODEL)
    assert as_tiny == ["pass"] * len(checks.CHECKS)
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.slow
def test_llamas_family_passes(capsys):
    assert selftest.run(Options(), families=[LLAMA], num_draws=FEWER_DRAWS) == 0
    assert verdicts(capsys.readouterr().out) == ["pass"] * len(checks.CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "adapter_dtype": "bfloat16"},
        {"mixed_precision": "bf16"},
        {"load_in_4bit": True},
    ],
)
def test_other_precisions_pass(options, capsys):
    if "load_in_4bit" in options:
        pytest.importorskip("bitsandbytes")
    assert selftest.run(Options(**options), families=[LLAMA], checks=WITHOUT_RUNS, num_draws=FEWER_DRAWS) == 0
    assert verdicts(capsys.readouterr().out) == ["pass"] * len(WITHOUT_RUNS)


def test_the_adapter_has_the_precision_asked_for(tmp_path):
    options = Options(adapter_dtype="bfloat16")
    options.folder = str(tmp_path)
    policy = subjects.tiny_subject(LLAMA, options).trainer.rollout.policy()
    trained = {parameter.dtype for parameter in policy.parameters() if parameter.requires_grad}
    frozen = {parameter.dtype for parameter in policy.parameters() if not parameter.requires_grad}
    assert (trained, frozen) == ({torch.bfloat16}, {torch.float32})


@pytest.mark.parametrize(
    ("options", "coarsest"),
    [
        ({}, "float32"),
        ({"adapter_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16", "adapter_dtype": "float32"}, "bfloat16"),
        ({"mixed_precision": "bf16", "adapter_dtype": "float16"}, "bfloat16"),
    ],
)
def test_bounds_are_for_the_coarsest_products(options, coarsest):
    assert Options(**options).computes_in == coarsest


# ---- Failing --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def changed(module, output=None, inputs=None):
    """Within the block, a module's output or its keyword arguments are changed by these functions."""
    hooks = []
    if output is not None:
        hooks.append(module.register_forward_hook(lambda module, args, result: output(result)))
    if inputs is not None:
        hooks.append(
            module.register_forward_pre_hook(lambda module, args, kwargs: (args, inputs(kwargs)), with_kwargs=True)
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def shifted(model, *args, **kwargs):
    """The scorer reads the logits of the token itself."""

    def roll(result):
        result.last_hidden_state = result.last_hidden_state.roll(-1, 1)
        return result

    with changed(model.base_model, roll):
        return sequence_logprobs(model, *args, **kwargs)


def last_not_counted(model, prompts, completions, **kwargs):
    shorter = completions._replace(length=(completions.length - 1).clamp(min=1))
    return sequence_logprobs(model, prompts, shorter, **kwargs)


def with_dropout(model, *args, **kwargs):
    model.train()
    try:
        return sequence_logprobs(model, *args, **kwargs)
    finally:
        model.eval()


def attending_to_padding(model, *args):
    def attend(kwargs):
        return kwargs | {"attention_mask": torch.ones_like(kwargs["attention_mask"])}

    with changed(model, inputs=attend):
        return generate(model, *args)


def drawing_from(change):
    """Generation from changed logits, with `log q` of those of the model."""

    def draw(model, prompts, *args):
        def logits_changed(result):
            result.logits = change(result.logits)
            return result

        with changed(model, logits_changed):
            draws = generate(model, prompts, *args)
        scored = sequence_logprobs(model, prompts, draws.completions, pad_token_id=tiny.END, batch_size=4096)
        return draws_of(draws.completions, scored)

    return draw


def top(k):
    def truncated(logits):
        least = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
        return logits.masked_fill(logits < least, -math.inf)

    return drawing_from(truncated)


class LeftOn:
    """A prior that leaves the adapter on."""

    @contextlib.contextmanager
    def active(self, policy):
        yield base_model(policy)


def leave_adapter_on(subject):
    subject.trainer.rollout.prior = LeftOn()


def ignore_the_model(subject):
    """Weights without `log q`: no Hastings correction."""
    rollout = subject.trainer.rollout
    propose = rollout.propose

    def without_log_q(*args):
        proposals = propose(*args)
        return dataclasses.replace(proposals, log_model=torch.zeros_like(proposals.log_model))

    rollout.propose = without_log_q


def half_the_weight(log_weight, generator):
    return metropolis_hastings(log_weight / 2, generator)


BREAKS = {
    "scorer shifted by one token": (lambda subject: setattr(subject, "score", shifted), "scores"),
    "last token not counted": (lambda subject: setattr(subject, "score", last_not_counted), "probabilities"),
    "dropout left on": (lambda subject: setattr(subject, "score", with_dropout), "scores"),
    "padding attended to": (lambda subject: setattr(subject, "generate", attending_to_padding), "generation"),
    "adapter not turned off": (leave_adapter_on, "adapter_off"),
    "temperature": (lambda subject: setattr(subject, "generate", drawing_from(lambda x: x / 0.9)), "draws"),
    "top_k=3": (lambda subject: setattr(subject, "generate", top(3)), "draws"),
    "top_k=50": (lambda subject: setattr(subject, "generate", top(50)), "rare_tokens"),
    "no Hastings correction": (ignore_the_model, "corrected_draws"),
}
"""What is broken: how, and the check that fails."""


def padding_of_shared_prompts(monkeypatch):
    arrange = SharedPrompts._arrange

    def without_padding(cache, prompt_of):
        cache._padding = torch.zeros_like(cache._padding)
        arrange(cache, prompt_of)

    monkeypatch.setattr(SharedPrompts, "_arrange", without_padding)


def scale_of_shared_prompts(monkeypatch):
    attend = SharedPrompts.attend
    monkeypatch.setattr(
        SharedPrompts, "attend", lambda cache, layer, query, *rest: attend(cache, layer, query / 2, *rest)
    )


@pytest.mark.parametrize("broken", [padding_of_shared_prompts, scale_of_shared_prompts])
def test_prompts_that_are_computed_once_are_seen(broken, subject, monkeypatch):
    """Those of most runs are longer than the tiny models' own."""
    assert checks.generation(subject).passed
    broken(monkeypatch)
    assert not checks.generation(subject).passed


@pytest.mark.slow
def test_the_tokenizer_of_another_language(tmp_path):
    """It reads the English text as a handful of tokens, or as one."""
    tiny_gpt2(n_positions=64, vocab_size=6).save_pretrained(tmp_path / "model")
    word_tokenizer(list("ACGT"), "").save_pretrained(tmp_path / "model")
    options = Options(device="cpu")
    options.folder = str(tmp_path)
    whole = subjects.whole_subject(str(tmp_path / "model"), options)
    assert all(check(whole).passed for check in checks.CHECKS_OF_ANY_MODEL)


@pytest.mark.slow
def test_adapters_of_other_kinds(tmp_path):
    tiny_gpt2(n_positions=64, vocab_size=40).save_pretrained(tmp_path / "model")
    word_tokenizer(WORDS, " ").save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    kinds = IA3Config(task_type="CAUSAL_LM", target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True)
    get_peft_model(model, kinds).save_pretrained(tmp_path / "adapter")
    word_tokenizer(WORDS, " ").save_pretrained(tmp_path / "adapter")
    options = Options(device="cpu")
    options.folder = str(tmp_path)
    whole = subjects.whole_subject(str(tmp_path / "adapter"), options)
    assert all(check(whole).passed for check in checks.CHECKS_OF_ANY_MODEL)


def test_a_model_of_nan_is_called_so(tmp_path):
    model = tiny_gpt2(n_positions=64, vocab_size=40)
    model.transformer.ln_f.bias.data.fill_(math.nan)
    model.save_pretrained(tmp_path / "model")
    word_tokenizer(WORDS, " ").save_pretrained(tmp_path / "model")
    options = Options(device="cpu")
    options.folder = str(tmp_path)
    with pytest.raises(ValueError, match=r"log-probabilities are NaN: its weights are damaged, or it overflows"):
        subjects.whole_subject(str(tmp_path / "model"), options)


@pytest.fixture
def subject(tmp_path):
    options = Options(device="cpu")
    options.folder = str(tmp_path)
    return subjects.tiny_subject(GPT2, options, FEWER_DRAWS)


@pytest.mark.slow
@pytest.mark.parametrize("broken", BREAKS)
def test_what_is_broken_fails(broken, subject):
    defect, failing = BREAKS[broken]
    defect(subject)
    assert not getattr(checks, failing)(subject).passed


def test_a_broken_kernel_fails(subject):
    assert checks.detailed_balance(subject, [metropolis_hastings, isir]).passed
    assert not checks.detailed_balance(subject, [half_the_weight, isir]).passed


@pytest.mark.parametrize("lost", ["metropolis_hastings", "archive"])
def test_nan_of_one_run_fails(lost, monkeypatch):
    """Whichever it is: Python's max() keeps a NaN in the first place alone."""
    log_target = torch.tensor([[0.0, -1.0, -2.0]]).double()
    exact = log_target.logsumexp(-1).mean().item()
    runs = {}
    for name in ("metropolis_hastings", "archive"):
        log_z = math.nan if name == lost else exact
        record = types.SimpleNamespace(log_z=[log_z], metrics={"log_z": log_z})
        law = log_target.log_softmax(-1) * (math.nan if name == lost else 1.0)
        runs[name] = types.SimpleNamespace(record=record, law=law)
    monkeypatch.setattr(checks, "policy_scores", lambda run, completions: run.law)
    uniform = torch.full_like(log_target, 1 / 3).log()
    subject = types.SimpleNamespace(log_target=log_target, before=uniform, prompts=[0], runs=runs, completions=None)
    assert not checks.log_z(subject).passed
    assert not checks.learning(subject).passed


class Nothing(MaximumLikelihood):
    """A loss without a gradient."""

    def __call__(self, log_probs, num_tokens, **columns):
        return 0 * super().__call__(log_probs, num_tokens, **columns)


class WrongWay(MetropolisHastings):
    """Subtracts the increments of log Z instead of adding them."""

    def log_z(self, pool, state, tau):
        return 2 * state.log_z - super().log_z(pool, state, tau)


def own_model_alone(group):
    """Each draw of the archive weighted by the model that drew it, instead of the mixture."""
    return join_rungs([entry.proposals for entry in group])


@pytest.mark.slow
def test_runs_that_are_broken_fail(subject, monkeypatch):
    """Runs that learn nothing and add log Z up the wrong way; then an archive's weights."""
    parts = {"metropolis_hastings": {"sampler": WrongWay(256), "loss": Nothing()}, "archive": {}}
    subject.runs = {
        sampler: subject.make(sampler=sampler, parts=broken, **subjects.RUN) for sampler, broken in parts.items()
    }
    for trainer in subject.runs.values():
        trainer.train()
    assert isinstance(subject.runs["metropolis_hastings"].sampler, WrongWay)
    assert not checks.learning(subject).passed
    assert not checks.log_z(subject).passed
    assert checks.archive(subject).passed, "until its weights are broken, too"
    monkeypatch.setattr(checks, "mixture", own_model_alone)
    assert not checks.archive(subject).passed


@pytest.mark.slow
def test_a_failure_names_the_remedy(capsys):
    """Of a check that fails and of one that raises; the others are still made."""

    def broken(subject):
        """nothing

        Do
        this.
        """
        raise RuntimeError("no kernel for this device\nand more")

    def draws(subject):
        subject.generate = top(3)
        return checks.draws(subject)

    draws.__doc__ = checks.draws.__doc__
    status = selftest.run(Options(), [GPT2], (broken, draws, checks.adapter_off), FEWER_DRAWS)
    assert status == 1
    printed = capsys.readouterr().out
    assert verdicts(printed) == ["FAIL", "FAIL", "pass"]
    printed = " ".join(printed.split())
    assert "a tiny gpt2: broken: RuntimeError: no kernel for this device Do this." in printed
    assert "a tiny gpt2: draws: The model is drawn from with other probabilities than it is scored with" in printed
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
        (["--device", "abacus"], "--device abacus: this machine has none; use "),
        (["--seed", "one"], "--seed: invalid int value: 'one'"),
        (["--seed", "-1"], "--seed must be from 0 to 4,294,967,295"),
        (["--mixed_precision", "fp16", "--device", "cpu"], "fp16 needs a GPU: on a CPU use bf16"),
        (["--mixed_precision", "fp16", "--adapter_dtype", "float16"], "needs --adapter_dtype float32"),
        (["--model_name_or_path", "no/such-model"], "no/such-model"),
        (["--detype", "float32"], "there is no option --detype; did you mean --dtype?"),
    ],
)
def test_wrong_options_are_one_clear_line(options, message, capsys, monkeypatch):
    """Of the command, and of the module; before a model is made."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
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
    assert cli.COMMANDS["selftest"][0] == "..selftest"
    for status in (0, 1):
        stand_in = types.ModuleType("stand_in")
        stand_in.main = lambda argv, status=status: status if argv == ["--seed", "1"] else None
        monkeypatch.setitem(sys.modules, "stand_in", stand_in)
        monkeypatch.setitem(cli.COMMANDS, "selftest", ("stand_in", ""))
        with pytest.raises(SystemExit) if status else contextlib.nullcontext() as ended:
            cli.main(["selftest", "--seed", "1"])
        assert (ended.value.code if status else 0) == status


# ---- Tiny models and exact laws -------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", ["positions", "width", "few positions"])
def test_settings_with_the_same_number_are_told_apart(same):
    sizes = {"vocab_size": 256, "n_embd": 64, "n_positions": 512} | {
        "positions": {"n_positions": 256},
        "width": {"n_embd": 256},
        "few positions": {"n_positions": 8},
    }[same]
    small = tiny.tiny_model(GPT2Config(**sizes, n_head=4), 6, 0).config
    assert (small.vocab_size, small.n_embd) == (6, tiny.HEADS * tiny.HEAD_DIMS[0])
    assert small.n_positions >= tiny.MIN_POSITIONS


@pytest.mark.slow
def test_a_family_is_shrunk_to_one_layer_of_each_kind():
    assert tiny.tiny_model(Gemma3TextConfig(), 6, 0).config.layer_types == ["sliding_attention", "full_attention"]
    layers = tiny.tiny_model(DeepseekV3Config(), 6, 0).config.num_hidden_layers
    assert layers == DeepseekV3Config().first_k_dense_replace + 1, "a mixture of experts comes after dense layers"
    model = tiny.tiny_model(GPT2Config(), 6, 0)
    logits = model(input_ids=torch.randint(6, (64, 5))).logits
    assert logits.std(-1).mean().item() == pytest.approx(tiny.LOGITS_STD, rel=0.3)
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


def test_p_values_have_one_degree_of_freedom_less_than_cells():
    assert chi_square_p(torch.tensor([60, 40]), torch.tensor([0.5, 0.5])) == pytest.approx(0.0455, abs=1e-4)
