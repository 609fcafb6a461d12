"""Every Markdown page holds what it says: Python runs, commands are parsed by what they start, links have a target."""

from __future__ import annotations

import ast
import importlib.metadata
import itertools
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from markdown_it import MarkdownIt
from markdown_it.token import Token
from problems.real_model import real_model
from transformers import TrainerCallback, logging
from trl import TrlParser

from aldrift_hf import check_objective, cli, selftest
from aldrift_hf.cli.parser import RunParser
from aldrift_hf.cli.runs import OPTIONS_FILE
from aldrift_hf.toy import SmallPriorConfig, small_prior

ROOT = Path(__file__).parents[1]
FOLDERS = (".github", "accelerate_configs", "aldrift_hf", "docs", "recipes", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
PAGES = [str(page.relative_to(ROOT)) for page in PAGES]


def tokens(page: str) -> list[Token]:
    return MarkdownIt().enable("table").parse((ROOT / page).read_text())


def blocks(page: str, kind: str) -> list[Token]:
    return [token for token in tokens(page) if token.type == "fence" and token.info == kind]


def inline(page: str, *kinds: str) -> list[Token]:
    children = [child for token in tokens(page) for child in token.children or []]
    return [child for child in children if child.type in kinds]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_is_verified(page):
    """Python, Bash and YAML are, below; `text` is what a command printed, or code that is tested elsewhere."""
    kinds = [token.info for token in tokens(page) if token.type in ("fence", "code_block")]
    assert set(kinds) <= {"python", "bash", "yaml", "text"}


# ---- Python ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def verbose() -> Iterator[None]:
    """Transformers' log level as a reader has it: at the level of the other tests, no run prints its rungs."""
    level = logging.get_verbosity()
    logging.set_verbosity_warning()
    yield
    logging.set_verbosity(level)


@pytest.fixture
def chat_model_here(tmp_path) -> None:
    """A small chat model of words with a sentiment, in a folder of the working directory that has a name of the Hub."""
    words = ["good", "bad", "the", "soup"]
    model, tokenizer = small_prior(
        words, " ", lambda count, rng: [" ".join(text) for text in rng.choice(words, (count, 40))],
        SmallPriorConfig(steps=20),
    )  # fmt: skip
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct")


# Its block is a pattern from a recipe, and test_external_objective.py runs it with the recipe's names.
RUN_ELSEWHERE = ("recipes/README.md",)
WITH_A_CHAT_MODEL = ("README.md", "recipes/real_problems.md")
SHORTER = ("max_objective_calls=512", "max_objective_calls=128")
"""For the README's run, which takes most of an hour with the real model; the tests' has a few words."""


@pytest.mark.slow
@pytest.mark.usefixtures("verbose")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page not in RUN_ELSEWHERE])
def test_python_runs(page, priors, tmp_path, monkeypatch, capsys, request):
    """From top to bottom. A block prints the words of the `text` below it, and what the page claims is true."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALDRIFT_CACHE", str(priors))
    if page in WITH_A_CHAT_MODEL:
        request.getfixturevalue("chat_model_here")
    names: dict[str, Any] = {"__name__": "page", "printed": []}
    for block, below in itertools.pairwise([*tokens(page), None]):
        if block.type == "fence" and block.info == "python":
            capsys.readouterr()
            # With the page's line numbers, for tracebacks.
            content = block.content
            if page == "README.md":
                assert SHORTER[0] in content
                content = content.replace(*SHORTER)
            exec(compile("\n" * (block.map[0] + 1) + content, page, "exec"), names)
            names["printed"].append(capsys.readouterr().out)
            if below is not None and below.type == "fence" and below.info == "text":
                assert wording(names["printed"][-1]) == wording(below.content)
    CLAIMS[page](names)


def wording(text: str) -> list[str]:
    """The words of a text; numbers, which differ between machines, become `#`. Slow machines print progress, too."""
    text = re.sub(r"(?m)^  .*, about .* s left$", "", text)
    return re.sub(r"(?<![\w])[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?|\bnan\b|(?<!\S)-(?!\S)", "#", text).split()


def readme(names):
    first, last = names["trainer"].record.rungs[0], names["trainer"].record.rungs[-1]
    assert first["objective_mean"] > 0.05, "its texts are long at first"
    assert last["objective_mean"] < first["objective_mean"]
    assert names["trainer"].record.ended_by
    assert Path("out/short").is_dir()


class AfterAnUpdate(TrainerCallback):
    """Ends a run."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.usefixtures("verbose")
