"""Every command and every piece of Python in the documents is run on tiny models, or says why it is not."""

import os
import sys
from types import ModuleType

import pytest

from moe_hf.modeling.routers import ROUTERS
from tests.documents import commands, fragments
from tests.documents.blocks import PAGES, PYTHON, ROOT, Block, blocks_of, complaint
from tests.documents.stand_ins import time_lapse, write_folders


pytestmark = pytest.mark.timeout(600)
WHAT_TO_DO = """
Mend the block, or write a comment in the line before it: <!-- not run: REASON -->. Its commands run in a folder with tiny
models in the place of those that it names (tests/documents/stand_ins.py, which gives Python its unset names too).
tests/documents/blocks.py has all markers."""
BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def fail(block: Block, why: object) -> None:
    pytest.fail(f"{block.place}: {why}\n{WHAT_TO_DO}", pytrace=False)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand-ins")
    write_folders(folder)
    return folder


@pytest.fixture
def no_router_left():
    """What a page registers is gone after it."""
    known = set(ROUTERS)
    yield
    for name in set(ROUTERS) - known:
        del ROUTERS[name]


class Reader:
    """Who follows one page: a folder and the names of Python, until a block starts anew."""

    def __init__(self, page, stand_ins, home):
        self.page, self.stand_ins, self.home, self.folders = page, stand_ins, home, 0
        self.names = {}
        self.start_anew()

    def start_anew(self):
        """Enter a folder with the stand-ins and the page's files."""
        imported = {name: value for name, value in self.names.items() if isinstance(value, ModuleType)}
        self.names = imported | {"__name__": "__main__"}
        folder = self.home / str(self.folders)
        self.folders += 1
        folder.mkdir()
        for entry in self.stand_ins.iterdir():
            (folder / entry.name).symlink_to(entry)
        for block in blocks_of(self.page):
            if block.marker == "file":
                path = folder / block.argument
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text + "\n")
        os.chdir(folder)

    def follow(self, block):
        """Run a block."""
        if block.marker == "anew":
            self.start_anew()
        if block.language in PYTHON:
            with time_lapse():
                fragments.run(block.text, block.place, self.names)
            return
        for words in commands.commands_of(block.text):
            with time_lapse():
                commands.run(words)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_block_has_a_language_and_a_marker_that_says_enough(block):
    if found := complaint(block):
        fail(block, found)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.is_run for b in blocks_of(page))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_page_runs(page, stand_ins, no_router_left, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # As for `python` at a prompt: last, so that the programs are found in the checkout.
    monkeypatch.setattr(sys, "path", [*sys.path, ""])
    reader = Reader(page, stand_ins, tmp_path)
    for block in blocks_of(page):
        if not block.is_run:
            continue
        try:
            reader.follow(block)
        except (Exception, SystemExit) as error:
            fail(block, f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.is_code and b.marker == "not run"], ids=lambda b: b.place)
def test_block_that_is_not_run_names_what_exists(block):
    try:
        if block.language in PYTHON:
            found = list(fragments.complaints(block.text))
            assert not found, f"there is no {', '.join(found)}"
        else:
            for words in commands.commands_of(block.text):
                commands.check(words)
    except (commands.CommandError, AssertionError, SyntaxError, ImportError) as error:
        fail(block, error)
