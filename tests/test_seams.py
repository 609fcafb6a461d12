"""The four seams: parts that the package does not have, passed in as instances, train end to end and resume."""

import ast
import json
import re
from pathlib import Path

import own_parts
import pytest
import torch
from conftest import (
    ALDRIFTTrainer,
    count_a,
    every_completion,
    exact_kl,
    exact_target,
    lora_config,
    tiny_gpt2,
)
from own_parts import GeometricLadder, LogVariance, SmoothedResampling, uniform_table

from aldrift_hf.algorithm.ladders import LADDERS
from aldrift_hf.algorithm.losses import LOSSES
from aldrift_hf.algorithm.samplers import SAMPLERS
from aldrift_hf.models.engines import ENGINES
from aldrift_hf.selftest.exact import chi_square_p
from aldrift_hf.trainer.samples import RESERVED

T = 1.5
PARTS = {
    "sampler": SmoothedResampling,
    "ladder": lambda: GeometricLadder(T, num_rungs=4),
    "loss": LogVariance,
    "engine": lambda: uniform_table(every_completion()),
}
SETTINGS = {
    "tau_max": T,
    "num_generations": 512,
    "chain_length": 8,
    "updates_per_rung": 20,
    "per_device_train_batch_size": 32,
    "sampler": "archive",
}


def parts_for(seam):
    """The archive takes older rungs' densities from the trainer's scorer: a table's draws want a rung's own weights."""
    return {seam: PARTS[seam](), **({"sampler": SmoothedResampling()} if seam == "engine" else {})}


def trainer_of(settings, tokenizer, **parts):
    model = tiny_gpt2()
    return ALDRIFTTrainer(model, count_a, settings, processing_class=tokenizer, peft_config=lora_config(model), **parts)


@pytest.mark.slow
@pytest.mark.parametrize("seam", PARTS)
def test_a_part_of_ones_own_learns_the_target(seam, config, tokenizer):
    """The exact KL(p_T‖q) falls, and the ladder's log Z is that of the target."""
    log_p, log_z = exact_target(tokenizer)
    rungs = 4 if seam == "ladder" else 3
    trainer = trainer_of(config(**SETTINGS, num_rungs=rungs), tokenizer, **parts_for(seam))
    before = exact_kl(log_p, trainer.model)
    trainer.train()
    assert exact_kl(log_p, trainer.model) < 0.35 * before
    assert trainer.record.log_z[0] == pytest.approx(log_z, abs=0.1)
    assert trainer.record.settings[seam] == type(PARTS[seam]()).__name__


@pytest.mark.slow
@pytest.mark.parametrize("seam", PARTS)
def test_it_is_resumed_in_mid_rung(seam, config, tokenizer, tmp_path):
    """Bit for bit as a run left alone, the part's own state included."""
    save = {"save_strategy": "steps", "save_steps": 5, "save_total_limit": None, "updates_per_rung": 10}
    settings = {**SETTINGS, **save}
    whole = trainer_of(config(**settings, output_dir=str(tmp_path / "whole")), tokenizer, **parts_for(seam))
    whole.train()
    resumed = trainer_of(config(**settings), tokenizer, **parts_for(seam))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-15"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert resumed.run.state.ladder.taus == whole.run.state.ladder.taus
    assert torch.equal(resumed.run.state.ladder.log_z, whole.run.state.ladder.log_z)
    assert resumed.sampler.state_dict().keys() == whole.sampler.state_dict().keys()
    for name, tensor in whole.sampler.state_dict().items():
        assert torch.equal(resumed.sampler.state_dict()[name], tensor), name


@pytest.mark.slow
def test_the_samplers_state_is_a_runs_own(config, tokenizer):
    """A second training begins with a fresh state; a resumed one goes on with the checkpoint's."""
    sampler = SmoothedResampling()
    trainer = trainer_of(config(**SETTINGS, num_rungs=2), tokenizer, sampler=sampler)
    trainer.train()
    assert sampler.rungs == 2
    trainer.train()
    assert sampler.rungs == 2


@pytest.mark.slow
def test_the_geometric_ladder_is_climbed(config, tokenizer):
    trainer = trainer_of(config(**SETTINGS, num_rungs=4), tokenizer, ladder=PARTS["ladder"]())
    trainer.train()
    assert [rung["tau"] for rung in trainer.record.rungs] == [T / 8, T / 4, T / 2, T]


@pytest.mark.slow
def test_the_tables_draws_are_weighted_by_the_table(config, tokenizer):
    """`log q` is that of the law that the tokens came from, which is not the model's: so weights are exact."""
    completions = every_completion()
    engine = uniform_table(completions)
    trainer = trainer_of(config(**SETTINGS), tokenizer, engine=engine)
    drawn = trainer.rollout.propose(trainer.inputs.prompts, 4000, (1,))
    index = {tuple(tokens): row for row, tokens in enumerate(completions.tokens())}
    events = torch.tensor([index[tuple(tokens)] for tokens in drawn.completions.tokens()])
    n = len(completions.length)
    assert chi_square_p(events.bincount(minlength=n), torch.full((n,), 1 / n)) > 1e-4
    assert torch.allclose(drawn.log_model, -torch.tensor(float(n)).log().double())
    assert engine.syncs == 1
    log_p, log_z = exact_target(tokenizer)
    assert drawn.log_weight(T).logsumexp(-1).item() - torch.tensor(4000.0).log().item() == pytest.approx(log_z, abs=0.1)
    # The target's largest weight is 15 times the mean: so long until a chain has forgotten where it began.
    corrected = trainer.sample(1000, chain_length=150)
    names = sorted(set(trainer.rollout.decode(completions)))
    target = torch.zeros(len(names)).double()
    for text, p in zip(trainer.rollout.decode(completions), log_p.exp()):
        target[names.index(text)] += p
    counts = torch.tensor([names.index(text) for text in corrected["completion"]]).bincount(minlength=len(names))
    assert chi_square_p(counts, target) > 1e-4


