"""A parser of command-line options that reports every mistake in one line."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn

from trl import TrlParser

OTHERS_SPEAK_AFTER = 10.0
"""Seconds that processes other than the first wait before they say what ended them."""


class Parser(TrlParser):
    """TRL's parser with one-line errors.

    Args:
        command: the command, as it begins an error message.
        usage: its usage line.
        description: what it does.
        options: dataclasses whose fields are the options.
    """

    def __init__(self, command: str, usage: str, description: str, options: Sequence[type]) -> None:
        self.command = command
        super().__init__(options, allow_abbrev=False)
        self.usage, self.description = usage, description

    def refuse_unknown(self, unknown: Sequence[str]) -> NoReturn:
        """Exit because of an unknown option, suggesting the most similar one."""
        typed = unknown[0].split("=")[0]
        known = [option for action in self._actions for option in action.option_strings]
        longer = [option for option in known if len(typed) > 2 and option.startswith(f"{typed}_")]
        similar = sorted(longer, key=len) or difflib.get_close_matches(typed, known, n=1)
        hint = f"did you mean {similar[0]}?" if similar else f"{self.command} --help lists all options."
        self.error(f"there is no option {unknown[0]}; {hint}")

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 after one line, printed by the first process only, and without the long usage."""
        if os.environ.get("RANK", "0") == "0":
            end(self.command, message, 2)
        raise SystemExit(2)

    @contextlib.contextmanager
    def errors_in_one_line(self, *kinds: type[Exception]) -> Iterator[None]:
        """A context in which exceptions of these kinds end the program as [`error`] does."""
        try:
            yield
        except kinds as error:
            end(self.command, str(error), 2)


def end(command: str, message: str, status: int, details: str = "") -> NoReturn:
    """End the program with one line, and with details before it.

    Where the first process has the same error, its end is soon that of all: the others speak some seconds later.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(OTHERS_SPEAK_AFTER)
        message = f"on process {rank}: {message}"
    print(f"{details}{command}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)


def write_out(lines: Iterable[str]) -> None:
    """Write lines to standard output.

    Raises:
        SystemExit: with status 1 and without a word if whatever reads them has ended, as `head` does.
    """
    try:
        sys.stdout.writelines(lines)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        raise SystemExit(1) from None
