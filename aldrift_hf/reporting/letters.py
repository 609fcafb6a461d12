"""Output that lacks letters: on Windows a file or a pipe takes 200 of them, and Greek ones, say, raise an exception."""

from __future__ import annotations

import io
import sys


def print_every_letter() -> None:
    """Have letters that standard output cannot take printed as `?`: a completion that is shown must not end a run.

    Standard error takes all letters as it is, and so does a notebook.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