def test_log_variance_is_zero_at_the_target_alone():
    log_p = torch.tensor([-1.0, -2.0, -3.0])
    loss = LogVariance()
    assert loss(log_p[:, None], 1, log_target=log_p + 5.0).item() == pytest.approx(0)
    assert loss(log_p[:, None], 1, log_target=log_p.flip(0)).item() > 1


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"sampler": "archive"}, r"sampler must be an instance of a subclass of aldrift_hf\.Sampler, got str"),
        ({"ladder": 3}, r"ladder must be an instance of a subclass of aldrift_hf\.Ladder"),
        ({"loss": LogVariance}, r"loss must be an instance of a subclass of aldrift_hf\.Loss, got ABCMeta"),
        ({"engine": object()}, r"engine must be an instance of a subclass of aldrift_hf\.Engine"),
    ],
)
def test_other_things_are_refused(part, message, config, tokenizer):
    with pytest.raises(TypeError, match=message):
        trainer_of(config(), tokenizer, **part)


def test_parts_that_do_not_go_together_are_refused(config, tokenizer):
    class Uncorrected(SmoothedResampling):
        corrects = False
        draws_by_weight = False

    with pytest.raises(ValueError, match="ladder='adaptive' takes its steps by the weights"):
        trainer_of(config(ladder="adaptive", tau_step=None), tokenizer, sampler=Uncorrected())
    with pytest.raises(ValueError, match="needs samples drawn in proportion to known weights"):
        trainer_of(config(sampler="archive", loss_type="generalized_kl"), tokenizer, sampler=Uncorrected())


def test_every_name_in_a_registry_is_a_choice_of_the_settings(config):
    for field, registry in {"sampler": SAMPLERS, "ladder": LADDERS, "loss_type": LOSSES, "engine": ENGINES}.items():
        for name in registry:
            settings = {"sampler": "archive"} if field != "sampler" else {}
            step = {"tau_step": None} if name == "adaptive" else {}
            assert getattr(config(**{**settings, **step, field: name}), field) == name
        with pytest.raises(ValueError, match=f"{field} must be"):
            config(**{field: "another"})


def test_no_name_of_a_part_is_compared_outside_the_registries():
    """`if sampler == "archive"` somewhere else would leave a user's own sampler out."""
    package = Path(own_parts.__file__).parents[1] / "aldrift_hf"
    names, found = {*SAMPLERS, *LADDERS, *LOSSES, *ENGINES}, []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                compared = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
                found += [(path.name, ast.unparse(node))] if compared & names else []
    # `correction` is an argument of sample(), which happens to share three names with samplers.
    assert found == [("evaluation.py", f"correction == {name!r}") for name in ("archive", "suffix")]


def test_each_is_under_forty_lines():
    text = Path(own_parts.__file__).read_text()
    for part in re.split(r"\n(?=class |def )", text)[1:]:
        assert len(part.splitlines()) < 40


@pytest.mark.slow
def test_the_record_of_a_run_with_parts_of_ones_own_can_be_read(config, tokenizer):
    trainer = trainer_of(config(**SETTINGS, num_rungs=1), tokenizer, sampler=SmoothedResampling(), loss=LogVariance())
    trainer.train()
    settings = json.loads(Path(trainer.args.output_dir, "run.json").read_text())["settings"]
    assert (settings["sampler"], settings["loss"], settings["corrects"]) == ("SmoothedResampling", "LogVariance", True)


class Named(LogVariance):
    """A loss with a column under a name of the package's."""

    def __init__(self, name):
        self.name = name

    def columns(self, pool, tau, log_z):
        return {**super().columns(pool, tau, log_z), self.name: pool.objective}


class Boasting(SmoothedResampling):
    """A sampler that measures under a name of the package's."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def metrics(self, pool, tau):
        return {self.name: 1.0}


@pytest.mark.parametrize("name", RESERVED)
def test_a_losss_columns_cannot_take_the_place_of_the_tokens(name, config, tokenizer):
    trainer = trainer_of(config(), tokenizer, loss=Named(name))
    with pytest.raises(ValueError, match="these names are reserved: prompt, completion"):
        trainer.train()


@pytest.mark.parametrize("name", ["ess", "tau", "num_tokens", "loss"])
def test_a_samplers_figures_cannot_take_the_place_of_the_runs(name, config, tokenizer):
    trainer = trainer_of(config(), tokenizer, sampler=Boasting(name))
    with pytest.raises(ValueError, match=rf"Boasting\.metrics returns figures .*: {name}"):
        trainer.train()


def test_an_engine_that_cannot_continue_texts_is_not_asked_to(config, tokenizer):
    trainer = trainer_of(config(**SETTINGS), tokenizer, engine=uniform_table(every_completion()))
    with pytest.raises(ValueError, match=r"TableEngine has no argument `limits` .* choose another correction"):
        trainer.sample(2, correction="suffix")
    with pytest.raises(ValueError, match=r"TableEngine has no argument `limits` .* choose another sampler"):
        ALDRIFTTrainer("no/model", count_a, config(sampler="suffix"), engine=uniform_table(every_completion()))
