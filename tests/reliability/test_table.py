"""The table of `docs/reliability.md` is complete, and the tests that it, `docs/distributed.md` and `docs/versions.md` name exist."""

import ast
import re
from pathlib import Path

import pytest


TESTS = Path(__file__).resolve().parents[1]
TABLE = TESTS.parent / "docs" / "reliability.md"
COUNTS = {"C": 22, "K": 24, "U": 18, "H": 18, "T": 18, "D": 8, "S": 8, "M": 4, "V": 7}


def _functions(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("document", "least"), [("reliability.md", 80), ("distributed.md", 25), ("versions.md", 40)])
def test_every_named_test_exists(document, least):
    default = file = None
    named = []
    for line in TABLE.with_name(document).read_text().splitlines():
        if line.startswith("## "):
            default = None
        if match := re.match(r"In `([\w/]+\.py)`", line):
            default = match[1]
        file = default
        for place, name in re.findall(r"`([\w/]*(?:\.py)?)::(test_\w+)`", line) if line.startswith("|") else ():
            file = place or file
            named.append((file, name))
    assert len(named) > least
    assert [(file, name) for file, name in named if name not in _functions(file)] == []


def test_every_case_has_a_row():
    covered = set()
    for cell in re.findall(r"^\| ([^|]*) \|", TABLE.read_text(), re.MULTILINE):
        for first, last in re.findall(r"([CKUHTDSMV]\d+)(?:-[CKUHTDSMV](\d+))?", cell):
            covered |= {f"{first[0]}{number}" for number in range(int(first[1:]), int(last or first[1:]) + 1)}
    assert {
        f"{letter}{number}" for letter, count in COUNTS.items() for number in range(1, count + 1)
    } - covered == set()
