"""The reference of the command `moe-hf`, made by Typer from the commands themselves, in the place of a marker."""

import typer
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

from moe_hf.cli import app


MARKER = "<!-- the commands of moe-hf -->"


def on_page_markdown(markdown: str, page: Page, **kwargs) -> str:
    """Put the commands where the marker is: a table with what each does, then each with its arguments and options."""
    if MARKER not in markdown:
        return markdown
    group = typer.main.get_command(app)
    rows, texts = [], []
    with typer.Context(group) as context:
        for name, command in group.commands.items():
            rows.append(f"| [`{name}`](#moe-hf-{name}) | {command.help.splitlines()[0]} |")
            texts.append(get_docs_for_click(obj=command, ctx=context, indent=1, call_prefix="moe-hf"))
    return markdown.replace(MARKER, "\n".join(["| command | what it does |", "|---|---|", *rows, "", *texts]))