def test_the_readmes_example_with_the_real_model(tmp_path, monkeypatch, capsys):
    """From the folder that has the model's name, up to the first update, and with half of its tokens."""
    try:
        model = real_model()
    except OSError as error:
        pytest.skip(f"the real model cannot be made here: {error}")
    monkeypatch.chdir(tmp_path)
    Path("HuggingFaceTB").mkdir()
    Path("HuggingFaceTB/SmolLM2-135M-Instruct").symlink_to(model)
    (block,) = blocks("README.md", "python")
    assert "max_completion_length=32" in block.content
    shorter = block.content.replace(*SHORTER).replace("max_completion_length=32", "max_completion_length=16")
    build, train, after = shorter.partition("trainer.train()\n")
    names: dict[str, Any] = {"__name__": "page"}
    exec(build, names)
    trainer = names["trainer"]
    trainer.add_callback(AfterAnUpdate())
    exec(train + after, names)
    assert trainer.state.global_step == 1
    assert trainer.record.rungs[0]["objective_calls"] == 12
    assert trainer.record.metrics["missing_mass"] < 3
    texts = capsys.readouterr().out.strip().splitlines()[-3:]
    assert all(any(letter.isalpha() for letter in text) for text in texts), "three reviews, not their container"


def getting_started(names):
    first, last = names["trainer"].record.rungs[0], names["trainer"].record.rungs[-1]
    # Of 46,656 outcomes of six throws, 462 have no fall: 1 %.
    assert 0.002 < first["success"] < 0.03
    assert last["success"] > 10 * first["success"]
    assert names["samples"].num_rows == 8
    assert Path("out/dice/adapter_model.safetensors").is_file()
    check_objective(names["cost"], ["1 2 3 4 5 6", "6 5 4 3 2 1"], objective_range=5.0)


def choosing(names):
    seen, tilt, falls = names["seen"], names["tilt"], names["falls"]
    assert tilt(seen, -2.0 * seen)[0] == pytest.approx(tilt(falls, -2.0 * falls)[0], abs=0.15)
    assert tilt(seen, -6.0 * seen)[2] < 40, "the prior's draws are worth hardly any draws at T = 6"
    # Those of the model trained for T = 3 are worth more, and their estimate is right; p_T's share is 0.953.
    drawn = names["drawn"]
    log_weight = (drawn["log_prior"] - 6.0 * drawn["objective"] - drawn["log_model"]).to_numpy()
    _, success, draws = tilt(drawn["objective"].to_numpy(), log_weight)
    assert draws > 100
    assert success == pytest.approx(tilt(falls, -6.0 * falls)[1], abs=0.03)
    assert tilt(falls, -5.94 * falls)[1] == pytest.approx(0.95, abs=0.001)
    assert names["record"].tau_max == pytest.approx(5.94, rel=0.06)
    # All of T in one step is too large a step.
    assert names["end"]["final_ess"] < 0.1
    assert (names["chains"] == 0).mean() < 0.6


def diagnostics(names):
    page = (ROOT / "recipes/reading_the_diagnostics.md").read_text()
    for record in (names["well"].record.rungs[-1], names["trainer"].record.rungs[-1]):
        for key in record:
            assert f"`{key}`" in page, f"rungs.jsonl has {key}, which the page does not explain"
    for key in names["trainer"].evaluate():
        assert f"`{key.removeprefix('eval_')}`" in page, f"evaluate() has {key}, which the page does not explain"
    archive, few, many = names["known"]
    assert names["metrics"]["final_missing_mass"] < 0.3
    assert names["end"]["final_missing_mass"] < 0.3
    assert min(archive, many) > 350
    assert few < 100


def samplers(names):
    plain = {name: trainer.sample(500, chain_length=1).to_pandas() for name, trainer in names["trainers"].items()}
    winners = {name: draws["completion"][draws["objective"] == 0] for name, draws in plain.items()}
    assert winners["top"].nunique() < 0.8 * winners["archive"].nunique()
    with_twins = list(names["draws"]["objective"]).count(0) / 2000
    assert with_twins > 0.6, "without twins it is 0.595, with as many proposals"
    edited = names["trainer_with_edits"].sample(500, chain_length=1)["objective"]
    assert list(edited).count(0) / 500 > 0.5, "of the prior's draws it is 0.01"
    # p_T's share is 0.953: long chains reach it although the model itself does not.
    assert len(winners["metropolis_hastings"]) / 500 < 0.85
    assert list(names["samples"]["objective"]).count(0) / 500 == pytest.approx(0.953, abs=0.05)


