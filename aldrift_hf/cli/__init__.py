"""The command `aldrift`. A command's module is imported when it is run: `aldrift --help` loads nothing else."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from ..reporting.letters import print_every_letter

COMMANDS = {
    "train": (".train", "turn a model into a sampler of p_T(s) ∝ L(s)·exp(-T·d(s)), for your cost d"),
    "sample": (".sample", "draw samples of p_T from a trained model"),
    "evaluate": (".evaluate", "measure how close a trained model is to p_T"),
    "costs": (".costs", "list all texts that a run has evaluated, best first"),
    "report": (".report", "write report.html for a run, finished or not, and print its outcome"),
    "selftest": ("..selftest", "check probabilities and draws on this machine, device and model"),
    "env": (".env", "print versions and devices, for a bug report"),
}
"""Each command's module, whose `main(argv)` returns an exit status or `None`, and what it does."""

USAGE = f"""\
usage: aldrift COMMAND ...

{"".join(f"  {name:<10} {what}{chr(10)}" for name, (_, what) in COMMANDS.items())}
aldrift COMMAND --help explains each. On several processes:
accelerate launch -m aldrift_hf.cli train ...
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: the command and its options. `None`: those of the program.

    Raises:
        SystemExit: with a command's exit status, where it is not 0.
    """
    print_every_letter()
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    name, *options = argv
    if name not in COMMANDS:
        raise SystemExit(f"aldrift: there is no command {name!r}; the commands are {', '.join(COMMANDS)}")
    command = importlib.import_module(COMMANDS[name][0], __name__)
    try:
        status = command.main(options)
    except KeyboardInterrupt as stop:
        print(f"aldrift {name}: {stop or 'stopped'}", file=sys.stderr)
        status = 130
    except Exception as error:
        from .faults import explain  # it loads TRL

        explain(f"aldrift {name}", error)
        raise
    if status:
        raise SystemExit(status)
