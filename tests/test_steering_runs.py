"""Whole runs of the comparison of steering methods, with a small model: each is made once, and resumes."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny_gpt2
from evaluation import gold as golden
from evaluation import steering_run, steering_runs
from evaluation import steering_trainers as trainers
from evaluation.drawing_gold import GoldMaker
from evaluation.gold import Gold
from evaluation.steering_setting import LEARNING, METHODS, TUNED, Setting
from problems.steering import TASKS

from aldrift_hf.toy import word_tokenizer
from aldrift_hf.types import no_progress

WORDS = ["good", "bad", "amazing", "the", "dog", "beach"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small chat model, whose words VADER knows, and gold of it for three tasks."""
    folder = tmp_path_factory.mktemp("steering")
    tokenizer = word_tokenizer(WORDS, " ")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model = tiny_gpt2(vocab_size=len(tokenizer), n_positions=64)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    for name in ("tone", "keywords", "instruction"):
        maker = GoldMaker(TASKS[name](), model, tokenizer, 0)
        maker.make(folder / "gold" / f"{name}.json", 64, 64, no_progress)
    return folder


def command(place, out, *options):
    line = ["steer_text.py", "--model_name_or_path", str(place / "model"), "--gold_dir", str(place / "gold")]
    line += ["--output_dir", str(out), "--calls", "64", "--batch_size", "16", "--fresh_draws", "32"]
    return [*line, "--learning_rates", "1e-2", "--chain_length", "4", *options]


@pytest.fixture
def here(monkeypatch, no_report):
    """Runs happen in this process, and are counted."""
    made = []

    def process(command, stdout, stderr, env):
        monkeypatch.setattr(sys, "argv", command[2:])
        made.append(json.loads(command[3])["method"])
        status = 0
        try:
            steering_run.main()
        except SystemExit as ended:
            status = ended.code
        return type("Done", (), {"returncode": status})()

    monkeypatch.setattr(steering_runs.subprocess, "run", process)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("task", ["tone", "keywords", "instruction"])
def test_all_methods(recipe_module, monkeypatch, capsys, place, here, tmp_path, task):
    """Each method's run has its result, tables and figure show them, and none is run again."""
    recipe = recipe_module("steer_text")
    line = command(place, tmp_path, "--tasks", task, "--run", *METHODS)
    monkeypatch.setattr(sys, "argv", line)
    make, trainers_made = trainers.aldrift_trainer, []
    monkeypatch.setattr(trainers, "aldrift_trainer", lambda job: trainers_made.append(make(job)) or trainers_made[-1])
    recipe.main()
    out = capsys.readouterr().out
    assert here == [*METHODS]
    results = {run["setting"]["method"]: run for run in steering_runs.results(tmp_path, [task])}
    assert [*results] == [*METHODS]
    for method, run in results.items():
        if method == "defaults":  # chooses its rungs' size, and its budget leaves out draws that repeat
            assert 32 <= trainers_made[-1].objective_calls <= 64
            assert 32 <= run["calls"] == trainers_made[-1].record.rungs[-1]["proposals"]
        else:
            assert run["calls"] == (128 if method == "suffix_mh" and task != "tone" else 64), method
        assert run["cpu_seconds"] > 0
        assert run["peak_memory"] > 100
        assert 0 <= run["corrected_cost"] <= TASKS[task]().worst_cost
        assert ("kl" in run) == (method != "suffix_mh")
    for method in LEARNING:
        # With so few calls for 16 prompts, the defaults may find equal costs alone.
        assert results[method]["kl_prior"] > 1e-3 or (method == "defaults" and task != "tone"), method
        assert results[method]["log_z_lower"] < results[method]["log_z_upper"]
    exact = golden.kl_from_prior(*costs_of(place, task))
    assert results["rejection"]["kl"] == pytest.approx(exact.value)
    assert results["rejection"]["kl_prior"] == 0
    table = (tmp_path / "steer_text.md").read_text()
    assert "| expert_iteration, lr 0.01 |" in table
    assert "| defaults |" in table
    assert (tmp_path / "steer_text.png").stat().st_size > 10_000
    assert "figure and tables:" in out
    assert not [*tmp_path.glob("*/*/")], "what the runs needed on the way is gone"

    here.clear()
    monkeypatch.setattr(sys, "argv", line)
    recipe.main()
    assert here == []
    assert (tmp_path / "steer_text.md").read_text() == table
    monkeypatch.setattr(sys, "argv", [*line, "--keep", "0.5"])
    with pytest.raises(SystemExit, match="was made with another keep: choose another --output_dir"):
        recipe.main()


def costs_of(place, task):
    gold = Gold.read(place / "gold" / f"{task}.json")
    return gold.by_prompt(gold.cost), TASKS[task]().tau_max


