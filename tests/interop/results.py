"""The rows that the tests write, and the table in docs/serving.md that is made of them.

python -m tests.interop.results
"""

import json
import time
from pathlib import Path
from typing import Any

from tests.interop.environments import CACHE, Installed


FILE = CACHE / "results.json"
COLUMNS = ("tool", "what ran", "compared with transformers", "seconds", "date")


def read(file: Path = FILE) -> dict[str, dict[str, Any]]:
    """Test -> row; empty when none ran."""
    return json.loads(file.read_text()) if file.is_file() else {}


def write(test: str, row: dict[str, Any], file: Path = FILE) -> None:
    """Put the row of one test in the place of its last one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = read(file) | {test: row}
    file.write_text(json.dumps(dict(sorted(rows.items())), indent=2) + "\n")


def row(tool: str, environment: Installed | None, what: str, figure: str, seconds: float) -> dict[str, Any]:
    """One row; `figure` says what was compared, or why the tool did not run."""
    return {
        "tool": tool,
        "versions": environment.versions if environment else {},
        "what": what,
        "figure": figure,
        "seconds": round(seconds, 1),
        "date": time.strftime("%Y-%m-%d"),
        "command": f"make interop TOOL={tool}",
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for one in rows.values():
        version = next(iter(one["versions"].values()), "")
        cells = (f"{one['tool']} {version}".strip(), one["what"], one["figure"], f"{one['seconds']:.0f}", one["date"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(read()))
