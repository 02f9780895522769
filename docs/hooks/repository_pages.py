"""Pages of the site for what lies outside of docs/: what the pages and the navigation name becomes part of the site.

A Markdown file becomes a page, a folder a page with its list, a source file a page that shows it, a notebook a page with what it
printed, anything else is copied.
Each stands below its path in the repository, and links to it are turned to there, so that the documents keep links that
work in the repository too.
"""

import ast
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


SOURCES = {".py": "python", ".yaml": "yaml", ".slurm": "bash", ".txt": "text", ".md": "markdown", ".jinja": "html"}
NOTEBOOK = ".ipynb"
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#\s])")
FENCE = re.compile(r"^(`{3,}).*?^\1`*$", re.MULTILINE | re.DOTALL)
# A template of Jinja: others may speak of such a block in a line of text.
TEMPLATE = re.compile(r"^\{%", re.MULTILINE)
# MkDocs takes a README for the start page, which the site has already.
ENTRY = {"README.md": "readme.md"}
DIAGRAM = re.compile(r"^```mermaid\n.*?^```\n", re.MULTILINE | re.DOTALL)


def root_of(config: MkDocsConfig) -> Path:
    """The repository."""
    return Path(config.config_file_path).parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the navigation and the pages name, and what is named there in turn."""
    root = root_of(config)
    paths = [path.removesuffix("/index.md") for path in _entries(config.nav)]
    paths += [path for file in files.documentation_pages() for path in _links(root, file.src_uri)]
    while paths:
        path = paths.pop()
        if not (root / path).exists() or files.get_file_from_path(place_of(root, path)) is not None:
            continue
        place = place_of(root, path)
        files.append(_file(root, path, place, config))
        if (root / path).is_dir():
            paths += [f"{path}/{name}" for name in _listing(root / path)]
        else:
            paths += _links(root, place)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that lead out of docs/ to the place of what they name; leave out diagrams, which need other machines."""
    root, own = root_of(config), page.file.src_uri
    markdown = DIAGRAM.sub("", markdown)

    def turned(match: re.Match) -> str:
        path = _resolve(root, own, match[1])
        if path is None:
            return match[1]
        return os.path.relpath(place_of(root, path), PurePosixPath(own).parent)

    return _outside_fences(markdown, lambda text: LINK.sub(turned, text))


def place_of(root: Path, path: str) -> str:
    """Where the site has a path of the repository."""
    if path in ENTRY:
        return ENTRY[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (root / path).is_dir():
        return f"{path}/index.md"
    return f"{path}.md" if _is_source(root / path) else path


def path_of(root: Path, place: str) -> str:
    """The path in the repository of a page of the site."""
    if (root / "docs" / place).is_file():
        return f"docs/{place}"
    return next((path for path, entry in ENTRY.items() if entry == place), place)


def _is_source(path: Path) -> bool:
    if path.suffix == ".md":
        return TEMPLATE.search(path.read_text()) is not None
    return path.suffix in SOURCES or path.suffix == NOTEBOOK


def _file(root: Path, path: str, place: str, config: MkDocsConfig) -> File:
    source = root / path
    if source.is_dir():
        return File.generated(config, place, content=_list_page(source, path))
    if _is_source(source):
        return File.generated(config, place, content=_source_page(source, path))
    return File.generated(config, place, abs_src_path=str(source))


def _source_page(source: Path, path: str) -> str:
    if source.suffix == NOTEBOOK:
        return _notebook_page(source)
    return f"# {path}\n\n`````{SOURCES[source.suffix]}\n{source.read_text().rstrip()}\n`````\n"


def _notebook_page(source: Path) -> str:
    """Its cells in order, each piece of code with what it printed and drew."""
    parts = []
    for cell in json.loads(source.read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"`````python\n{text}\n`````")
        for output in cell.get("outputs", ()):
            picture = "".join(output.get("data", {}).get("image/png", "")).replace("\n", "")
            if picture:
                parts.append(f"![what the cell draws](data:image/png;base64,{picture})")
            elif output.get("name") == "stdout":
                parts.append(f"`````text\n{''.join(output['text']).rstrip()}\n`````")
    return "\n\n".join([*parts, ""])


def _list_page(folder: Path, path: str) -> str:
    rows = [f"| [{name}]({name}) | {_first_line(folder / name)} |" for name in _listing(folder)]
    return "\n".join([f"# {path}", "", "| file | what |", "|---|---|", *rows, ""])


def _listing(folder: Path) -> list[str]:
    return sorted(
        path.name
        for path in folder.iterdir()
        if (path.suffix in SOURCES or path.suffix == NOTEBOOK) and path.name != "__init__.py"
    )


def _first_line(path: Path) -> str:
    """What a source file says of itself first."""
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    if path.suffix == NOTEBOOK:
        text = json.loads(text)["cells"][0]["source"][0]
    lines = [line.lstrip("# ") for line in text.splitlines() if not line.startswith(("#!", "---"))]
    return lines[0].rstrip(":") if lines and path.suffix != ".md" else ""


def _entries(nav: list | dict | str | None) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for entry in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _entries(entry)


def _links(root: Path, place: str) -> list[str]:
    """What a page names outside of docs/, by its path in the repository."""
    source = root / path_of(root, place)
    if source.suffix != ".md" or not source.is_file():
        return []
    links = LINK.findall(FENCE.sub("", source.read_text()))
    paths = [_resolve(root, place, link) for link in links]
    return [path for path in paths if path is not None and not path.startswith("docs/")]


def _resolve(root: Path, place: str, link: str) -> str | None:
    """The path in the repository that a link on a page names; None where there is none, or both are in docs/."""
    if ":" in link or link.startswith("/"):
        return None
    own = path_of(root, place)
    path = os.path.normpath(PurePosixPath(own).parent / link)
    if path.startswith("..") or not (root / path).exists() or (own.startswith("docs/") and path.startswith("docs/")):
        return None
    return path


def _outside_fences(markdown: str, change: Callable[[str], str]) -> str:
    parts, start = [], 0
    for match in FENCE.finditer(markdown):
        parts += [change(markdown[start : match.start()]), match[0]]
        start = match.end()
    return "".join([*parts, change(markdown[start:])])
