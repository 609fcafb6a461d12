"""The trainer as its users meet it: what it refuses, what it logs, what it leaves behind."""

import copy
import json
import os

import pytest
import torch
from conftest import (
    EOS,
    ALDRIFTTrainer,
    count_a,
    every_completion,
    exact_kl,
    log_probs,
    lora_config,
    pool_of,
    tiny_gpt2,
    tiny_llama,
)
from datasets import Dataset
from transformers import AutoTokenizer, GPT2LMHeadModel, TrainerCallback

from aldrift_hf import ALDRIFTConfig, RunCallback
from aldrift_hf.algorithm.samplers import Selection
from aldrift_hf.models.engines import transformers as engine
from aldrift_hf.models.prior import base_model
from aldrift_hf.trainer import rollout
from aldrift_hf.trainer.evaluation import CorrectedDraws

pytestmark = pytest.mark.versions

RECORD = {
    "rung", "tau", "objective_mean", "objective_best", "success", "acceptance_rate", "ess", "khat", "log_z_increment",
    "log_z", "missing_mass", "distinct_proposals", "distinct_samples", "loss", "proposals", "objective_calls",
    "seconds_propose", "seconds_score", "seconds_objective", "seconds_learn",
}  # fmt: skip


@pytest.fixture
def make(config, tokenizer):
    """A trainer of a tiny LoRA model; `settings` go to the config, the rest to the trainer."""

    def build(objective=count_a, settings=None, **kwargs):
        model = kwargs.pop("model", None) or tiny_gpt2()
        kwargs.setdefault("processing_class", tokenizer)
        kwargs.setdefault("peft_config", lora_config(model) if not isinstance(model, str) else None)
        return ALDRIFTTrainer(model, objective, config(**(settings or {})), **kwargs)

    return build


def rungs(trainer):
    with open(os.path.join(trainer.args.output_dir, "rungs.jsonl")) as file:
        return [json.loads(line) for line in file]


# ---- Learning -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", [tiny_gpt2, tiny_llama])
def test_training_brings_the_model_closer_to_the_target(make, family):
    model = family()
    log_prior = log_probs(model, [EOS], every_completion())
    trainer = make(model=model, settings={"num_generations": 1024, "chain_length": 8, "updates_per_rung": 16})
    cost = torch.tensor(count_a([], trainer.rollout.decode(every_completion())), dtype=torch.float64)
    log_p = (log_prior - 1.5 * cost).log_softmax(0)
    before = exact_kl(log_p, trainer.model)
    trainer.train()
    assert exact_kl(log_p, trainer.model) < 0.35 * before


@pytest.mark.slow
def test_the_ladder_and_its_records(make):
    trainer = make(settings={"tau_step": 0.4})
    result = trainer.train()
    records = rungs(trainer)
    assert [record["tau"] for record in records] == pytest.approx([0.4, 0.8, 1.2, 1.5])
    assert records[-1]["tau"] == 1.5
    logged = [log for log in trainer.state.log_history if "rung" in log]
    assert len(logged) == len(records) == trainer.state.epoch
    for record, log in zip(records, logged):
        assert set(record) >= RECORD
        assert {key: log[key] for key in record if record[key] is not None} == {
            key: value for key, value in record.items() if value is not None
        }
    assert [record["proposals"] for record in records] == [64, 128, 192, 256]
    calls = [record["objective_calls"] for record in records]
    assert calls == sorted(calls)
    assert calls[-1] < 85 + 1, "there are only 85 token sequences, and fewer texts"
    assert records[0]["missing_mass"] == pytest.approx(0, abs=1e-6), "the first rung draws from the prior itself"
    assert {"final_objective", "final_success", "final_ess", "final_missing_mass"} <= set(result.metrics)


@pytest.mark.slow
def test_a_success_is_a_draw_that_costs_at_most_the_threshold(make):
    """Whatever the lowest cost seen: a cost of 1 does not count as success because none is lower."""
    dear = {"objective_range": 4.0, "num_rungs": 1}

    def dear_words(prompts, completions):
        return [1 + cost for cost in count_a(prompts, completions)]

    shares = []
    for threshold in (0.0, 1.0, 2.0, 4.0):
        trainer = make(dear_words, {**dear, "success_threshold": threshold})
        trainer.train()
        shares.append(rungs(trainer)[0]["success"])
    assert shares[0] == 0 < shares[1] < shares[2] < shares[3] == 1


