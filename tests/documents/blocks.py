"""The code of the documents, block by block, and what a comment before a block says of it.

A block of shell or Python is run, after those before it on its page. A comment in the line before it changes that:

- `<!-- not run: REASON -->`: why, in words; tests that do the same are named `tests/FILE.py::test_name`. Options, names and
  paths of such a block are checked all the same.
- `<!-- anew -->`: without the files and names that earlier blocks left; what they imported as a module stays.
- `<!-- file: NAME -->`: the block is a file, of any language, which is there when the page's commands run.
"""

import re
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
SHELL = ("bash", "sh", "shell")
PYTHON = ("python",)
# Shown, not run: output, diagrams, data.
SHOWN = ("text", "yaml", "json", "toml", "mermaid")
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<language>[^\n`]*)$")
MARKER = re.compile(r"^ *<!-- (not run|anew|file)(?:: (.*?))? -->$")
NAMED_TEST = re.compile(r"(tests/[\w/]+\.py)(?:::(\w+))?")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the line of its fence from 1, its language and text, and its marker."""

    page: Path
    line: int
    language: str
    text: str
    marker: str | None = None
    argument: str | None = None

    @property
    def place(self) -> str:
        """`docs/page.md:12`."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_code(self) -> bool:
        """Whether it is shell or Python."""
        return self.language in SHELL + PYTHON

    @property
    def is_run(self) -> bool:
        """Whether its page's test runs it."""
        return self.is_code and self.marker in (None, "anew")


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    blocks, opening, body = [], None, []
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        match = FENCE.match(line)
        if opening is None and match:
            opening, body = (number, match), []
        elif opening is not None and line.strip() == opening[1]["fence"]:
            start, first = opening
            before = MARKER.match(lines[start - 2]) if start > 1 else None
            marker, argument = before.groups() if before else (None, None)
            text = "\n".join(text.removeprefix(first["indent"]) for text in body)
            blocks.append(Block(page, start, first["language"].split(" ")[0], text, marker, argument))
            opening = None
        elif opening is not None:
            body.append(line)
    assert opening is None, f"{page}: the fence in line {opening[0]} is not closed"
    return blocks


def complaint(block: Block) -> str | None:
    """What is wrong with a block's language or marker; None where nothing is."""
    if block.language not in SHELL + PYTHON + SHOWN and block.marker != "file":
        return f"the language is {block.language!r}; say bash or python where it is code, text where it is not ({', '.join(SHOWN)})."
    if block.marker in ("not run", "file") and len((block.argument or "").split()) < (block.marker == "not run") + 1:
        return f"<!-- {block.marker}: ... --> says too little."
    if block.marker == "anew" and not block.is_code:
        return "<!-- anew --> is for code."
    for file, test in NAMED_TEST.findall(block.argument or "") if block.marker == "not run" else ():
        if not (ROOT / file).is_file() or f"def {test}" not in (ROOT / file).read_text():
            return f"there is no {file}::{test}."
    return None
