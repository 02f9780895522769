"""The site: it builds without a warning, has a place for every public name and command, and asks no other machine."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import moe_hf
from moe_hf.cli import app
from tests.documents.blocks import PAGES, ROOT


# Attributes that fetch something when a page is opened, unlike a link that is followed.
FETCHED = re.compile(
    r"<(?:script|img|iframe|source|link(?! rel=\"canonical\"))\b[^>]*?\b(?:src|href)=\"?(?:https?:)?//[^\s\">]+"
)
HTML_LIMIT = 40
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_every_public_name_has_one_place_in_the_reference():
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    shown = [name for page in pages for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)]
    public = {f"moe_hf.{name}" for name in moe_hf.__all__}
    missing = sorted(public - set(shown))
    assert not missing, f"add `::: {missing[0]}` to a page of docs/api, one line for each of {missing}"
    assert sorted(shown) == sorted(set(shown)), "a name stands twice"
    assert {name for name in shown if name.count(".") == 1} == public


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")}
    missing = sorted(page for page in pages if not re.search(rf"[ -]{re.escape(page)}$", text, re.MULTILINE))
    assert not missing, f"add {missing} to nav in mkdocs.yml"


def build(root: Path, folder: Path) -> subprocess.CompletedProcess:
    """Build the site of a checkout as `make docs` does."""
    for package in ("material", "mkdocstrings"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -c constraints.txt -e '.[docs]'")
    # Without `--quiet`, which hides warnings from the count of a strict build too.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(root), "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site."""
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def test_site_builds_with_warnings_as_errors(site):
    assert (site / "index.html").is_file() and len(list(site.rglob("*.html"))) > HTML_LIMIT


def test_pages_fetch_nothing_from_other_machines(site):
    fetched = {match for page in site.rglob("*.html") for match in FETCHED.findall(page.read_text())}
    styles = {
        page.name for page in site.rglob("*.css") if re.search(r"(@import|url\()[\"' ]*(https?:)?//", page.read_text())
    }
    assert (fetched, styles) == (set(), set())


def test_reference_shows_parameters_types_and_links(site):
    page = (site / "api" / "upcycling.html").read_text()
    entry = page[page.index('id="moe_hf.upcycle"') : page.index('id="moe_hf.upcycle_checkpoint"')]
    text = re.sub(r"<[^>]+>", "", entry)
    for name in ("dense", "num_experts", "allow_inexact", "config_fields"):
        assert re.search(rf"^\s*{name}\b", text, re.MULTILINE), name
    assert "PreTrainedModel | str | Path" in text
    assert 'href="models.html#moe_hf.MoEConfig"' in entry and 'href="errors.html#moe_hf.MoEError"' in entry
    # What transformers' style writes of types, optional arguments and references.
    for left_over in ("*optional*", "(`", "[`", "Args:"):
        assert left_over not in text, left_over


def test_command_reference_has_every_command_and_option(site):
    text = re.sub(r"<[^>]+>", "", (site / "cli.html").read_text())
    for name, command in typer.main.get_command(app).commands.items():
        assert f"moe-hf {name}" in text
        for option in (option for parameter in command.params for option in parameter.opts if option.startswith("--")):
            assert option in text, f"{name} {option}"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_search_answers_in_a_page_that_is_opened_from_the_disk(site, tmp_path):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    # The index is read and searched before the page is printed.
    command += ["--virtual-time-budget=20000", f"{(site / 'api' / 'hub.html').as_uri()}?q=moe_hf.upcycle"]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert re.search(r"\d+ matching documents", page)
    assert "upcycling.html?h=" in page


@pytest.mark.slow
def test_every_kind_of_fault_ends_the_build(tmp_path):
    for name in ("docs", "moe_hf"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    for path in ROOT.iterdir():
        if path.name in ("benchmarks", "examples", "training", "model_cards") or path.suffix in (".md", ".txt"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "docs" / "lost.md").write_text("# Lost\n")
    faults = ["nowhere.md", "../examples/nowhere.py", "upcycling.md#nowhere", "../benchmarks/README.md#nowhere"]
    page = tmp_path / "docs" / "training.md"
    page.write_text(page.read_text() + "\n".join(f"\n[a]({fault})" for fault in faults) + "\n\n[a][moe_hf.nowhere]\n")
    code = tmp_path / "moe_hf" / "upcycling" / "upcycle.py"
    code.write_text(code.read_text().replace("        noise (`float`):", "        nose (`float`): see [`nobody`];"))
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    warnings = re.findall(r"^WARNING.*(?:\n  - .*)?", done.stderr, re.MULTILINE)
    for fault in ("lost.md", *(fault.removeprefix("../") for fault in faults), "moe_hf.nowhere", "nose", "nobody"):
        page, _, anchor = fault.partition("#")
        assert any(page in warning and anchor in warning for warning in warnings), fault