@pytest.mark.slow
def test_the_papers_settings_are_the_ladder_of_one_over_d_and_m_squared_steps(make):
    trainer = make(settings={"tau_step": None, "objective_range": 3.0, "num_generations": 64, "chain_length": None})
    trainer.train()
    assert [record["tau"] for record in rungs(trainer)] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 1.5])
    assert rungs(trainer)[0]["proposals"] == 4 * 16


@pytest.mark.slow
def test_without_a_range_it_is_the_worst_cost_of_the_priors_draws(make):
    trainer = make(settings={"objective_range": None, "tau_step": None, "num_rungs": 5})
    trainer.train()
    assert trainer.record.objective_range == 3.0
    assert rungs(trainer)[0]["proposals"] == 64, "the draws that measured the range are the first rung's"
    known = make(settings={"objective_range": 3.0, "tau_step": None, "num_rungs": 5})
    known.train()
    for ours, theirs in zip(trainer.model.parameters(), known.model.parameters()):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_training_leaves_the_settings_as_they_are(make, config):
    """One `args` for two trainers: the second climbs its own ladder, with its own schedule."""
    settings = {"num_generations": 16, "tau_step": None, "lr_scheduler_type": "warmup_stable_decay"}
    args = config(**settings)
    before = copy.deepcopy(args.to_dict())
    short = ALDRIFTTrainer(tiny_gpt2(), count_a, args, processing_class=make().processing_class)
    short.train()
    assert args.to_dict() == before
    args.tau_max, args.num_rungs = 0.5, 2
    again = ALDRIFTTrainer(tiny_gpt2(), count_a, args, processing_class=short.processing_class)
    again.train()
    assert [rung["tau"] for rung in short.record.rungs] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 1.5])
    assert [rung["tau"] for rung in again.record.rungs] == pytest.approx([1 / 3, 0.5])
    assert again.state.max_steps == 8
    assert again.optimizer.param_groups[0]["lr"] < args.learning_rate / 10


def test_a_rungs_phase_is_told_outright(make):
    """Drawn while its updates go on, learned after; the record holds complete rungs alone."""
    seen = []

    class Watch(RunCallback):
        def on_rung_drawn(self, args, state, control, *, record, metrics, **kwargs):
            seen.append((trainer.run.state.phase.value, len(record.rungs), "loss" in metrics))

        def on_rung_learned(self, args, state, control, *, record, **kwargs):
            seen.append((trainer.run.state.phase.value, len(record.rungs), "loss" in record.rungs[-1]))

    trainer = make(callbacks=[Watch()], settings={"num_rungs": 2})
    trainer.train()
    assert seen == [("drawn", 0, False), ("learned", 1, True), ("drawn", 1, False), ("learned", 2, True)]


@pytest.mark.slow
def test_what_users_of_trl_plot_is_logged(make, tokenizer):
    """Under TRL's names, over the rung's draws: tokens, lengths, the share that was cut, entropy and KL."""
    trainer = make(train_dataset=["", "a b"], settings={"num_rungs": 2})
    drawn = []

    class Watch(RunCallback):
        def on_rung_drawn(self, args, state, control, *, proposals, **kwargs):
            drawn.append(proposals)

    trainer.add_callback(Watch())
    trainer.train()
    tokens = 0
    for log, proposals in zip([log for log in trainer.state.log_history if "rung" in log], drawn):
        completions = proposals.completions.tokens()
        tokens += sum(map(len, completions)) + 64 * (1 + 3)  # prompts of one and of three tokens
        cut = sum(row[-1] != EOS for row in completions) / 128
        length = sum(map(len, completions)) / 128
        assert log["num_tokens"] == tokens
        assert log["completions/mean_length"] == pytest.approx(length)
        assert log["completions/clipped_ratio"] == pytest.approx(cut)
        assert 0 < cut < 1
        assert log["entropy"] == pytest.approx(-proposals.log_model.mean().item() / length)
        assert log["kl_to_prior"] == pytest.approx((proposals.log_model - proposals.log_prior).mean().item())
        log_weight = proposals.log_weight(log["tau"])
        assert log["kl_to_target"] == pytest.approx(log["log_z"] - log_weight.mean().item())
        assert log["loss"] > 0


