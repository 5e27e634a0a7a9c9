"""Tables of measured numbers: printed while they grow, and kept with the command that made them."""

import csv
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .report import versions


def report(title: str, rows: Iterable[dict[str, Any]], folder: Path | None = None) -> list[dict[str, Any]]:
    """Print rows as a Markdown table as they come, and write them to a folder.

    Args:
        rows: what a column holds by its name; columns that the first row lacks are in the files only.
        folder: for `<title>.csv` and `<title>.json` with "command", "versions" and "rows", colons in the title being dashes.
            Written after each row, so that an interrupted run has lost nothing. None: only print.
    """
    collected: list[dict[str, Any]] = []
    for row in rows:
        if not collected:
            columns = list(row)
            print(f"\n## {title}\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)
        collected.append(row)
        print("| " + " | ".join(_cell(row.get(name, "")) for name in columns) + " |", flush=True)
        if folder is not None:
            write_table(collected, folder / title.replace(":", "-"))
    return collected


def write_table(rows: list[dict[str, Any]], path: Path, **more: Any) -> None:
    """Write rows to <path>.csv, and to <path>.json with the command, versions and what else is given."""
    with path.with_name(path.name + ".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    content = {"command": shlex.join(["python", *sys.argv]), "versions": versions(), **more, "rows": rows}
    path.with_name(path.name + ".json").write_text(json.dumps(content, indent=1) + "\n")


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
