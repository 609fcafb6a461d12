"""`aldrift costs`."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from typing import IO, Any

from ..command_line import Parser, write_out
from ..objective.evaluated import evaluated_texts


def main(argv: Sequence[str]) -> None:
    """Print all texts that a run has evaluated, or write them to a file.

    Raises:
        SystemExit: after one line, for options that cannot be used, and for a folder in which nothing was evaluated.
    """
    parser = Parser(
        "aldrift costs",
        "aldrift costs RUN [-n NUMBER] [--output FILE]",
        "All texts that a run, finished or not, has evaluated by its objective, or a command that drew from its model, "
        "with their costs, best first, as JSON lines.",
        [],
    )
    parser.add_argument("run", metavar="RUN", help="The output directory of a run.")
    parser.add_argument("-n", "--num_texts", type=int, metavar="NUMBER", help="Only so many, the best.")
    parser.add_argument("--output", metavar="FILE", help="File to write to; as a table, if its name ends in .csv.")
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.refuse_unknown(unknown)
    if options.num_texts is not None and options.num_texts < 1:
        parser.error(f"--num_texts must be at least 1, got {options.num_texts}")
    with parser.errors_in_one_line(ValueError, OSError):
        texts = evaluated_texts(options.run)[: options.num_texts]
        lines = [json.dumps(text, ensure_ascii=False) + "\n" for text in texts]
        if options.output is not None:
            with open(options.output, "w", encoding="utf-8", errors="replace", newline="") as file:
                if options.output.endswith(".csv"):
                    _write_table(texts, file)
                else:
                    file.writelines(lines)
            return
    write_out(lines)


def _write_table(texts: list[dict[str, Any]], file: IO[str]) -> None:
    rows = [_flat(text) for text in texts]
    table = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
    table.writeheader()
    table.writerows(rows)


def _flat(text: Mapping[str, Any]) -> dict[str, Any]:
    """One row: the cost under each function in a column of its own; messages of a chat, and the like, as JSON."""
    row = {name: value for name, value in text.items() if name != "objectives"}
    row |= {f"objectives/{name}": cost for name, cost in text.get("objectives", {}).items()}
    nested = {name: value for name, value in row.items() if isinstance(value, (list, dict))}
    return row | {name: json.dumps(value, ensure_ascii=False) for name, value in nested.items()}