@pytest.mark.slow
def test_more_rungs_than_the_ladder_stay_at_t(make):
    trainer = make(settings={"num_rungs": 5})
    trainer.train()
    assert [record["tau"] for record in rungs(trainer)] == [0.5, 1.0, 1.5, 1.5, 1.5]


@pytest.mark.slow
def test_fewer_rungs_stop_before_t(make):
    trainer = make(settings={"num_rungs": 2})
    trainer.train()
    assert [record["tau"] for record in rungs(trainer)] == [0.5, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["top", "reweight"])
def test_the_neighbours_run_through_the_same_loop(make, sampler):
    trainer = make(settings={"sampler": sampler})
    trainer.train()
    records = rungs(trainer)
    assert len(records) == 3
    assert all(record["acceptance_rate"] is None for record in records)
    if sampler == "top":
        assert records[0]["sample_objective_mean"] < records[0]["objective_mean"]


@pytest.mark.slow
def test_the_default_is_one_pass_over_the_samples(make):
    trainer = make(settings={"updates_per_rung": None, "num_generations": 40})
    assert trainer.run.updates_per_rung == 3
    trainer.train()
    assert trainer.state.global_step == 9


def test_prompts_have_their_own_chains_and_columns(make):
    def nearest(prompts, completions, wanted):
        assert {(p, w) for p, w in zip(prompts, wanted)} <= {("a b", 1), ("c", 3), ("", 2)}
        return [abs(len(text.split()) - w) for text, w in zip(completions, wanted)]

    data = Dataset.from_dict({"prompt": ["a b", "c", ""], "wanted": [1, 3, 2]})
    trainer = make(nearest, settings={"num_generations": 32}, train_dataset=data)
    trainer.run.begin_rung()
    assert trainer.run.samples.samples.rows.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert len(trainer.record.log_z) == 3
    drawn = trainer.sample(5)
    assert drawn["prompt"] == ["a b"] * 5 + ["c"] * 5 + [""] * 5
    other = trainer.sample(2, Dataset.from_dict({"prompt": ["c"], "wanted": [3]}))
    assert other["prompt"] == ["c", "c"]
    with pytest.raises(TypeError, match="wanted"):
        trainer.sample(2, ["no column"])


@pytest.mark.slow
def test_chat_prompts_go_through_the_template(make, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}b{% endif %}"
    )
    seen = []

    def cost(prompts, completions):
        seen.extend(prompts)
        return count_a(prompts, completions)

    chat = [{"role": "user", "content": "a c"}]
    trainer = make(cost, train_dataset=Dataset.from_dict({"prompt": [chat]}))
    # The template writes the special tokens itself: none is added.
    assert trainer.inputs.prompts.token_ids == [tokenizer("a c b", add_special_tokens=False)["input_ids"]]
    trainer.train()
    assert seen[0] == chat
    assert all(isinstance(text, str) for text in trainer.sample(3)["completion"])


def test_the_seed_decides_a_new_adapters_weights(make):
    def weights(seed, noise):
        model = tiny_gpt2()
        torch.manual_seed(noise)
        trainer = make(model=model, settings={"seed": seed})
        return torch.cat([p.flatten() for name, p in trainer.model.named_parameters() if "lora_A" in name])

    assert torch.equal(weights(1, noise=5), weights(1, noise=6))
    assert not torch.equal(weights(1, noise=5), weights(2, noise=5))


def test_no_data_set_is_one_empty_prompt(make):
    trainer = make(train_dataset=None)
    assert trainer.inputs.prompts.token_ids == [[EOS]]
    assert trainer.sample(2)["prompt"] == ["", ""]


def test_plain_draws_are_the_models_own(make):
    drawn = make().sample(50, chain_length=1)
    assert drawn["log_prior"] == pytest.approx(drawn["log_model"], abs=1e-5)
    assert drawn.column_names == ["prompt", "completion", "objective", "log_prior", "log_model"]


