"""Any command line and any file of options either gives a trainer, or one line that says what is wrong."""

import contextlib
import io
import sys

import hypothesis.strategies as st
import pytest
import yaml
from conftest import WORDS, count_a, fuzz, lora_config, tiny_gpt2
from hypothesis import given

from aldrift_hf import ALDRIFTConfig, ALDRIFTTrainer, cli, selftest
from aldrift_hf.cli import report, task
from aldrift_hf.reporting.record import RunRecord
from aldrift_hf.reporting.writers import ReportWriter
from aldrift_hf.toy import word_tokenizer

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=8), st.dates(),
    st.sampled_from([10**400, "1e-3", "linear", "[", "{", "\0", "no", "\ud7ff", ".inf"]),
)  # fmt: skip
KEYS = st.sampled_from(
    [
        *("objective", "dataset_name", "model_name_or_path", "output_dir", "tau_max", "num_generations", "ladder"),
        *("env", "objective_weights", "model_init_kwargs", "lr_scheduler_kwargs", "bf16", "report_to", "seed"),
        *("config", "lora_target_modules", "use_peft", "tua_max", "load_in_4bit", "dtype", "num_samples", "optim"),
        "--tau_max",
    ]
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))
SNIPPETS = [
    *("!!python/object/apply:os.system ['exit 1']", "!!binary aGk=", "!!set {a, b}", "!unknown 1", "&a [*a]"),
    *("tau_max: 1\ntau_max: 2", "? [a]\n: 1", "\ttau_max: 1", "- a", "tau_max: [", "a: &x {b: *x}", "%YAML 9.9\n---"),
    *("tau_max: 1\n---\ntau_max: 2", "1: 2", "null: 1", "{a: {b: c}}: 1", "env: 3", "env: {A: [1]}", "\0", "\ufeff"),
    *("tau_max: 1_0", "tau_max: 0x10", "tau_max: 1:30", "seed: 9999999999999999999999", "<<: 3", "2001-01-01: 1"),
]
YAML = st.one_of(
    st.binary(max_size=30),
    st.text(max_size=30).map(lambda text: text.encode(errors="surrogatepass")),
    st.lists(st.sampled_from(SNIPPETS), max_size=3).map(lambda lines: "\n".join(lines).encode()),
    st.dictionaries(KEYS, VALUES, max_size=4).map(lambda tree: yaml.safe_dump(tree).encode()),
    VALUES.map(lambda tree: yaml.safe_dump(tree).encode()),
)
OPTIONS = [
    *("--config", "--objective", "--model_name_or_path", "--dataset_name", "--tau_max", "--num_generations", "--bf16"),
    *("-n", "--help", "-h", "--", "-", "--tua_max", "--objective_weights", "--model_init_kwargs", "--no_use_peft"),
    *("--seed", "--output_dir", "--num_samples", "--correction", "--lr_scheduler_kwargs", "--tau_max=1", "--tau_max="),
    *("--=", "-1"),
    *("costs:cost", "costs.py:cost", "costs:", ":", "os:", "os.path:join", ".:x", "..:x", "", " ", "model", "empty"),
    *(
        "1",
        "nan",
        "1e400",
        "{",
        "{}",
        '{"a": 1}',
        "[]",
        "no/such",
        "a.jsonl",
        "/dev/null",
        "\0",
        "é",
        "\ud800",
        "@file",
    ),
]
ARGV = st.lists(st.sampled_from(OPTIONS) | st.text(max_size=6), max_size=6)


class MadeError(Exception):
    """The options gave a trainer."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder; the folder of its model is empty."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "costs.py").write_text("def cost(prompts, completions):\n    return [0.0] * len(completions)\n")
    (folder / "model").mkdir()
    (folder / "empty").mkdir()
    args = ALDRIFTConfig(
        **{"output_dir": str(folder / "run"), "num_generations": 4, "chain_length": 2, "max_completion_length": 2},
        **{"objective_range": 3.0, "num_rungs": 1, "disable_tqdm": True, "save_strategy": "no"},
        sampler="metropolis_hastings",
    )
    model, tokenizer = tiny_gpt2(), word_tokenizer(WORDS, " ")
    trainer = ALDRIFTTrainer(model, count_a, args, processing_class=tokenizer, peft_config=lora_config(model))
    trainer.remove_callback(ReportWriter)
    trainer.train()
    (folder / "run" / "run.yaml").write_text("objective: [costs:cost]\nmodel_name_or_path: model\n")
    return folder / "run"


def ends(run, argv):
    """A command prints one line and no traceback, or makes its trainer."""

    def made(*args, **kwargs):
        raise MadeError

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(run.parent)
        patch.setattr(selftest, "run", lambda options: 0)
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(task, "ALDRIFTTrainer", made)
        patch.setattr(report, "write_report", lambda *args: None)
        try:
            cli.main(argv)
            code: object = 0
        except MadeError:
            code = 0
        except SystemExit as stop:
            code = stop.code
    if code:
        message = code if isinstance(code, str) else err.getvalue()
        assert isinstance(code, str) or code == 2
        assert len(message.strip().splitlines()) == 1 or "usage" in out.getvalue(), message


@pytest.mark.slow
@fuzz(examples=120)
@given(YAML)
def test_any_file_of_options(run, content):
    path = run.parent / "options.yaml"
    path.write_bytes(content)
    ends(run, ["train", "--objective", "costs:cost", "--model_name_or_path", "model", "--config", "options.yaml"])


def test_paths_without_a_file_of_options(run):
    for name in ("empty", "/proc/self/mem", "x" * 300, "no.yaml", ""):
        ends(run, ["train", "--objective", "costs:cost", "--config", name])


@fuzz(examples=120)
@given(st.sampled_from([*cli.COMMANDS, "report", "trian", "", "-h"]), ARGV)
def test_any_command_line(run, command, argv):
    ends(run, [command, *argv])


@pytest.mark.slow
@fuzz(examples=60)
@given(st.sampled_from(["sample", "evaluate"]), YAML)
def test_any_options_of_a_run(run, command, content):
    kept = (run / "run.yaml").read_bytes()
    (run / "run.yaml").write_bytes(content)
    try:
        ends(run, [command, "run", "--objective", "costs:cost"])
    finally:
        (run / "run.yaml").write_bytes(kept)


@pytest.mark.slow
@fuzz(examples=200)
@given(
    st.sampled_from(["run.json", "rungs.jsonl", "draws.jsonl"]),
    st.integers(0, 3000),
    st.integers(0, 40),
    st.binary(max_size=4) | st.sampled_from([b"null", b"{}", b"[]", b"3", b'"a"', b"NaN", b"\n", b"\n\n", b"}"]),
    st.booleans(),
)
def test_any_damage_to_a_record(run, name, start, cut, put, alone):
    path = run / name
    kept = path.read_bytes()
    path.write_bytes(put if alone else kept[:start] + put + kept[start + cut :])
    try:
        with contextlib.suppress(ValueError):
            RunRecord.read(run)
        ends(run, ["report", "run"])
    finally:
        path.write_bytes(kept)