def sizes(names):
    # Llama's 8 billion parameters, and the sizes that PEFT counted according to recipes/README.md.
    assert (names["parameters"], names["adapter"], names["cache"]) == (8_030_261_248, 41_943_040, 131_072)
    first, second = (names[run].record.rungs[1] for run in ("first", "second"))
    assert first["log_z"] == second["log_z"]
    assert Path("out/dry_run/adapter_model.safetensors").is_file()


def own_parts(names):
    # Mean cost and log Z under p_T for T = 2, from all 46,656 outcomes; each part is trained for a few seconds.
    results = re.findall(r"mean cost ([\d.]+), log Z ([-\d.]+)", "".join(names["printed"]))
    assert len(results) == 5
    for mean_cost, log_z in results:
        assert float(mean_cost) == pytest.approx(1.02, abs=0.3)
        assert float(log_z) == pytest.approx(-3.07, abs=0.2)
    assert names["trainer"].sampler.draws(), "the archive is the default"
    assert not [each for each in names["trainer"].callback_handler.callbacks if isinstance(each, names["ReportWriter"])]


def real_problems(names):
    family = [text.replace(" ", "") for text in names["like_the_family"](2000, np.random.default_rng(0))]
    target = np.exp(20 * (np.array(names["assay"](family)) - 1))
    expected = (target * (1 - np.array(names["assay"](family)))).sum() / target.sum()
    assert names["designs"]["objective"].mean() == pytest.approx(expected, abs=0.06)
    molecules = names["molecules"]
    valid = molecules["objective"] < 1
    assert valid.mean() > 0.9
    _, first = next(molecules[valid].iterrows())
    canonical = names["Chem"].CanonSmiles(first["completion"].replace(" ", ""))
    assert 1 - names["score"](canonical) == first["objective"]
    found = [rung["sample_objective_mean"] for rung in names["search"].record.rungs]
    assert found[-1] < 0.7 * found[0], "the search finds better and better ones"
    assert 0.1 < names["trainer"].record.tau_max < 20
    assert Path("out/answers/adapter_model.safetensors").is_file()


CLAIMS: dict[str, Callable[[dict[str, Any]], None]] = {
    "README.md": readme,
    "docs/getting_started.md": getting_started,
    "recipes/choosing_T_and_D.md": choosing,
    "recipes/from_gpt2_to_8b.md": sizes,
    "recipes/reading_the_diagnostics.md": diagnostics,
    "recipes/real_problems.md": real_problems,
    "recipes/which_sampler.md": samplers,
    "recipes/your_own_parts.md": own_parts,
}
"""What a page says about its own runs, with the tolerance that other machines need."""


# ---- Commands and YAML -----------------------------------------------------------------------------------------------


class Parsed(Exception):  # noqa: N818, it is not an error
    """A command line was parsed; what would come next is left out."""


def stop(*args, **kwargs):
    raise Parsed


class ParseOnly(TrlParser):
    def parse_args_and_config(self, *args, **kwargs):
        super().parse_args_and_config(*args, **kwargs)
        stop()


parse = RunParser.parse


def parse_only(*args, **kwargs):
    parse(*args, **kwargs)
    stop()


def commands(page: str) -> list[list[str]]:
    """The commands in its Bash blocks, as lists of words, and those of recipes in the running text and in tables."""
    lines = [line for block in blocks(page, "bash") for line in block.content.replace("\\\n", " ").splitlines()]
    for code in inline(page, "code_inline"):
        if found := re.fullmatch(r"(?:accelerate launch )?(recipes/[a-z_]+\.py\b.*)", code.content):
            lines.append(f"accelerate launch {found[1]}")
    split = [shlex.split(line, comments=True) for line in lines]
    groups = (itertools.groupby(line, lambda word: word == "&&") for line in split)
    return [list(group) for line in groups for joined, group in line if not joined]