def test_samples_report_their_own_diagnostics(make):
    trainer = make()
    first, second = trainer.sample(20), trainer.sample(20)
    assert first["completion"] != second["completion"], "each call draws again"
    logs = [log for log in trainer.state.log_history if "sample_ess" in log]
    assert len(logs) == 2
    assert {"sample_acceptance_rate", "sample_ess", "sample_log_z", "sample_objective", "sample_distinct"} <= set(
        logs[0]
    )


@pytest.mark.slow
def test_several_objectives_are_weighted_and_logged_apart(make):
    async def words(prompts, completions):
        return [len(text.split()) for text in completions]

    trainer = make([count_a, words], settings={"objective_weights": [1.0, 0.5], "objective_range": 4.5})
    trainer.train()
    record = rungs(trainer)[0]
    mean = record["objective/count_a"] + 0.5 * record["objective/words"]
    assert record["objective_mean"] == pytest.approx(mean)


def test_a_budget_of_objective_calls_ends_training_after_its_rung(make, caplog):
    trainer = make(settings={"max_objective_calls": 15, "num_rungs": 50, "num_generations": 16})
    result = trainer.train()
    (record,) = rungs(trainer)
    assert record["draws"] == 12, "three chains of four: sixteen calls may be too many"
    assert record["objective_calls"] <= 12
    assert trainer.state.global_step == 4, "the rung in which the budget ends is learnt to its end"
    assert "of max_objective_calls=15" in caplog.text
    assert "final_objective" not in result.metrics


@pytest.mark.slow
def test_evaluation_leaves_training_as_it_is(make):
    plain = make(settings={"num_rungs": 2})
    plain.train()
    watched = make(settings={"num_rungs": 2, "eval_strategy": "steps", "eval_steps": 3})
    watched.train()
    assert any("eval_kl" in log for log in watched.state.log_history)
    for ours, theirs in zip(plain.model.parameters(), watched.model.parameters()):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_evaluation_on_other_prompts(make):
    trainer = make(train_dataset=["a"], eval_dataset=["b", "c"])
    assert "eval_missing_mass" not in trainer.evaluate(["a"]), "there is no ladder yet"
    trainer.train()
    assert "eval_missing_mass" not in trainer.evaluate()
    assert "eval_missing_mass" in trainer.evaluate(["a"])


def test_the_best_model_is_not_chosen_by_what_is_not_measured(make):
    settings = {"eval_strategy": "epoch", "metric_for_best_model": "missing_mass"}
    with pytest.raises(ValueError, match="'missing_mass' is measured on the training prompts alone"):
        make(train_dataset=["a"], eval_dataset=["b", "c"], settings=settings)
    make(train_dataset=["a"], eval_dataset=["a"], settings=settings)
    make(train_dataset=["a"], eval_dataset=["b"], settings=settings | {"metric_for_best_model": "eval_kl"})


@pytest.mark.slow
def test_a_first_evaluation_that_is_skipped_does_not_end_the_run(make, caplog):
    """Too few calls are left for it, and there is nothing to judge the model by."""
    trainer = make(settings={"num_rungs": 1, "eval_strategy": "epoch", "metric_for_best_model": "kl"})
    trainer.run.measurable = lambda prompts: 0
    trainer.train()
    assert "an evaluation is skipped" in caplog.text
    assert trainer.state.best_metric is None


@pytest.mark.slow
def test_evaluation_tells_which_prompts_are_worst(make):
    trainer = make(train_dataset=["a", "b"], eval_dataset=["c", "", "a b"])
    trainer.train()
    assert sorted(trainer.prompt_metrics["prompt"]) == ["a", "b"], "of the final measurement"
    metrics, rows = trainer.evaluate(), trainer.prompt_metrics
    assert sorted(rows["prompt"]) == ["", "a b", "c"]
    for name in ("objective", "success", "ess", "distinct", "log_z", "kl"):
        assert metrics[f"eval_{name}"] == pytest.approx(sum(rows[name]) / 3)
    assert rows["kl"] == sorted(rows["kl"], reverse=True)
    assert metrics["eval_kl_worst"] == rows["kl"][0] > rows["kl"][2]
    assert metrics["eval_ess_worst"] == min(rows["ess"]) < max(rows["ess"])
    alone = trainer.evaluate([rows["prompt"][0]])
    assert "eval_kl_worst" not in alone


