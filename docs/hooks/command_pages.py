"""The reference of the command `moe-hf`, made by Typer from the commands themselves, in the place of a marker."""

import typer
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

from moe_hf.cli import app


MARKER = "<!-- the commands of moe-hf -->"


def on_page_markdown(markdown: str, page: Page, **kwargs) -> str:
    """Put the commands where the marker is."""
    if MARKER not in markdown:
        return markdown
    group = typer.main.get_command(app)
    with typer.Context(group) as context:
        text = get_docs_for_click(obj=group, ctx=context, name="moe-hf")
    # The page has a title and an introduction of its own.
    return markdown.replace(MARKER, text.split("\n", 1)[1])
