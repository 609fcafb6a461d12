"""What this package and its main job print, line by line: anything else in a first run is taken for a fault."""

import re

NUMBER = r"[-+]?[\d,]+(\.\d+)?(e[-+]?\d+)?%?"

RUN = (
    r"training the prior: \d+ updates on \d+ texts each; cached in .*",
    rf"  (updates of the prior|proposals|objective batches|updates): {NUMBER} of {NUMBER}, about {NUMBER} s left",
    r"rung   tau   cost best success accept ESS/n k-hat missing distinct   loss  calls",
    rf"( +(-|{NUMBER})){{12}}",
    r"(samples|evaluation|final model): mean cost .*, distinct \d\.\d\d",
    rf"trained in {NUMBER} s",
    r"training ends: .*",
    r"All of num_rungs=\d+ rungs were climbed\.",
)
"""Progress and results."""

WARNINGS = (
    r"k-hat is .*",
    r"By their weights, a rung's proposals are worth .*",
    r"The (prior|model( that drew rung \d+)?) has lost .*",
    r"The run ended at inverse temperature .*",
)
"""Of a run so short that it has not come close to p_T."""

PROCESSES = (r"\[rank\d\]:\[W.*\] Warning: find_unused_parameters=True was specified in DDP constructor, .*",)
"""Torch's own, of several processes: without that setting a run would fail where no row chooses some expert."""

MAIN_JOB = (
    r" +[\d,]+ draws each *",
    r"[┏┃┡│└].*[┓┃┩│┘]",
    rf"{NUMBER} proposals, {NUMBER} distinct objective calls",
    r"missing mass: .* nats; by the ladder's log Z, the model's draws cover .*",
    r"trees: the model's draws cover .* spanning trees that Kirchhoff's theorem counts .*",
    r"a tree: [\w-]+(, [\w-]+)*",
    r"figure and table: .*",
)
"""The main job's report, on a terminal that is wide enough (`COLUMNS`)."""

COMMANDS = (
    r"After \d+ rungs?, the model's mean cost is .*",
    *(f"(warning: )?{warning}" for warning in WARNINGS),
    r"report: .*/report.html",
)
"""`aldrift train` and `aldrift report`, beside what a run prints."""


def assert_quiet(printed: str, *expected: str) -> None:
    """Fails for a line that none of the patterns matches; a progress bar is a line, too."""
    lines = [line for line in re.split(r"[\r\n]+", printed) if line.strip()]
    foreign = [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in expected)]
    assert not foreign, "unexpected lines:\n" + "\n".join(foreign)
