"""What a user reads of an exception that ends a command."""

from __future__ import annotations

import traceback

from ..command_line import end

PACKAGE = __name__.split(".")[0]


def explain(command: str, error: Exception) -> None:
    """End the program with status 1 and the message of an exception that the package raised knowingly, for its message
    names the remedy. Where a function of the user's is the cause, its own lines come first.

    Args:
        command: the command, as it begins the message.
        error: caught where the command was called. Of any other than the package's the traceback is wanted: nothing
            is done.

    Raises:
        SystemExit: after the message.
    """
    raised = traceback.extract_tb(error.__traceback__)[-1]
    if _is_foreign(error) or not (raised.line or "").startswith("raise "):
        return
    lines: list[str] = []
    if (cause := error.__cause__) is not None:
        where = cause.__traceback__
        while where is not None and _is_of_package(where.tb_frame.f_globals):
            where = where.tb_next
        if where is not None:
            lines = traceback.format_exception(type(cause), cause, where)
    end(command, str(error), 1, "".join(lines))


def _is_foreign(error: BaseException) -> bool:
    """Whether an exception was raised outside of the package."""
    frames = [*traceback.walk_tb(error.__traceback__)]
    return not frames or not _is_of_package(frames[-1][0].f_globals)


def _is_of_package(module: dict[str, object]) -> bool:
    return str(module.get("__name__")).split(".")[0] == PACKAGE