@pytest.fixture
def check(recipe_module, monkeypatch) -> Callable[[list[str]], None]:
    """Fails for a command line that would not do what it says; nothing is trained, installed or downloaded."""

    def script(path: str, arguments: list[str]) -> None:
        assert Path(path).is_file(), path
        module: ModuleType = recipe_module(Path(path).stem)
        if not hasattr(module, "main"):
            assert not arguments, f"{path} takes no arguments"
            return
        monkeypatch.setattr(module, "TrlParser", ParseOnly)
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        with pytest.raises((Parsed, SystemExit)) as end:
            module.main()
        assert end.type is Parsed or end.value.code in (None, 0), end.value.code

    def accelerate(words: list[str]) -> None:
        assert words[0] == "launch"
        launch = launch_command_parser().parse_args(words[1:])
        if launch.config_file is not None:
            load_config_from_file(launch.config_file)
        script(launch.training_script, launch.training_script_args)

    def python(words: list[str]) -> None:
        if "-m" in words:
            assert util.find_spec(words[words.index("-m") + 1]) is not None
        elif "-c" in words:
            ast.parse(words[words.index("-c") + 1])
        else:
            script(words[0], words[1:])

    def pip(words: list[str]) -> None:
        assert words[0] == "install"
        if words[1:] == ["."]:
            return
        if "--no-deps" in words:  # beside a freeze
            assert words[-2:] == ["-e", "."] or (words[-2] == "-r" and Path(words[-1]).is_file())
            return
        assert Path(words[words.index("-c") + 1]).is_file()
        extras = re.fullmatch(r"\.\[(\w+)\]", words[words.index("-e") + 1])[1]
        assert extras in importlib.metadata.metadata("aldrift_hf").get_all("Provides-Extra")

    def pytest_(words: list[str]) -> None:
        assert words in ([], ["-m", "not slow or versions"]) or (
            words[:2] == ["-k", "not transformers"] and all(Path(word).is_file() for word in words[2:])
        )

    def mkdocs(words: list[str]) -> None:
        assert words in (["build", "--strict"], ["serve"])

    def vllm(words: list[str]) -> None:
        assert words[0] == "serve"
        assert {word for word in words if word.startswith("--")} == {"--enable-lora", "--max-lora-rank"}

    def aldrift(words: list[str]) -> None:
        command = words[0]
        if command in ("sample", "evaluate"):
            folder = Path(words[1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / OPTIONS_FILE).write_text("{objective: [my_costs:cost], model_name_or_path: gpt2}")
        if command == "env":
            cli.main(words)
        elif command == "report":
            with pytest.raises(SystemExit, match="is not the output directory of a run"):
                cli.main(words)
        elif command == "costs":
            monkeypatch.setattr("aldrift_hf.cli.costs.evaluated_texts", stop)
            with pytest.raises(Parsed):
                cli.main(words)
        else:
            with pytest.raises(Parsed):
                cli.main(words)

    programs = {
        "accelerate": accelerate,
        "aldrift": aldrift,
        "mkdocs": mkdocs,
        "python": python,
        "python3": python,
        "pip": pip,
        "pytest": pytest_,
        "vllm": vllm,
    }

    def run(words: list[str]) -> None:
        words = [*itertools.dropwhile(re.compile(r"[A-Z_]+=").match, words)]  # variables of the environment
        program = Path(words[0]).name
        assert program in programs, f"there is no check for {shlex.join(words)}"
        programs[program](words[1:])

    monkeypatch.setattr(RunParser, "parse", parse_only)
    monkeypatch.setattr(selftest, "run", stop)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page) or blocks(page, "yaml")])
def test_commands_parse(page, check, tmp_path, monkeypatch):
    """By the parser of the program that they start, with the page's YAML files, whose first lines name them."""
    for name in (".ci", "accelerate_configs", "constraints.txt", "recipes", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    files = {re.match(r"# (\S+\.yaml)\n", block.content)[1]: block.content for block in blocks(page, "yaml")}
    for name, content in files.items():
        Path(name).write_text(content)
    assert files.keys() <= set(itertools.chain(*commands(page))), "no command reads this file"
    for command in commands(page):
        check(command)


# ---- Links -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_links_have_a_target(page):
    """Relative links lead to a file, to one of its headings by GitHub's name for it, or to a name that it defines."""
    for link in inline(page, "link_open", "image"):
        target = str(link.attrs.get("href", link.attrs.get("src")))
        path, _, anchor = target.partition("#")
        if not re.match(r"\w+:|\.\./\.\./actions/", target):  # of a workflow, on GitHub
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists(), target
            assert not anchor or anchor in anchors(str(file.resolve().relative_to(ROOT))), target


def anchors(page: str) -> list[str]:
    if page.endswith(".py"):
        return list(definitions(ast.parse((ROOT / page).read_text()).body))
    headings = [body.children for head, body in itertools.pairwise(tokens(page)) if head.type == "heading_open"]
    texts = ["".join(child.content for child in children) for children in headings]
    return [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts]


def definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Functions and classes, and with a dot the methods of these."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name
            yield from definitions(node.body, f"{prefix}{node.name}.") if isinstance(node, ast.ClassDef) else ()
