"""Every command and every piece of Python in the documents is run on tiny models, or says why it is not."""

import os
import sys
from types import ModuleType

import pytest

from moe_hf.modeling.routers import ROUTERS
from tests.documents import commands, fragments
from tests.documents.blocks import PAGES, PYTHON, ROOT, Block, blocks_of, complaint
from tests.documents.stand_ins import time_lapse, write_folders


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_named_in_the_text_exist(page):
    found = list(commands.inline_complaints(page.read_text()))
    assert not found, f"{page.relative_to(ROOT)}: there is no {', '.join(found)}"


def test_commands_and_options_in_a_text_are_checked():
    text = "`moe-hf upcycel`, `moe-hf export DIR --too x`, `--no-such`; `moe-hf COMMAND --help`, `--ep_size 8`, `--dry-run`"
    found = ["moe-hf upcycel", "--too in `moe-hf export DIR --too x`", "--no-such in `--no-such`"]
    assert list(commands.inline_complaints(text)) == found


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("```python\nx = 1\n```", None),
        ("```\nmoe-hf inspect x\n```", "the language is ''"),
        ("```console\n$ moe-hf inspect x\n```", "the language is 'console'"),
        ("<!-- not run: needs a GPU -->\n```bash\nmoe-hf inspect x\n```", None),
        ("<!-- not run: GPU -->\n```bash\nmoe-hf inspect x\n```", "says too little"),
        (
            "<!-- not run: as tests/test_cli.py::test_no_such -->\n```bash\nmoe-hf inspect x\n```",
            "there is no tests/test_cli",
        ),
        ("<!-- file: a.toml -->\n```toml\nx = 1\n```", None),
    ],
)
def test_marker_must_say_enough(text, what, tmp_path):
    (tmp_path / "page.md").write_text(text + "\n")
    (block,) = blocks_of(tmp_path / "page.md")
    assert complaint(block) is None if what is None else what in complaint(block)


@pytest.mark.parametrize(
    ("script", "what"),
    [
        ("moe-hf inspect a --no-such-option", "No such option"),
        ("moe-hf no-such-command", "there is no moe-hf no-such-command"),
        ("moe-hf upcycle a b \\\n    --experts 8", "No such option"),
        ("make no-such-target", "no target no-such-target"),
        ("accelerate launch --config_file training/accelerate/none.yaml training/finetune.py", "none.yaml"),
        ("X=1 accelerate launch training/finetune.py --config finetune_moe --no_such 1", "no_such"),
        ("python training/none.py", "there is no training/none.py"),
        ("python -m benchmarks.none", "there is no benchmarks/none"),
        ("vllm serve m -d '{\n}'\npython llama.cpp/convert.py m", None),
        ("moe-hf push a me/b --as auto", None),
    ],
)
def test_commands_that_are_not_run_are_checked(script, what):
    found = None
    try:
        for words in commands.commands_of(script):
            commands.check(words)
    except commands.CommandError as error:
        found = str(error)
    assert found is None if what is None else what in found


@pytest.mark.parametrize(
    "script", ["pip install x", "vllm serve m", "rm -rf x", "accelerate launch --num_processes 8 a.py"]
)
def test_commands_of_others_and_of_many_processes_are_never_run(script):
    with pytest.raises(commands.CommandError):
        commands.run(script.split())


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import moe_hf\nmoe_hf.upcycel(x)", ["moe_hf.upcycel"]),
        ("moe_hf.verify(a, b, sede=1)", ["moe_hf.verify(sede=...)"]),
        ("from moe_hf.hub import nothing", ["moe_hf.hub.nothing"]),
        ("moe_hf.upcycle(a, num_experts=8, any_field=1)", []),
        ("MoETrainingArguments(output_dir='x', ep_size=8)", []),
        ("MoETrainingArguments(output_dir='x', ep=8)", ["MoETrainingArguments(ep=...)"]),
    ],
)
def test_python_that_is_not_run_is_checked(code, found):
    assert list(fragments.complaints(code)) == found