def test_log_completions_prints_a_table(make, capsys):
    make(settings={"log_completions": True, "num_rungs": 1}).train()
    out = capsys.readouterr().out
    assert "best" in out
    assert "random" in out
    assert "weight" in out


@pytest.mark.slow
def test_progress_lines_are_readable(make, capsys):
    make(settings={"disable_tqdm": False, "num_rungs": 2}).train()
    lines = capsys.readouterr().out.splitlines()
    assert any("mean cost" in line and "missing mass" in line for line in lines)
    assert sum(line.strip().startswith(("0 ", "1 ")) for line in lines) == 2


@pytest.mark.slow
def test_callbacks_see_rungs_as_epochs(make):
    class Watch(TrainerCallback):
        seen: list = []

        def on_epoch_end(self, args, state, control, **kwargs):
            self.seen.append(state.epoch)

    make(callbacks=[Watch()]).train()
    assert Watch.seen == [1, 2, 3]


@pytest.mark.slow
def test_what_is_saved_can_be_loaded_and_trained_on(make, config, tokenizer, tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    trainer = make(model=model, processing_class=None, peft_config=lora_config(tiny_gpt2()))
    trainer.train()
    trainer.save_model()
    assert AutoTokenizer.from_pretrained(trainer.args.output_dir).eos_token_id == EOS
    again = make(model=trainer.args.output_dir, processing_class=None, peft_config=None)
    assert torch.allclose(
        log_probs(base_model(again.model), [EOS], every_completion()),
        log_probs(base_model(trainer.model), [EOS], every_completion()),
        atol=1e-6,
    )
    assert "prior" in again.model.peft_config


@pytest.mark.slow
def test_full_fine_tuning_saves_a_whole_model(make):
    trainer = make(peft_config=None)
    trainer.train()
    trainer.save_model()
    loaded = GPT2LMHeadModel.from_pretrained(trainer.args.output_dir)
    assert torch.allclose(
        log_probs(loaded, [EOS], every_completion()), log_probs(trainer.model, [EOS], every_completion()), atol=1e-6
    )


# ---- The loss -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_accumulated_batches_learn_as_one(make):
    """The Trainer hands the loss the tokens of the whole accumulated batch."""
    one = make(settings={"per_device_train_batch_size": 8, "num_rungs": 1, "optim": "sgd"})
    two = make(
        settings={
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "num_rungs": 1,
            "optim": "sgd",
        }
    )
    one.train()
    two.train()
    for ours, theirs in zip(one.model.parameters(), two.model.parameters()):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert rungs(one)[0]["loss"] == pytest.approx(rungs(two)[0]["loss"], rel=1e-4)


# ---- Precision ------------------------------------------------------------------------------------------------------


def test_generation_scoring_and_learning_share_one_autocast(make):
    """Under bf16 and PEFT, every forward pass of the base model runs in the same precision."""
    trainer = make(settings={"bf16": True, "num_rungs": 1})
    seen = set()

    def watch(module, args, output):
        seen.add((trainer.model.training, torch.is_autocast_enabled("cpu"), output.dtype))

    base_model(trainer.model).transformer.h[0].mlp.c_fc.register_forward_hook(watch)
    trainer.train()
    assert seen == {(False, True, torch.bfloat16), (True, True, torch.bfloat16)}


def test_dropout_does_not_reach_scores_or_draws(make):
    """Scores in the middle of training, with the model in train mode and LoRA dropout on."""
    trainer = make(model=tiny_gpt2(dropout=0.5), peft_config=lora_config(tiny_gpt2(), dropout=0.5))
    trainer.model.train()
    first = trainer.rollout.propose(trainer.inputs.prompts, 50, (1,))
    second = trainer.rollout.propose(trainer.inputs.prompts, 50, (1,))
    assert trainer.model.training
    assert torch.equal(first.log_model, second.log_model)
    assert torch.equal(first.log_prior, second.log_prior)
    assert torch.allclose(first.log_prior, first.log_model, atol=1e-5)


@pytest.mark.slow
def test_an_exception_leaves_the_model_as_it_was(make, monkeypatch):
    """Train mode, gradient checkpointing, the generation config and the adapter: also if scoring the prior fails."""
    trainer = make(settings={"gradient_checkpointing": True}, peft_config=lora_config(tiny_gpt2()))
    trainer.train()
    own = base_model(trainer.model).generation_config

    def broken(*args, **kwargs):
        raise RuntimeError("no more")

    for module, name in ((engine, "generate"), (rollout, "sequence_logprobs")):
        trainer.model.train()
        with monkeypatch.context() as patch:
            patch.setattr(module, name, broken)
            with pytest.raises(RuntimeError, match="no more"):
                trainer.rollout.propose(trainer.inputs.prompts, 10, (1,))
        assert all(module.training for module in trainer.model.modules())
        assert trainer.model.is_gradient_checkpointing
        assert torch.is_grad_enabled()
        assert base_model(trainer.model).generation_config is own
        assert trainer.model.active_adapters == ["default"]
        assert any(parameter.requires_grad for parameter in trainer.model.parameters())
        assert not base_model(trainer.model).get_output_embeddings()._forward_pre_hooks
    assert len(trainer.sample(5)) == 5


@pytest.mark.slow
def test_a_cost_in_its_thread_may_run_the_model(make):
    """A judge that is the trained model itself meets none of the scorer's hooks."""
    model = tiny_gpt2()
    widths = []

    def judge(prompts, completions):
        logits = model(input_ids=torch.tensor([[2, 3, 4]])).logits
        widths.append(tuple(logits.shape))
        return count_a(prompts, completions)

    make(model=model, objective=judge, peft_config=lora_config(model)).train()
    assert set(widths) == {(1, 3, 5)}


def test_an_adapter_costs_no_second_copy_of_the_weights(make):
    """With PEFT the prior is the same weights; only full fine-tuning keeps a frozen copy."""
    model = tiny_gpt2()
    weights = sum(parameter.numel() for parameter in model.parameters())
    trainer = make(model=model, peft_config=lora_config(model))
    held = [trainer.model, getattr(trainer.rollout.prior, "model", None)]
    frozen = {parameter.data_ptr() for module in held if module for parameter in module.parameters()}
    assert all(parameter.data_ptr() in frozen for parameter in model.parameters())
    assert sum(p.numel() for p in trainer.model.parameters() if not p.requires_grad) == weights
    assert held[1] is None
    full = make(model=tiny_gpt2(), peft_config=None)
    assert sum(p.numel() for p in full.rollout.prior.model.parameters()) == weights


# ---- Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (Dataset.from_dict({"text": ["a"]}), ValueError, "no column 'prompt'.*rename_column"),
        (Dataset.from_dict({"prompt": []}), ValueError, "train_dataset is empty"),
        ([], ValueError, "train_dataset is empty"),
        ([{"role": "user", "content": "a"}], ValueError, r"is one conversation.*Pass a list of conversations: \[\["),
        ({"train": []}, TypeError, "must be a datasets.Dataset"),
        (Dataset.from_dict({"prompt": [3]}), ValueError, "prompt 0 is neither text nor a list of messages"),
        (Dataset.from_dict({"prompt": ["a " * 14]}), ValueError, "context of 16. Lower max_completion_length to 1 or"),
        (Dataset.from_dict({"prompt": ["a " * 20]}), ValueError, "context of 16. Shorten the prompt, or leave it out"),
        (Dataset.from_dict({"prompt": [[{"role": "user", "content": "a"}]]}), ValueError, "no chat template"),
        (Dataset.from_dict({"prompt": ["a"], "other": [1]}), TypeError, r"Add \*\*columns"),
    ],
)
def test_bad_data_is_refused(make, data, error, message):
    def strict(prompts, completions):
        return [0.0] * len(completions)

    with pytest.raises(error, match=message):
        make(strict, train_dataset=data)