def setting_of(place, method="aldrift", **changes):
    shared = {"batch_size": 16, "fresh_draws": 32, "gold_share": 1.0}
    return Setting("tone", method, 1e-2, 64, 0, str(place / "model"), **{**shared, **changes})


def measured(run):
    left_out = ("setting", "seconds", "cpu_seconds", "peak_memory")
    return {name: value for name, value in run.items() if name not in left_out}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "aldrift", "saves"), [("aldrift", {"num_rungs": 3}, 3), ("rloo", {}, 4)])
def test_a_killed_run_goes_on_from_its_checkpoint(place, tmp_path, monkeypatch, no_report, method, aldrift, saves):
    monkeypatch.setattr(trainers, "SAVE_STEPS", 1)
    setting, gold = setting_of(place, method, aldrift=aldrift), place / "gold"
    alone = steering_run.run(setting, tmp_path / "alone", gold)
    save, saved = trainers.TimeSpent.on_save, []

    def killed(self, *args, **kwargs):
        save(self, *args, **kwargs)
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainers.TimeSpent, "on_save", killed)
    with pytest.raises(KeyboardInterrupt):
        steering_run.run(setting, tmp_path / "parts", gold)
    path = setting.result(tmp_path / "parts")
    assert not path.exists()
    before = trainers.cpu_seconds_before(path.with_suffix(""))
    again = steering_run.run(setting, tmp_path / "parts", gold, keep_model=True)
    assert len(saved) == saves, "only what was left is learned"
    assert measured(again) == pytest.approx(measured(alone), nan_ok=True)
    assert again["cpu_seconds"] > before > 0
    assert (path.with_suffix("") / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_what_was_learned_is_not_learned_again(place, tmp_path, monkeypatch):
    setting, gold = setting_of(place, "dpg"), place / "gold"
    alone = steering_run.run(setting, tmp_path / "alone", gold)
    with monkeypatch.context() as patch:
        patch.delattr(steering_run, "of_draws")
        with pytest.raises(NameError):
            steering_run.run(setting, tmp_path / "parts", gold)
    monkeypatch.setitem(steering_run.LEARN, "dpg", pytest.fail)
    again = steering_run.run(setting, tmp_path / "parts", gold)
    assert measured(again) == pytest.approx(measured(alone))


@pytest.mark.slow
def test_what_was_learned_with_other_settings_is_refused(place, tmp_path, monkeypatch):
    setting, gold = setting_of(place, "dpg"), place / "gold"
    with monkeypatch.context() as patch:
        patch.delattr(steering_run, "of_draws")
        with pytest.raises(NameError):
            steering_run.run(setting, tmp_path, gold)
    with pytest.raises(ValueError, match=r"lr0\.01_calls64_seed0 was made with another batch_size"):
        steering_run.run(replace(setting, batch_size=8), tmp_path, gold)
    with pytest.raises(ValueError, match="another batch_size"):
        steering_runs.make([replace(setting, batch_size=8)], tmp_path, gold, False, pytest.fail)
    monkeypatch.setitem(steering_run.LEARN, "dpg", pytest.fail)
    steering_run.run(replace(setting, fresh_draws=16), tmp_path, gold)  # it is measured in another way alone


def test_runs_of_one_table_differ_in_learning_rate_and_seed_alone(place, tmp_path):
    setting = setting_of(place, "dpg")
    other = replace(setting, seed=1, learning_rate=1e-3)

    def keep(made):
        made.result(tmp_path).parent.mkdir(parents=True, exist_ok=True)
        made.result(tmp_path).write_text(json.dumps({"setting": made.identity()}))

    keep(setting)
    keep(other)
    assert len(steering_runs.results(tmp_path, ["tone"])) == 2
    keep(replace(other, gold_share=0.5))
    with pytest.raises(ValueError, match=r"dpg on tone with 64 calls differ in their gold_share"):
        steering_runs.results(tmp_path, ["tone"])
    setting.result(tmp_path).unlink()
    with pytest.raises(ValueError, match="differ in their gold_share"):
        steering_runs.make([setting], tmp_path, place / "gold", False, pytest.fail)


@pytest.mark.slow
def test_in_a_process_of_its_own(place, tmp_path):
    setting, told = setting_of(place, "rejection"), []
    assert not steering_runs.make([setting], tmp_path, place / "gold", False, told.append)
    assert [line.partition(":")[0] for line in told] == ["tone rejection_lr0.01_calls64_seed0"]
    (run,) = steering_runs.results(tmp_path, [*TASKS])
    assert run["setting"] == setting.identity()
    steering_runs.make([setting], tmp_path, place / "gold", False, told.append)
    assert len(told) == 1, "nothing was left to do"


def test_after_a_run_that_fails_the_others_are_made(place, tmp_path, monkeypatch):
    """As when the kernel kills it: each is told with the file that has its output."""
    settings, told = [setting_of(place), setting_of(place, "dpg")], []

    def killed(command, stdout, stderr, env):
        assert env["OMP_NUM_THREADS"] == "1"
        print("Loading", file=stdout)
        return type("Done", (), {"returncode": -9})()

    monkeypatch.setattr(steering_runs.subprocess, "run", killed)
    failures = steering_runs.make(settings, tmp_path, place / "gold", False, told.append)
    assert failures == told
    assert len(told) == 2
    name, log = told[0].split(": ended with -9: see ")
    assert name == "tone aldrift_lr0.01_calls64_seed0"
    assert Path(log).read_text() == "Loading\n"


def test_two_processes_never_make_the_same_run(place, here, tmp_path, monkeypatch):
    setting, told = setting_of(place, "rejection"), []
    path = setting.result(tmp_path)
    path.with_suffix("").mkdir(parents=True)
    with steering_run.FileLock(path.with_suffix("") / "lock"):
        assert not steering_runs.make([setting], tmp_path, place / "gold", False, told.append)
    assert told == ["tone rejection_lr0.01_calls64_seed0: another process is at it"]
    assert not path.exists()


def test_gold_of_another_prior_is_refused(place, tmp_path):
    setting = setting_of(place, "rejection")
    gold = Gold.read(place / "gold" / "tone.json")
    replace(gold, log_prior=[value - 1 for value in gold.log_prior]).write(tmp_path / "tone.json")
    with pytest.raises(ValueError, match=r"gold of tone is of another prior than .*--make_gold"):
        steering_run.run(setting, tmp_path / "out", tmp_path)


def test_settings_of_aldrift_have_rows_of_their_own():
    plain = Setting("tone", "aldrift", 1e-4, 64, 0, "somewhere")
    other = replace(plain, aldrift={"loss_type": "nll", "num_rungs": 8})
    assert plain.result(Path("out")) == Path("out/tone/aldrift_lr0.0001_calls64_seed0.json")
    assert other.result(Path("out")).name == "aldrift,loss_type=nll,num_rungs=8_lr0.0001_calls64_seed0.json"
    own, adapter = {"num_rungs": 8}, {"r": 4}
    made = [*steering_runs.grid(METHODS, ["tone"], [1e-4, 2e-4], [64], [0, 1], own, adapter, model="somewhere")]
    assert len(made) == 2 * (2 * len(TUNED) + 3)
    assert all(bool(setting.learning_rate) == (setting.method in TUNED) for setting in made)
    assert {setting.seed for setting in made[: len(made) // 2]} == {0}
    assert all(bool(setting.aldrift) == (setting.method == "aldrift") for setting in made)
    assert all(bool(setting.lora) == (setting.method in LEARNING) for setting in made)
    assert replace(plain, lora={"r": 4, "lora_bias": True}).label == "aldrift lora_r=4 lora_bias=True"


def test_the_adapter_of_all_methods_can_be_set():
    setting = Setting("tone", "rloo", 1e-4, 64, 0, "somewhere", lora={"r": 2, "lora_bias": True})
    job = trainers.Job(setting, TASKS["tone"](), tiny_gpt2(), None, Path("out"))
    assert (job.lora.r, job.lora.lora_bias, job.lora.lora_alpha, job.lora.target_modules) == (2, True, 32, "all-linear")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run", "ppo"], "--run ppo: choose from aldrift, rloo"),
        (["--calls", "100"], "--calls must be multiples of --batch_size 32, and at least two of them"),
        (["--calls", "32"], "at least two of them"),
        (["--learning_rates", "0"], "--learning_rates must be above 0"),
        (["--keep", "1.5"], "--keep must be a share"),
        (["--gold_share", "0.5"], "--gold_share must be from 0.9 to 1"),
        (["--chain_length", "0"], "--chain_length must be at least 1"),
        (["--aldrift", "nll"], "--aldrift nll: write settings as NAME=VALUE"),
        (["--lora", "r"], "--lora r: write settings as NAME=VALUE"),
    ],
)
def test_bad_options_are_one_clear_line(recipe_module, monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["steer_text.py", *options])
    with pytest.raises(SystemExit, match=message):
        recipe_module("steer_text").main()


def test_values_on_the_command_line(recipe_module):
    named = recipe_module("steer_text").named
    given = ["loss_type=nll", "tau_step=1e-1", "num_rungs=8", "pareto_smoothing=true", "ladder=adaptive"]
    assert named(["r=1", "target_modules=[o_proj,down_proj]"]) == {"r": 1, "target_modules": ["o_proj", "down_proj"]}
    assert named(given) == {
        "loss_type": "nll",
        "tau_step": 0.1,
        "num_rungs": 8,
        "pareto_smoothing": True,
        "ladder": "adaptive",
    }