def test_a_completion_longer_than_the_context_is_refused(make):
    with pytest.raises(ValueError, match=r"Lower max_completion_length to 15 or less"):
        make(settings={"max_completion_length": 16})


def test_a_tokenizer_without_an_end_is_refused(make, tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no end-of-text token.*Set tokenizer\.eos_token"):
        make()


def test_an_objective_that_raises_stops_with_its_name(make):
    def fragile(prompts, completions):
        raise ZeroDivisionError("by zero")

    with pytest.raises(RuntimeError, match="'fragile' raised ZeroDivisionError: by zero"):
        make(fragile).train()


def test_an_objective_above_its_range_stops_with_its_row(make):
    with pytest.raises(ValueError, match=r"'count_a' returned 3\.0 for row 0, above objective_range=2\.0"):
        make(settings={"objective_range": 2.0}).train()


def test_an_objective_that_is_always_zero_has_no_range(make):
    with pytest.raises(ValueError, match="every draw from the prior has cost 0"):
        make(lambda prompts, completions: [0.0] * len(completions), settings={"objective_range": None}).train()


def test_an_output_directory_that_cannot_be_written_is_refused_before_the_model_loads(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"output_dir .* cannot be written.*Choose another"):
        make(model="no/such-model", settings={"output_dir": str(tmp_path / "file" / "out")})


def test_a_model_without_a_known_tokenizer_asks_for_one(make):
    with pytest.raises(ValueError, match="pass it as processing_class"):
        make(processing_class=None)


def test_model_init_kwargs_need_a_model_to_load(make):
    with pytest.raises(ValueError, match="Drop it"):
        make(settings={"model_init_kwargs": {"dtype": "float32"}})


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_models_precision_may_have_its_older_name(name, make, tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "model")
    settings = {"model_init_kwargs": {name: "bfloat16"}}
    trainer = make(model=str(tmp_path / "model"), peft_config=lora_config(tiny_gpt2()), settings=settings)
    assert trainer.model.get_base_model().dtype == torch.bfloat16


def test_other_arguments_are_refused(tokenizer):
    with pytest.raises(TypeError, match="must be an ALDRIFTConfig"):
        ALDRIFTTrainer(tiny_gpt2(), count_a, {"tau_max": 1}, processing_class=tokenizer)
    with pytest.raises(TypeError, match="must be a tokenizer"):
        ALDRIFTTrainer(tiny_gpt2(), count_a, ALDRIFTConfig(use_cpu=True), processing_class=str)


def test_there_must_be_a_checkpoint_to_resume_from(make):
    for last in (True, "True"):
        with pytest.raises(ValueError, match="no checkpoint in"):
            make().train(resume_from_checkpoint=last)


def test_what_has_no_meaning_here_says_what_to_use_instead(config, tokenizer):
    model = tiny_gpt2()
    trainer = ALDRIFTTrainer(model, count_a, config(), processing_class=tokenizer, peft_config=lora_config(model))
    with pytest.raises(NotImplementedError, match=r"trainer\.sample"):
        trainer.predict(trainer.train_dataset)
    with pytest.raises(NotImplementedError, match="trainer per trial"):
        trainer.hyperparameter_search(lambda trial: {})


def test_metrics_of_samples_are_those_of_the_chosen():
    pool = pool_of(torch.tensor([[0.0, 1.0, 2.0, 5.0]], dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64))
    metrics = CorrectedDraws(pool, Selection(torch.tensor([[0, 0, 1]]), 0.5), None, [pool]).metrics(1.0, 0.0)
    assert metrics["objective"] == pytest.approx(1 / 3)
    assert metrics["success"] == pytest.approx(2 / 3)
    assert metrics["distinct"] == pytest.approx(2 / 3)
    weight = torch.tensor([0.0, -1.0, -2.0, -5.0]).double().exp()
    assert metrics["ess"] == pytest.approx((weight.sum() ** 2 / weight.square().sum() / 4).item())
    assert metrics["log_z"] == pytest.approx(weight.mean().log().item())


def test_other_prompts_have_no_missing_mass(config, tokenizer):
    """As many of them as the run has."""
    model = tiny_gpt2()
    trainer = ALDRIFTTrainer(
        model, count_a, config(sampler="archive"), processing_class=tokenizer, peft_config=lora_config(model)
    )
    state = trainer.run.state
    state.ladder = state.ladder.reached(torch.arange(1), 1.5, torch.zeros(1), torch.zeros(1))
    assert "eval_missing_mass" in trainer.evaluate()
    assert "eval_missing_mass" not in trainer.evaluate(["a b"])
